"""What the small models of the conformance tests do not show of the families."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from test_models import HEAD_DIM, N_EMBD, N_FF, N_HEADS, N_KV_HEADS, N_VOCAB, Toy, of_type

from qrun.formats import FormatError, TensorInfo, TensorType
from qrun.models.adapter import Adapter, adapt
from qrun.models.graph import ActivateAlone, Attention, Embed, Gate, GaussianTopK, LayerNorm, Linear, MoE, Rope, Scale
from qrun.models.transformer import alibi_slopes
from tests.reference import forward

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def test_blocks_that_only_predict_further_tokens_are_not_run() -> None:
    """They are counted in `block_count`, and arrays have values for them too."""
    plain = Toy("glm4", n_layer=3)
    for layer in range(3):
        plain.add(f"blk.{layer}.ffn_up.weight", 2 * N_FF, N_EMBD)
    counted = np.array([N_FF, N_FF, N_FF, 7], np.int32)
    more = Toy("glm4", n_layer=3, block_count=4, nextn_predict_layers=1, feed_forward_length=counted)
    more.tensors = dict(plain.tensors)
    more.add("blk.3.attn_norm.weight", N_EMBD)
    more.add("blk.3.nextn.eh_proj.weight", N_EMBD, 2 * N_EMBD)
    assert len(more.graph().cache_layers) == 3
    assert np.array_equal(forward(more.graph(), TOKENS), forward(plain.graph(), TOKENS))
    assert "nextn_predict_layers is 4, expected 0 to 3" in more.set({"nextn_predict_layers": 4}).error()


def test_deci_may_lack_attention_and_leaves_out_layers_without_a_feed_forward_network() -> None:
    heads, kv_heads, widths = [4, 4, 0, 4], [2, 0, 0, 2], [N_FF, N_FF, N_FF, 0]
    toy = Toy("deci", n_layer=4)
    toy.set({
        "attention.head_count": np.array(heads, np.int32), "attention.head_count_kv": np.array(kv_heads, np.int32),
        "feed_forward_length": np.array(widths, np.int32),
    })  # fmt: skip
    toy.add("blk.1.attn_output.weight", N_EMBD, N_EMBD)
    graph = toy.graph()
    assert len(graph.cache_layers) == len(of_type(graph, Attention)) == 1
    names = [linear.weight.name for linear in of_type(graph, Linear)]
    assert "blk.1.attn_output.weight" in names and "blk.1.attn_q.weight" not in names
    assert not any(name.startswith(("blk.2.attn", "blk.3")) for name in names)
    assert forward(graph, TOKENS).shape == (8, N_VOCAB)


def test_no_other_architecture_may_lack_heads() -> None:
    toy = Toy("llama").set({"attention.head_count_kv": np.array([2, 0], np.int32)})
    assert "attention.head_count_kv is 0, expected 1 to 4096" in toy.error()


def test_queries_of_mistral_grow_beyond_the_trained_context() -> None:
    keys = {"rope.scaling.original_context_length": 4, "attention.temperature_scale": 0.1}
    graph = Toy("mistral3", **keys).graph()
    query, key = of_type(graph, Rope)[:2]
    assert key.temperature is None and query.temperature is not None
    expected = 1 + 0.1 * np.log(1 + np.array([0, 0, 1, 1, 2]))
    np.testing.assert_allclose(query.temperature.at(np.array([0, 3, 4, 7, 8])), expected)
    same = Toy("mistral3", **keys | {"rope.scaling.original_context_length": 8}).graph()
    outs = [forward(g, TOKENS) for g in (graph, same, Toy("mistral3").graph())]
    assert np.array_equal(outs[1], outs[2]) and np.array_equal(outs[0][:4], outs[1][:4])
    assert np.abs(outs[0][4:] - outs[1][4:]).max() > 1e-4


def test_the_magnitude_of_yarn_is_damped_where_a_file_says_so() -> None:
    keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": 16.0}
    magnitudes = [
        of_type(Toy("mistral3", **keys, **{"rope.scaling.yarn_log_multiplier": damping}).graph(), Rope)[0].magnitude
        for damping in (0.0, 1.0)
    ]
    assert magnitudes == pytest.approx([1 + 0.1 * np.log(16), 1.0])


@pytest.mark.parametrize("architecture", ["olmo2", "mellum"])
def test_only_layers_that_see_everything_are_stretched(architecture: str) -> None:
    keys: dict[str, Any] = {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "attention.sliding_window": 3, "expert_used_count": 1,
        "rope.scaling.original_context_length": 128,
    }  # fmt: skip
    toy = Toy(architecture, n_layer=4, n_expert=2 if architecture == "mellum" else 0, **keys)
    if architecture == "olmo2":
        for layer in range(4):
            toy.add(f"blk.{layer}.attn_q_norm.weight", N_HEADS * HEAD_DIM)
            toy.add(f"blk.{layer}.attn_k_norm.weight", N_KV_HEADS * HEAD_DIM)
    graph = toy.graph()
    assert [cache.window for cache in graph.cache_layers] == [3, 3, 3, None]
    slowest = [float(rope.frequencies[-1]) for rope in of_type(graph, Rope)[::2]]
    plain = 10000.0 ** (-2 * (HEAD_DIM // 2 - 1) / HEAD_DIM)
    assert slowest == pytest.approx([plain] * 3 + [plain / 8])
    assert [rope.magnitude for rope in of_type(graph, Rope)[::2]] == pytest.approx([1.0] * 3 + [1 + 0.1 * np.log(8)])


def test_large_exaone_turns_only_where_it_sees_a_window() -> None:
    graph = Toy("exaone4", n_layer=64).graph()
    windows = [cache.window for cache in graph.cache_layers]
    assert windows == [4096, 4096, 4096, None] * 16
    assert len(of_type(graph, Rope)) == 2 * 48
    assert len(of_type(Toy("exaone4").graph(), Rope)) == 4


def test_nanbeige_runs_its_layers_again_with_caches_of_their_own() -> None:
    graph = Toy("nanbeige", num_loops=3).graph()
    assert [attention.layer for attention in of_type(graph, Attention)] == list(range(6))
    without = Toy("nanbeige", num_loops=3, skip_loop_final_norm=True).graph()
    assert len(graph.operations) - len(without.operations) == 2
    assert "num_loops is 1000, expected 1 to 256" in Toy("nanbeige", num_loops=1000).error()


def test_experts_that_the_file_does_not_describe_are_refused() -> None:
    assert "mellum.expert_count is 0, and this architecture has experts" in Toy("mellum").error()
    toy = Toy("bailingmoe", n_expert=4, expert_used_count=2, expert_shared_count=1)
    assert "bailingmoe.expert_feed_forward_length is missing" in toy.error()


# Families with operations of their own


def test_alibi_slopes_are_a_geometric_series_with_others_between() -> None:
    np.testing.assert_allclose(alibi_slopes(8, 8.0), 2.0 ** -np.arange(1, 9))
    expected = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    np.testing.assert_allclose(alibi_slopes(6, 8.0), expected)


@pytest.mark.parametrize(("n_layer", "turns", "falls"), [(2, False, False), (32, True, False), (40, False, True)])
def test_baichuan_knows_its_two_sizes(n_layer: int, turns: bool, falls: bool) -> None:
    graph = Toy("baichuan", n_layer=n_layer).graph()
    assert bool(of_type(graph, Rope)) == turns
    slopes = of_type(graph, Attention)[-1].slopes
    assert (slopes is not None) == falls
    if falls:
        np.testing.assert_allclose(slopes, alibi_slopes(N_HEADS, 8.0))


def test_learned_positions_bound_the_context() -> None:
    toy = Toy("gpt2", **{"attention.layer_norm_epsilon": 1e-5})
    toy.add("position_embd.weight", 128, N_EMBD)
    assert len(of_type(toy.graph(128), Embed)) == 2
    with pytest.raises(FormatError, match=r"gpt2\.context_length is 128: there are no positions for 129 tokens"):
        toy.graph(129)
    toy.add("position_embd.weight", 127, N_EMBD)
    assert "tensor position_embd.weight has shape (127, 32), expected (128, 32)" in toy.error()


def test_command_r_plus_norms_each_head_by_a_weight_of_its_own() -> None:
    toy = Toy("command-r", n_layer=64, **{"attention.layer_norm_epsilon": 1e-5, "logit_scale": 0.25})
    for layer in range(64):
        toy.add(f"blk.{layer}.attn_q_norm.weight", N_HEADS, HEAD_DIM)
        toy.add(f"blk.{layer}.attn_k_norm.weight", N_KV_HEADS, HEAD_DIM)
    norms = of_type(toy.graph(), LayerNorm)
    assert [norm.groups for norm in norms[:3]] == [1, N_HEADS, N_KV_HEADS]
    assert norms[1].weight.shape == (N_HEADS, HEAD_DIM)
    assert of_type(toy.graph(), Scale)[-1].factor == 0.25
    few = Toy("command-r", **{"attention.layer_norm_epsilon": 1e-5}).graph()
    assert {norm.groups for norm in of_type(few, LayerNorm)} == {1}


@pytest.mark.parametrize("width", [N_HEADS, N_HEADS * HEAD_DIM])
def test_laguna_gates_heads_or_values(width: int) -> None:
    keys = {"leading_dense_block_count": 5, "attention.sliding_window": 4, "rope.dimension_count_swa": 8}
    toy = Toy("laguna", n_layer=5, **keys)
    for layer in range(5):
        toy.add(f"blk.{layer}.attn_gate.weight", width, N_EMBD)
    graph = toy.graph()
    assert [cache.window for cache in graph.cache_layers] == [None, 4, 4, 4, None]
    assert [rope.n_rot for rope in of_type(graph, Rope)[::2]] == [HEAD_DIM, 8, 8, 8, HEAD_DIM]
    assert {gate.gate.width for gate in of_type(graph, Gate)} == {width}
    toy.add("blk.0.attn_gate.weight", 7, N_EMBD)
    assert "tensor blk.0.attn_gate.weight has shape (7, 32), expected (64, 32)" in toy.error()


@pytest.mark.parametrize(("name", "gating"), [("gpt-oss", "softmax_of_chosen"), ("llama4", "sigmoid_of_chosen")])
def test_experts_that_are_chosen_by_the_logits_themselves(name: str, gating: str) -> None:
    keys: dict[str, Any] = {
        "expert_used_count": 2, "expert_feed_forward_length": N_FF, "expert_group_count": 4,
        "expert_group_used_count": 2, "attention.sliding_window": 4, "interleave_moe_layer_step": 1,
    }  # fmt: skip
    toy = Toy(name, n_expert=8, **keys)
    for layer in range(2):
        toy.add(f"blk.{layer}.attn_sinks.weight", N_HEADS)
        for matrix, shape in (("gate", (N_FF, N_EMBD)), ("up", (N_FF, N_EMBD)), ("down", (N_EMBD, N_FF))):
            toy.add(f"blk.{layer}.ffn_{matrix}_shexp.weight", *shape)
        toy.add(f"blk.{layer}.post_attention_norm.weight", N_EMBD)
    for moe in of_type(toy.graph(), MoE):
        assert (moe.gating, moe.normalize, moe.n_groups, moe.n_groups_used) == (gating, False, 4, 2)


@pytest.mark.parametrize("turned", [0, 4, HEAD_DIM])
def test_heads_of_deepseek_ocr_turn_as_a_whole(turned: int) -> None:
    keys = {"rope.dimension_count": turned, "expert_shared_count": 1, "leading_dense_block_count": 2}
    toy = Toy("deepseek2-ocr", **keys | {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    graph = toy.graph()
    plain = 10000.0 ** (-2 * np.arange(HEAD_DIM // 2) / HEAD_DIM)
    for rope in of_type(graph, Rope):
        assert rope.n_rot == HEAD_DIM and not rope.interleaved
        np.testing.assert_allclose(rope.frequencies, plain, rtol=1e-6)


def test_a_type_of_none_does_not_hold_for_layers_with_a_window() -> None:
    keys = {"rope.scaling.type": "none", "rope.scaling.factor": 4.0, "attention.sliding_window": 4}
    toy = Toy("gemma2", **keys)
    local, whole = of_type(toy.graph(), Rope)[0], of_type(toy.graph(), Rope)[-1]
    np.testing.assert_allclose(4 * local.frequencies, whole.frequencies, rtol=1e-6)


def test_of_refact_with_experts_only_the_activation_is_left() -> None:
    graph = Toy("refact", n_expert=4, expert_used_count=2).graph()
    assert [operation.kind for operation in of_type(graph, ActivateAlone)] == ["silu"] * 2
    assert not of_type(graph, MoE)


def test_experts_are_chosen_within_groups_that_the_file_gives() -> None:
    keys: dict[str, Any] = {
        "expert_used_count": 2, "expert_shared_count": 1, "expert_feed_forward_length": N_FF, "expert_group_count": 4,
        "expert_group_used_count": 2, "expert_gating_func": 2,
    }  # fmt: skip
    toy = Toy("bailingmoe2", n_expert=8, **keys)
    for layer in range(2):
        toy.add(f"blk.{layer}.exp_probs_b.bias", 8)
        for name, shape in (("gate", (N_FF, N_EMBD)), ("up", (N_FF, N_EMBD)), ("down", (N_EMBD, N_FF))):
            toy.add(f"blk.{layer}.ffn_{name}_shexp.weight", *shape)
    moe = of_type(toy.graph(), MoE)[0]
    assert (moe.n_groups, moe.n_groups_used, moe.gating) == (4, 2, "sigmoid") and moe.selection_bias is not None
    for changed, problem in (
        ({"expert_group_count": 3}, "expert_group_count is 3, which does not divide 8 experts"),
        ({"expert_group_used_count": 5}, "expert_group_used_count is 5, expected 1 to 4"),
        ({"expert_used_count": 5}, "expert_group_used_count is 2: they have too few experts to be chosen"),
        ({"expert_gating_func": 5}, "expert_gating_func is 5, expected 0 to 4"),
    ):
        assert problem in Toy("bailingmoe2", n_expert=8, **keys).set(changed).error()


def test_gemma4_shares_keys_and_values_with_the_last_layer_of_the_kind_that_has_some() -> None:
    sliding = np.array([1, 1, 0, 1, 1, 0], bool)
    keys: dict[str, Any] = {
        "attention.sliding_window": 3, "attention.sliding_window_pattern": sliding, "attention.shared_kv_layers": 3,
    }  # fmt: skip
    toy = Toy("gemma4", n_layer=6, **keys)
    toy.add("rope_freqs.weight", HEAD_DIM // 2)
    toy.tensors["rope_freqs.weight"].raw[:] = np.ones(HEAD_DIM // 2, np.float32).view(np.uint8)
    graph = toy.graph()
    attentions = of_type(graph, Attention)
    assert len(graph.cache_layers) == 3
    assert [attention.layer for attention in attentions] == [0, 1, 2, 1, 1, 2]
    assert [attention.k is None for attention in attentions] == [False] * 3 + [True] * 3
    toy.set({"attention.sliding_window_pattern": np.array([1, 0, 0, 1, 1, 0], bool)})
    assert "blk.3 shares keys and values with layer 1, whose heads are of another kind" in toy.error()


def test_groups_of_experts_have_to_be_whole() -> None:
    keys: dict[str, Any] = {"expert_used_count": 3, "expert_feed_forward_length": N_FF, "expert_group_scale": 0.5}
    toy = Toy("grovemoe", n_expert=8, experts_per_group=3, **keys)
    assert "grovemoe.experts_per_group is 3, which does not divide 8 experts" in toy.error()
    toy.set({"experts_per_group": 4})
    for layer in range(2):
        for name, shape in (("gate", (HEAD_DIM, N_EMBD)), ("up", (HEAD_DIM, N_EMBD)), ("down", (N_EMBD, HEAD_DIM))):
            toy.add(f"blk.{layer}.ffn_{name}_chexps.weight", 2, *shape)
    first, second = of_type(toy.graph(), MoE)[:2]
    assert (first.together, first.n_used, second.together, second.n_used) == (1, 3, 4, 2)
    assert second.x is first.out and second.router_x is first.x


def test_turns_of_stacks_have_to_make_all_layers() -> None:
    keys = {"hrm.layers_per_stack": 1, "hrm.h_cycles": 2, "hrm.l_cycles": 2}
    toy = Toy("hrm_text", n_layer=5, **keys)
    assert "hrm_text.block_count is 5, but all turns of the stacks have 6 layers" in toy.error()
    toy.set({"block_count": 6})
    toy.add("hrm.z_l_init", N_EMBD)
    for layer in range(2):
        toy.add(f"blk.{layer}.attn_gate.weight", N_HEADS * HEAD_DIM, N_EMBD)
    graph = toy.graph()
    assert [attention.layer for attention in of_type(graph, Attention)] == list(range(6))
    names = [operation.weight.name for operation in of_type(graph, Linear)]
    assert [name[4] for name in names if name.endswith("attn_q.weight")] == list("001001")


def test_gemma3n_shares_the_keys_and_values_of_two_layers() -> None:
    keys: dict[str, Any] = {"attention.sliding_window": 3, "embedding_length_per_layer_input": 4}
    toy = Toy("gemma3n", n_layer=22, **keys)
    count, layers = 4, 22
    toy.add("per_layer_token_embd.weight", N_VOCAB, 4 * layers)
    toy.add("per_layer_model_proj.weight", 4 * layers, N_EMBD)
    toy.add("per_layer_proj_norm.weight", 4)
    for name in ("altup_proj", "altup_unembd_proj"):
        toy.add(f"{name}.weight", count - 1, N_EMBD, N_EMBD)
    for layer in range(layers):
        shapes: dict[str, tuple[int, ...]] = {
            "inp_gate": (4, N_EMBD), "proj": (N_EMBD, 4), "post_norm": (N_EMBD,), "laurel_l": (5, N_EMBD),
            "laurel_r": (N_EMBD, 5), "laurel_post_norm": (N_EMBD,), "altup_router": (count, N_EMBD),
            "altup_router_norm": (N_EMBD,), "altup_predict_coef": (count * count, count),
            "altup_correct_coef": (count, count), "altup_correct_scale": (N_EMBD,),
        }  # fmt: skip
        for name, shape in shapes.items():
            toy.add(f"blk.{layer}.{name}.weight", *shape)
    graph = toy.graph()
    assert [attention.layer for attention in of_type(graph, Attention)] == [*range(20), 18, 18]
    assert len(of_type(graph, GaussianTopK)) == 10
    scales = np.array([1.5, -np.inf] * 11, np.float32)
    sparse = of_type(toy.set({"activation_sparsity_scale": scales}).graph(), GaussianTopK)
    assert len(sparse) == 11 and sparse[0].deviations == 1.5
    assert "altup.active_idx is 4, expected 0 to 3" in toy.set({"altup.active_idx": 4}).error()


def test_adapters_do_not_change_learned_positions() -> None:
    """Of embeddings only that of tokens has its pair the other way round."""
    toy = Toy("gpt2", **{"attention.layer_norm_epsilon": 1e-5})
    toy.add("position_embd.weight", 128, N_EMBD)
    pair = Toy("gpt2", n_layer=0)
    pair.tensors = {}
    pair.add("position_embd.weight.lora_a", 4, N_EMBD)
    pair.add("position_embd.weight.lora_b", 128, 4)
    pair.metadata |= {"general.type": "adapter", "adapter.type": "lora"}
    adapter: Adapter[Any] = Adapter(cast(Any, pair))
    with pytest.raises(FormatError, match=r"the model has no matrix 'position_embd\.weight'"):
        adapt(toy.graph(), [adapter])


def halved(tensor: TensorInfo) -> TensorInfo:
    """The tensor in float16."""
    raw = tensor.dequantize().astype(np.float16).reshape(-1).view(np.uint8)
    return TensorInfo(tensor.name, TensorType.F16, tensor.shape, raw.size, 0, Path("toy.gguf"), raw)


def test_tokens_see_those_behind_them_where_the_file_says_so() -> None:
    for architecture, keys, causal in (
        ("llama", {}, True),
        ("llama", {"attention.causal": False}, False),
        ("qwen3", {"attention.causal": False}, False),
        ("dream", {"attention.causal": True}, False),
        ("llama-embed", {"attention.causal": True}, True),
        ("llama-embed", {}, False),
    ):
        toy = Toy(architecture, **keys)
        assert all(layer.precise for layer in toy.graph().cache_layers)  # the file is in float32
        toy.tensors["blk.0.ffn_up.weight"] = halved(toy.tensors["blk.0.ffn_up.weight"])
        graph = toy.graph()
        assert graph.causal is causal and all(layer.precise is not causal for layer in graph.cache_layers)
        assert graph.embeds is (architecture == "llama-embed")


def test_where_a_window_would_have_to_reach_behind_is_said() -> None:
    windows = {"attention.sliding_window": 3, "attention.sliding_window_pattern": np.array([1, 1], bool)}
    toy = Toy("llama", **windows, **{"attention.causal": False})
    assert "attention.causal is False, with windows: that is not supported" in toy.error()
