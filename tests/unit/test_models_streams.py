"""Models with several residual streams, or copies of one, and with rows for last tokens or older positions: Kimi K3,
GLM-5.3-Flash, DeepSeek V4 and Qwen3.8-Flash-Next."""

from typing import Any

import numpy as np
import pytest
from test_models import N_EMBD, N_FF, N_VOCAB, Toy, of_type

from qrun.formats import FormatError, TensorInfo, TensorType
from qrun.models import build_graph
from qrun.models.graph import (
    Attention,
    Balance,
    Choose,
    Convolution,
    EmbedHashes,
    LinearAttention,
    MixByScore,
    MoE,
    Pool,
)
from tests.reference import forward
from tests.sketches import load, model

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
HEADS, DIM, TAPS, STREAMS, NARROW = 4, 8, 3, 4, 5
WIDTH = HEADS * DIM
LENGTH, PER_LENGTH = 3, 2


def add_delta(toy: Toy, layer: int) -> None:
    """Kimi delta attention."""
    block = f"blk.{layer}"
    for part in "qkv":
        toy.add(f"{block}.attn_{part}.weight", WIDTH, N_EMBD)
        toy.add(f"{block}.ssm_conv1d_{part}.weight", WIDTH, 1, TAPS)
    for name, shape in {
        "ssm_a": (HEADS,), "ssm_dt.bias": (WIDTH,), "ssm_f_a.weight": (DIM, N_EMBD), "ssm_f_b.weight": (WIDTH, DIM),
        "ssm_beta.weight": (HEADS, N_EMBD), "ssm_norm.weight": (DIM,), "ssm_g_a.weight": (DIM, N_EMBD),
        "ssm_g_b.weight": (WIDTH, DIM), "attn_output.weight": (N_EMBD, WIDTH),
    }.items():  # fmt: skip
        toy.add(f"{block}.{name}", *shape)


def with_delta(architecture: str, n_layer: int, **more: Any) -> Toy:
    keys: dict[str, Any] = {
        "attention.head_count_kv": np.zeros(n_layer, np.int32), "kda.head_dim": DIM, "kda.gate_lower_bound": -5.0,
        "ssm.conv_kernel": TAPS, "leading_dense_block_count": n_layer,
    }  # fmt: skip
    toy = Toy(architecture, n_layer, **keys | more)
    for layer in range(n_layer):
        add_delta(toy, layer)
    return toy


def kimi_k3(every: int, n_layer: int = 5, **more: Any) -> Toy:
    sizes = {"attn_res.block_size": every, "activation.situ_beta": 4.0, "activation.situ_linear_beta": 25.0}
    toy = with_delta("kimi-k3", n_layer, **sizes | more)
    for layer in range(n_layer):
        toy.add(f"blk.{layer}.attn_res_score.weight", N_EMBD)
        toy.add(f"blk.{layer}.ffn_res_score.weight", N_EMBD)
    toy.add("output_res_score.weight", N_EMBD)
    return toy


def glm5_next(**more: Any) -> Toy:
    sizes: dict[str, Any] = {
        "attention.indexer.top_k": 128, "hyper_connection.count": STREAMS, "hyper_connection.epsilon": 1e-6,
        "hyper_connection.sinkhorn_iterations": 3, "rope.dimension_count": 0,
    }  # fmt: skip
    toy = with_delta("glm5-next", 2, **sizes | more)
    toy.add("output.weight", N_VOCAB, N_EMBD)
    for name in ("blk.0.hc_attn", "blk.0.hc_ffn", "blk.1.hc_attn", "blk.1.hc_ffn"):
        toy.add(f"{name}_fn.weight", (2 + STREAMS) * STREAMS, STREAMS * N_EMBD)
        toy.add(f"{name}_base.weight", (2 + STREAMS) * STREAMS)
        toy.add(f"{name}_scale.weight", 3)
    return toy


def qwen4exp(**more: Any) -> Toy:
    count = (LENGTH - 1) * PER_LENGTH
    sizes: dict[str, Any] = {
        "ssm.conv_kernel": TAPS, "ssm.state_size": DIM, "ssm.inner_size": WIDTH, "ssm.time_step_rank": HEADS,
        "ssm.group_count": 2, "hyper_connection.count": STREAMS, "hyper_connection.low_rank": NARROW,
        "attention.recurrent_layers": np.array([1, 0], np.int32), "attention.indexer.top_k": 128,
        "attention.compress_ratios": np.array([4, 4], np.int32), "expert_feed_forward_length": N_FF,
        "expert_used_count": 1,
        "ple.layers": np.array([0], np.int32), "ple.ngram_size": LENGTH, "ple.heads_per_ngram": PER_LENGTH,
        "ple.conv_kernel": 4, "ple.eos_token_id": 0, "embedding_length_per_layer_input": N_EMBD // count,
        "ple.layer_multipliers": np.array([3, 5, 7], np.uint64), "ple.head_offsets": np.arange(count) * 20,
        "ple.head_vocab_sizes": np.full(count, 20),
    }  # fmt: skip
    toy = Toy("qwen4exp", 2, 2, **sizes | more)
    toy.add("per_layer_token_embd.weight", 20 * count, N_EMBD // count)
    toy.add("blk.1.attn_q.weight", 2 * 4 * 16, N_EMBD)
    for name, shape in {
        "attn_qkv.weight": (2 * 2 * DIM + WIDTH, N_EMBD), "attn_gate.weight": (WIDTH, N_EMBD), "ssm_dt.bias": (HEADS,),
        "ssm_conv1d.weight": (2 * 2 * DIM + WIDTH, TAPS), "ssm_a": (HEADS,), "ssm_beta.weight": (HEADS, N_EMBD),
        "ssm_alpha.weight": (HEADS, N_EMBD), "ssm_norm.weight": (DIM,), "ssm_out.weight": (N_EMBD, WIDTH),
        "ple_key.weight": (STREAMS * N_EMBD, N_EMBD), "ple_value.weight": (N_EMBD, N_EMBD),
        "ple_norm_key.weight": (STREAMS, N_EMBD), "ple_norm_query.weight": (STREAMS, N_EMBD),
        "ple_norm_conv.weight": (STREAMS * N_EMBD,), "ple_conv1d.weight": (STREAMS * N_EMBD, 4),
    }.items():  # fmt: skip
        toy.add(f"blk.0.{name}", *shape)
    names = [f"blk.{layer}.hc_{part}" for layer in range(2) for part in ("attn", "ffn")]
    for name in (*names, "output_hc"):
        toy.add(f"{name}_norm.weight", STREAMS, N_EMBD)
        toy.add(f"{name}_down.weight", NARROW, STREAMS * N_EMBD)
        toy.add(f"{name}_up.weight", STREAMS * N_EMBD, NARROW)
        toy.add(f"{name}_inject.weight", STREAMS, STREAMS * N_EMBD)
    return toy


@pytest.mark.parametrize(("every", "copies"), [(0, []), (1, [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]), (3, [1] * 6 + [2] * 4)])
def test_kimi_k3_reads_copies_of_the_stream_by_how_well_they_fit(every: int, copies: list[int]) -> None:
    """Nothing is copied before the first layer; the second part of a layer and the next layer see its copy."""
    graph = kimi_k3(every).graph(64)
    found = [mix.x.width // N_EMBD for mix in of_type(graph, MixByScore)]
    assert found == copies
    assert np.isfinite(forward(graph, TOKENS)).all()


def test_kimi_k3_turns_the_sign_of_what_decays_are_made_of() -> None:
    """The file has the factors of other Kimi models, which are negative."""
    toy = kimi_k3(0, 1)
    decays = [operation.decay for operation in of_type(toy.graph(), LinearAttention)]
    factors = toy.tensors["blk.0.ssm_a"].raw.view(np.float32)
    weights = [vars(operation).get("weight") for operation in toy.graph().operations]
    assert len(decays) == 1
    assert any(isinstance(one, np.ndarray) and np.array_equal(one, -np.repeat(factors, DIM)) for one in weights)


def test_biases_of_what_goes_into_convolutions_count_nothing() -> None:
    """So it is in the reference engine."""
    toy = kimi_k3(0, 1)
    expected = forward(toy.graph(), TOKENS)
    for part in "qkv":
        toy.add(f"blk.0.attn_{part}.bias", WIDTH)
    assert np.array_equal(forward(toy.graph(), TOKENS), expected)


def test_glm5_next_balances_what_streams_exchange() -> None:
    graph = glm5_next().graph(64)
    assert [balance.rounds for balance in of_type(graph, Balance)] == [3] * 4
    assert np.isfinite(forward(graph, TOKENS)).all()


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("attention.indexer.kpool_select_tail", False, "is False: not to see the last tokens is not supported"),
        ("rope.dimension_count", 8, "is 8, expected 0 to 0"),
        ("hyper_connection.count", 1, "is 1, expected 2 to 64"),
        ("hyper_connection.count", 3, "tensor blk.0.hc_attn_fn.weight has shape"),
    ],
)
def test_what_glm5_next_cannot_be_is_refused(key: str, value: Any, reason: str) -> None:
    assert reason in glm5_next(**{key: value}).error()


def test_qwen4exp_has_rows_for_the_last_tokens_in_one_layer() -> None:
    graph = qwen4exp().graph(64)
    (rows,) = of_type(graph, EmbedHashes)
    assert rows.hashes.multipliers == (3, 5, 7)
    # Taps as far apart as the rows look back.
    spread = max((len(convolution.weight) for convolution in of_type(graph, Convolution)), default=0)
    assert spread == 3 * LENGTH + 1
    logits, other = forward(graph, TOKENS), forward(graph, [7, *TOKENS[1:]])
    assert np.isfinite(logits).all() and np.abs(logits[2] - other[2]).max() > 1e-5


def test_qwen4exp_without_a_table_or_sparse_attention() -> None:
    keys: dict[str, Any] = {"ple.layers": None, "attention.compress_ratios": 0, "attention.indexer.top_k": None}
    graph = qwen4exp(**keys).graph(64)
    assert not of_type(graph, EmbedHashes) and not of_type(graph, Choose)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("ple.layers", np.array([0, 1], np.int32), "ple.layers are 2: more than one is not supported"),
        ("ple.layers", np.array([2], np.int32), "ple.layers is 2, expected 0 to 1"),
        ("ple.head_offsets", np.array([0, 20, 40, 61]), "ple.head_offsets go beyond the 80 rows"),
        ("ple.head_vocab_sizes", np.array([20, 20, 20, 0]), "ple.head_vocab_sizes is 0"),
        ("ple.head_vocab_sizes", np.array([20, 20, 20]), "is not an array of 4 whole numbers"),
        ("ple.layer_multipliers", np.array([1.0, 2.0, 3.0]), "is not an array of 3 whole numbers"),
        ("ple.heads_per_ngram", 60, "more than 64 rows are not supported"),
        ("ple.eos_token_id", N_VOCAB, "ple.eos_token_id is 40"),
        ("embedding_length_per_layer_input", 7, "is 7, and 4 rows are not 32 wide"),
    ],
)
def test_tables_that_do_not_fit_are_refused(key: str, value: Any, reason: str) -> None:
    assert reason in qwen4exp(**{key: value}).error()


def deepseek4(*ratios: int, **more: Any) -> Toy:
    """Heads of 12 dimensions, of which 4 turn; two groups of two heads."""
    heads, dim, rank, groups, n_expert, n_used, n = 4, 12, 6, 2, 4, 2, len(ratios)
    sizes: dict[str, Any] = {
        "attention.head_count": heads, "attention.head_count_kv": 1, "attention.key_length": dim,
        "attention.value_length": dim, "rope.dimension_count": 4, "attention.q_lora_rank": 5,
        "attention.output_group_count": groups, "attention.output_lora_rank": rank, "attention.sliding_window": 3,
        "attention.compress_ratios": np.array(ratios, np.int32), "attention.indexer.top_k": 64,
        "attention.compress_rope_freq_base": 160000.0, "hyper_connection.count": STREAMS,
        "hyper_connection.epsilon": 1e-6, "hyper_connection.sinkhorn_iterations": 3, "hash_layer_count": 1,
        "expert_count": n_expert, "expert_used_count": n_used, "expert_shared_count": 1, "expert_gating_func": 4,
        "expert_feed_forward_length": N_FF, "swiglu_clamp_exp": 1.5, "expert_weights_norm": True,
    }  # fmt: skip
    toy = Toy("deepseek4", n, **sizes | more)
    toy.add("output.weight", N_VOCAB, N_EMBD)
    hyper = {"output_hc": (STREAMS, 1)}
    for layer, ratio in enumerate(ratios):
        block = f"blk.{layer}"
        hyper |= {f"{block}.hc_{part}": ((2 + STREAMS) * STREAMS, 3) for part in ("attn", "ffn")}
        wide = dim * (2 if ratio == 4 else 1)
        shapes: dict[str, tuple[int, ...]] = {
            "attn_q_a.weight": (5, N_EMBD), "attn_q_a_norm.weight": (5,), "attn_q_b.weight": (heads * dim, 5),
            "attn_kv.weight": (dim, N_EMBD), "attn_kv_a_norm.weight": (dim,), "attn_sinks.weight": (heads,),
            "attn_output_a.weight": (groups * rank, heads * dim // groups),
            "attn_output_b.weight": (N_EMBD, groups * rank), "ffn_gate_inp.weight": (n_expert, N_EMBD),
            "exp_probs_b.bias": (n_expert,),
        }  # fmt: skip
        if ratio:
            shapes |= {
                "attn_compressor_kv.weight": (wide, N_EMBD), "attn_compressor_gate.weight": (wide, N_EMBD),
                "attn_compressor_ape.weight": (ratio, wide), "attn_compressor_norm.weight": (dim,),
            }  # fmt: skip
        for part, shape in (("gate", (N_FF, N_EMBD)), ("up", (N_FF, N_EMBD)), ("down", (N_EMBD, N_FF))):
            shapes |= {f"ffn_{part}_exps.weight": (n_expert, *shape), f"ffn_{part}_shexp.weight": shape}
        for name, shape in shapes.items():
            toy.add(f"{block}.{name}", *shape)
    for name, (width, n_scales) in hyper.items():
        toy.add(f"{name}_fn.weight", width, STREAMS * N_EMBD)
        toy.add(f"{name}_base.weight", width)
        toy.add(f"{name}_scale.weight", n_scales)
    table = np.array([[i % n_expert, (i + 1) % n_expert] for i in range(N_VOCAB)], np.int32)
    return with_table(toy, table)


def with_table(toy: Toy, table: Any, type: TensorType = TensorType.I32) -> Toy:
    name, raw = "blk.0.ffn_gate_tid2eid.weight", table.reshape(-1).view(np.uint8)
    toy.tensors[name] = TensorInfo(name, type, table.shape, raw.size, 0, toy.path, raw)
    return toy


def test_deepseek4_has_entries_beside_its_window_and_experts_by_token() -> None:
    graph = deepseek4(0, 4, 128).graph()
    plain, fine, coarse = of_type(graph, Attention)
    assert plain.entries is None and fine.entries is not None and coarse.entries is not None
    layers = graph.cache_layers
    assert [layers[attention.layer].window for attention in (plain, fine, coarse)] == [3, 3, 3]
    assert [layers[attention.entries_layer or 0].every for attention in (fine, coarse)] == [4, 128]
    assert [(pool.every, pool.overlap, layers[pool.layer].window) for pool in of_type(graph, Pool)] == [
        (4, True, 8), (128, False, 128),
    ]  # fmt: skip
    by_token, routed, _ = of_type(graph, MoE)
    assert by_token.by_token is not None and by_token.selection_bias is None
    assert routed.by_token is None and routed.selection_bias is not None and routed.gating == "sqrt_softplus"
    assert {moe.kind for moe in (by_token, routed)} == {"clamped_silu"}


def test_what_deepseek4_sees_of_older_positions_is_their_entries() -> None:
    """With a window of 3, position 9 sees 7 to 9, and two entries of 4: of another first token it hears by those."""
    other = [8, *TOKENS[1:]]
    for ratio, hears in ((0, False), (4, True), (128, False)):
        graph = deepseek4(ratio, hash_layer_count=0).graph()
        same = np.allclose(forward(graph, TOKENS)[-1], forward(graph, other)[-1], rtol=1e-9, atol=1e-9)
        assert same != hears


@pytest.mark.parametrize("table", [np.full((N_VOCAB, 2), 4, np.int32), np.full((N_VOCAB, 2), -1, np.int32)])
def test_a_table_of_experts_that_are_not_there_is_refused(table: Any) -> None:
    with pytest.raises(FormatError, match=r"ffn_gate_tid2eid\.weight has numbers outside of 0 to 3"):
        with_table(deepseek4(0), table).graph()


def test_a_table_of_experts_of_another_type_or_shape_is_refused() -> None:
    for table, kind in (
        (np.zeros((N_VOCAB, 2), np.float32), TensorType.F32), (np.zeros((N_VOCAB, 3), np.int32), TensorType.I32),
    ):  # fmt: skip
        with pytest.raises(FormatError, match=r"ffn_gate_tid2eid\.weight is .*, expected I32"):
            with_table(deepseek4(0), table, kind).graph()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention.compress_ratios": np.array([8], np.int32)}, "compress_ratios has 8, expected 0, 4 or 128"),
        ({"attention.compress_ratios": np.array([], np.int32)}, "compress_ratios is not an array of 1"),
        ({"attention.sliding_window": 0}, "needs one key and value head"),
        ({"attention.output_group_count": 3}, "output_group_count is 3, which does not divide 4 heads"),
        ({"expert_gating_func": 3}, "expert_gating_func makes a softmax_of_chosen, which is not supported"),
        ({"attention.indexer.top_k": None}, "indexer.top_k is missing"),
    ],
)
def test_what_deepseek4_cannot_be_is_refused(keys: dict[str, Any], message: str) -> None:
    ratio = 4 if "attention.indexer.top_k" in keys else 0
    with pytest.raises(FormatError, match=message):
        deepseek4(ratio, **keys).graph()


@pytest.mark.parametrize("name", ["kimi-k3-moe-v1", "deepseek4-moe-v1"])
def test_caches_of_models_whose_results_depend_on_every_digit_have_all(name: str) -> None:
    layers = build_graph(model(load()[name]), 64).cache_layers
    assert layers and all(layer.precise or layer.exact for layer in layers)
