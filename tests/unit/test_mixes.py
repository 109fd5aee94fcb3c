"""Which tensor gets which type: spot checks against what llama-quantize writes, and the rules around it."""

import re
from collections import Counter

import pytest

from qrun.engine.quantize.mixes import (
    Choice,
    Facts,
    choose_types,
    file_type_name,
    fitting_type,
    is_quantisable,
    needs_importance,
)
from qrun.formats import TensorType as T

Layout = dict[str, tuple[T, tuple[int, ...]]]
FFN = ("ffn_gate", "ffn_up", "ffn_down")


def model(layers: int, *, experts: int = 0, tied: bool = False, row: int = 512) -> Layout:
    layout: Layout = {"token_embd.weight": (T.F16, (1000, row)), "output_norm.weight": (T.F32, (row,))}
    if not tied:
        layout["output.weight"] = (T.F16, (1000, row))
    for i in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            layout[f"blk.{i}.{name}.weight"] = (T.F16, (row, row))
        layout[f"blk.{i}.attn_norm.weight"] = (T.F32, (row,))
        for name in FFN:
            if experts:
                layout[f"blk.{i}.{name}_exps.weight"] = (T.F16, (experts, row, row))
            else:
                layout[f"blk.{i}.{name}.weight"] = (T.F16, (row, row))
        if experts:
            layout[f"blk.{i}.ffn_gate_inp.weight"] = (T.F32, (experts, row))
    return layout


def facts(layers: int, *, kv_heads: int = 8, experts: int = 0, importance: bool = False, arch: str = "llama") -> Facts:
    return Facts(arch, layers, 8, kv_heads, experts, importance)


def layers_of(types: dict[str, T], part: str, type: T) -> list[int]:
    return [int(name.split(".")[1]) for name, chosen in types.items() if f".{part}" in name and chosen == type]


def test_q4_k_m_gives_more_bits_to_every_third_layer_and_both_ends() -> None:
    types = choose_types(model(16), facts(16), Choice("Q4_K_M"))
    expected = [0, 1, 4, 7, 10, 13, 14, 15]
    assert layers_of(types, "ffn_down.weight", T.Q6_K) == expected
    assert layers_of(types, "attn_v.weight", T.Q6_K) == expected
    assert types["output.weight"] == T.Q6_K
    assert types["token_embd.weight"] == T.Q4_K
    assert types["output_norm.weight"] == T.F32
    assert Counter(types.values())[T.Q4_K] == 16 * 7 - 16 + 1


def test_a_tied_embedding_is_an_output() -> None:
    types = choose_types(model(4, tied=True), facts(4), Choice("Q4_K_M"))
    assert types["token_embd.weight"] == T.Q6_K


@pytest.mark.parametrize(
    ("name", "kv_heads", "values", "down", "output"),
    [
        ("Q2_K", 8, {T.Q3_K: 16}, {T.Q3_K: 16}, T.Q3_K),
        ("Q2_K", 2, {T.Q4_K: 16}, {T.Q3_K: 16}, T.Q3_K),
        ("Q2_K_S", 2, {T.Q4_K: 16}, {T.Q4_K: 2, T.Q2_K: 14}, T.Q2_K),
        ("Q3_K_S", 8, {T.Q3_K: 16}, {T.Q3_K: 16}, T.Q3_K),
        ("Q3_K_M", 8, {T.Q5_K: 2, T.Q4_K: 14}, {T.Q5_K: 1, T.Q4_K: 15}, T.Q4_K),
        ("Q3_K_L", 8, {T.Q5_K: 16}, {T.Q5_K: 16}, T.Q5_K),
        ("Q4_K_S", 8, {T.Q5_K: 4, T.Q4_K: 12}, {T.Q5_K: 2, T.Q4_K: 14}, T.Q4_K),
        ("Q5_K_S", 8, {T.Q5_K: 16}, {T.Q5_K: 16}, T.Q5_K),
        ("Q5_K_M", 8, {T.Q6_K: 8, T.Q5_K: 8}, {T.Q6_K: 8, T.Q5_K: 8}, T.Q5_K),
        ("IQ4_XS", 2, {T.Q5_K: 16}, {T.Q5_K: 2, T.IQ4_XS: 14}, T.IQ4_XS),
        ("IQ4_NL", 8, {T.IQ4_NL: 16}, {T.Q5_K: 2, T.IQ4_NL: 14}, T.IQ4_NL),
        ("Q8_0", 8, {T.Q8_0: 16}, {T.Q8_0: 16}, T.Q8_0),
        ("IQ3_M", 8, {T.Q4_K: 16}, {T.Q4_K: 2, T.IQ3_S: 14}, T.Q4_K),
        ("IQ3_S", 8, {T.IQ3_S: 16}, {T.IQ3_S: 16}, T.IQ3_S),
        ("IQ3_S", 2, {T.Q4_K: 16}, {T.IQ3_S: 16}, T.IQ3_S),
        ("IQ3_XS", 2, {T.Q4_K: 16}, {T.IQ3_S: 16}, T.IQ3_S),
        ("IQ3_XXS", 8, {T.IQ3_S: 16}, {T.Q4_K: 2, T.Q3_K: 14}, T.IQ3_S),
        ("IQ2_M", 8, {T.IQ3_S: 16}, {T.IQ3_S: 2, T.IQ2_S: 14}, T.IQ3_S),
        ("IQ2_S", 8, {T.IQ3_S: 16}, {T.IQ3_S: 2, T.IQ2_XS: 14}, T.IQ3_S),
        ("IQ2_XS", 2, {T.Q4_K: 16}, {T.Q2_K: 2, T.IQ2_XS: 14}, T.IQ2_XS),
        ("IQ2_XXS", 8, {T.Q2_K: 16}, {T.Q2_K: 2, T.IQ2_XXS: 14}, T.IQ2_XXS),
        ("IQ1_M", 8, {T.Q2_K: 16}, {T.Q2_K: 2, T.IQ1_M: 14}, T.IQ2_XXS),
        ("IQ1_S", 8, {T.Q2_K: 16}, {T.Q2_K: 2, T.IQ1_S: 14}, T.IQ2_XXS),
        ("TQ2_0", 8, {T.TQ2_0: 16}, {T.TQ2_0: 16}, T.TQ2_0),
        ("NVFP4", 8, {T.NVFP4: 16}, {T.NVFP4: 16}, T.NVFP4),
    ],
)
def test_the_mixes(name: str, kv_heads: int, values: dict[T, int], down: dict[T, int], output: T) -> None:
    types = choose_types(model(16), facts(16, kv_heads=kv_heads), Choice(name))
    assert Counter(types[f"blk.{i}.attn_v.weight"] for i in range(16)) == values
    assert Counter(types[f"blk.{i}.ffn_down.weight"] for i in range(16)) == down
    assert {types[f"blk.{i}.attn_output.weight"] for i in range(16)} == {output}


def test_eight_experts_get_better_attention() -> None:
    types = choose_types(model(16, experts=8), facts(16, experts=8), Choice("Q4_K_M"))
    assert {types[f"blk.{i}.{name}.weight"] for i in range(16) for name in ("attn_k", "attn_v")} == {T.Q8_0}
    assert {types[f"blk.{i}.attn_output.weight"] for i in range(16)} == {T.Q5_K}
    assert types["blk.0.ffn_gate_inp.weight"] == T.F32
    assert layers_of(types, "ffn_down_exps.weight", T.Q6_K) == [0, 1, 4, 7, 10, 13, 14, 15]


def test_mxfp4_is_for_experts() -> None:
    types = choose_types(model(2, experts=4), facts(2, experts=4), Choice("MXFP4"))
    assert types["blk.0.ffn_up_exps.weight"] == T.MXFP4
    assert types["blk.0.attn_q.weight"] == types["output.weight"] == types["token_embd.weight"] == T.Q8_0


def test_queries_keys_and_values_in_one_count_as_values() -> None:
    layout = {name.replace("attn_v", "attn_qkv"): entry for name, entry in model(16).items()}
    types = choose_types(layout, facts(16, arch="phi3"), Choice("Q5_K_M"))
    assert layers_of(types, "attn_qkv", T.Q6_K) == [0, 1, 4, 7, 10, 13, 14, 15]


def test_q2_k_s_needs_importance_where_it_has_two_bits() -> None:
    choice = Choice("Q2_K_S")
    assert needs_importance("blk.3.attn_q.weight", T.Q2_K, choice)
    assert not needs_importance("blk.3.attn_v.weight", T.Q4_K, choice)
    assert not needs_importance("token_embd.weight", T.Q2_K, choice)
    assert not needs_importance("blk.3.attn_q.weight", T.Q2_K, Choice("Q2_K"))


@pytest.mark.parametrize(
    ("name", "embedding", "output", "tied"),
    [
        ("IQ1_S", T.Q2_K, T.Q5_K, T.Q5_K), ("IQ2_XXS", T.Q2_K, T.Q5_K, T.Q5_K), ("IQ2_M", T.IQ3_S, T.Q5_K, T.Q5_K),
        ("IQ3_XXS", T.IQ3_S, T.Q5_K, T.Q5_K), ("IQ3_XS", T.IQ3_S, T.Q6_K, T.Q6_K), ("TQ1_0", T.Q4_K, T.Q6_K, T.Q6_K),
        ("Q1_0", T.Q1_0, T.Q6_K, T.Q6_K), ("MXFP4", T.Q8_0, T.Q8_0, T.Q8_0),
    ],
)  # fmt: skip
def test_embeddings_and_outputs_of_few_bits(name: str, embedding: T, output: T, tied: T) -> None:
    types = choose_types(model(8), facts(8), Choice(name))
    assert (types["token_embd.weight"], types["output.weight"]) == (embedding, output)
    assert choose_types(model(8, tied=True), facts(8), Choice(name))["token_embd.weight"] == tied


def test_iq3_xs_has_less_in_the_middle() -> None:
    types = choose_types(model(16), facts(16), Choice("IQ3_XS"))
    for part in ("ffn_gate.", "ffn_up."):
        assert layers_of(types, part, T.IQ3_XXS) == list(range(2, 14))
    assert len(layers_of(types, "attn_q.", T.IQ3_XXS)) == len(layers_of(types, "attn_k.", T.IQ3_XXS)) == 16


def test_types_of_few_bits_need_importance_wherever_they_are_asked_for() -> None:
    for type in (T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS):
        assert needs_importance("blk.3.attn_q.weight", type, Choice("Q4_K_M"))
        assert not needs_importance("output.weight", type, Choice("Q4_K_M"))
    assert not needs_importance("blk.3.attn_q.weight", T.IQ3_S, Choice("IQ3_S"))


def test_importance_changes_a_few_choices() -> None:
    assert choose_types(model(16), facts(16, importance=True), Choice("Q4_0"))["blk.0.ffn_down.weight"] == T.Q4_1
    assert choose_types(model(16), facts(16, importance=True), Choice("IQ4_XS"))["blk.0.ffn_down.weight"] == T.IQ4_XS


def test_a_model_of_seventy_billion_has_finer_values() -> None:
    types = choose_types(model(80), Facts("llama", 80, 64, 8, 0), Choice("Q3_K_S"))
    assert types["blk.0.attn_v.weight"] == T.Q5_K


def test_the_order_in_the_file_does_not_matter() -> None:
    layout = model(16)
    backwards = dict(reversed(layout.items()))
    types = choose_types(backwards, facts(16), Choice("Q4_K_M"))
    assert types == choose_types(layout, facts(16), Choice("Q4_K_M"))
    assert list(types) == list(backwards)


def test_pure_means_one_type() -> None:
    types = choose_types(model(8), facts(8), Choice("Q4_K_M", pure=True))
    assert set(types.values()) == {T.Q4_K, T.F32}


def test_the_users_word_comes_first() -> None:
    choice = Choice("Q4_K_M", output=T.Q8_0, embedding=T.F32, overrides=[(re.compile(r"ffn_(up|gate)"), T.Q2_K)])
    types = choose_types(model(8), facts(8), choice)
    assert types["output.weight"] == T.Q8_0
    assert types["token_embd.weight"] == T.F32
    assert types["blk.3.ffn_up.weight"] == types["blk.3.ffn_gate.weight"] == T.Q2_K
    assert types["blk.3.attn_q.weight"] == T.Q4_K


def test_copy_changes_nothing() -> None:
    layout = model(2)
    assert choose_types(layout, facts(2), Choice("COPY")) == {name: type for name, (type, _) in layout.items()}


@pytest.mark.parametrize(
    ("type", "row", "expected"),
    [
        (T.Q4_K, 512, T.Q4_K), (T.Q4_K, 576, T.Q5_0), (T.Q5_K, 576, T.Q5_1), (T.Q6_K, 576, T.Q8_0),
        (T.Q2_K, 576, T.Q4_0), (T.Q3_K, 576, T.Q4_0), (T.IQ4_XS, 576, T.IQ4_NL), (T.Q4_K, 100, T.F16),
        (T.Q8_0, 100, T.F16), (T.Q8_0, 96, T.Q8_0), (T.IQ2_XS, 576, T.IQ4_NL), (T.IQ3_S, 96, T.IQ4_NL),
        (T.TQ2_0, 576, T.Q4_0), (T.NVFP4, 96, T.IQ4_NL), (T.Q1_0, 192, T.Q4_0), (T.Q2_0, 96, T.Q4_0),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_fall_back(type: T, row: int, expected: T) -> None:
    assert fitting_type(type, row) == expected


def test_small_and_strange_tensors_stay() -> None:
    assert is_quantisable("blk.0.attn_q.weight", (64, 64), T.F16)
    for name, shape in [
        ("blk.0.attn_norm.weight", (64,)), ("blk.0.attn_q.bias", (64, 64)), ("blk.0.ffn_gate_inp.weight", (8, 64)),
        ("rope_freqs.weight", (1, 64)), ("position_embd.weight", (64, 64)), ("blk.0.ssm_conv1d.weight", (64, 4)),
    ]:  # fmt: skip
        assert not is_quantisable(name, shape, T.F32)


def test_names_of_mixes() -> None:
    assert file_type_name("q4_k_m") == "Q4_K_M"
    assert file_type_name("Q4_K") == "Q4_K_M"
    assert file_type_name("copy") == "COPY"
    with pytest.raises(ValueError, match="'q9' is no type: it can be F32, F16"):
        file_type_name("q9")
