"""Models with Mamba mixers: how their layers are told apart, what their files may lack, and what is refused."""

from typing import Any

import numpy as np
import pytest
from test_models import HEAD_DIM, N_EMBD, N_FF, N_HEADS, N_KV_HEADS, N_VOCAB, Toy, of_type

from qrun.engine.program.runtime import Runtime
from qrun.formats import TensorInfo, TensorType
from qrun.models.adapter import Adapter, adapt
from qrun.models.graph import Attention, Convolution, Linear, LinearAttention, MoE, RMSNorm, SelectiveScan
from tests.reference import forward

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]
HEADS, DIM, GROUPS, STATE, TAPS = 4, 12, 2, 6, 3
WIDTH = HEADS * DIM


def put(toy: Toy, name: str, values: np.ndarray) -> None:
    """A tensor of these values."""
    raw = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8)
    toy.tensors[name] = TensorInfo(name, TensorType.F32, values.shape, raw.size, 0, toy.path, raw)


def get(toy: Toy, name: str) -> np.ndarray:
    tensor = toy.tensors[name]
    return tensor.raw.view(np.float32).reshape(tensor.shape).copy()


def add_mamba2(toy: Toy, layer: int, *, groups: int = GROUPS, normed: bool = True) -> None:
    block, mixed = f"blk.{layer}", WIDTH + 2 * groups * STATE
    toy.add(f"{block}.ssm_in.weight", WIDTH + mixed + HEADS, N_EMBD)
    toy.add(f"{block}.ssm_conv1d.weight", mixed, TAPS)
    toy.add(f"{block}.ssm_conv1d.bias", mixed)
    toy.add(f"{block}.ssm_dt.bias", HEADS)
    put(toy, f"{block}.ssm_a", -np.abs(toy.random.standard_normal((HEADS, 1))))
    toy.add(f"{block}.ssm_d", HEADS, 1)
    toy.add(f"{block}.ssm_out.weight", N_EMBD, WIDTH)
    if normed:
        toy.add(f"{block}.ssm_norm.weight", groups, WIDTH // groups)


def add_mamba(toy: Toy, layer: int, rank: int = 3) -> None:
    block = f"blk.{layer}"
    toy.add(f"{block}.ssm_in.weight", 2 * WIDTH, N_EMBD)
    toy.add(f"{block}.ssm_conv1d.weight", WIDTH, TAPS)
    toy.add(f"{block}.ssm_conv1d.bias", WIDTH)
    toy.add(f"{block}.ssm_x.weight", rank + 2 * STATE, WIDTH)
    toy.add(f"{block}.ssm_dt.weight", WIDTH, rank)
    toy.add(f"{block}.ssm_dt.bias", WIDTH)
    put(toy, f"{block}.ssm_a", -np.abs(toy.random.standard_normal((WIDTH, STATE))))
    toy.add(f"{block}.ssm_d", WIDTH)
    toy.add(f"{block}.ssm_out.weight", N_EMBD, WIDTH)


SIZES: dict[str, Any] = {
    "ssm.conv_kernel": TAPS, "ssm.state_size": STATE, "ssm.inner_size": WIDTH, "ssm.time_step_rank": HEADS,
    "ssm.group_count": GROUPS,
}  # fmt: skip


def without_heads(architecture: str, **more: Any) -> Toy:
    """Two layers of nothing but mixers, whose metadata give no sizes of heads."""
    rank = {"ssm.time_step_rank": 3} if architecture == "mamba" else {}
    toy = Toy(architecture, **SIZES | rank | more)
    for key in ("head_count_kv", "key_length", "value_length"):
        del toy.metadata[f"{architecture}.attention.{key}"]
    toy.set({"attention.head_count": 0, "feed_forward_length": 0})
    for layer in range(2):
        (add_mamba if architecture == "mamba" else add_mamba2)(toy, layer)
    return toy


@pytest.mark.parametrize("architecture", ["mamba", "mamba2"])
def test_a_model_without_any_attention(architecture: str) -> None:
    graph = without_heads(architecture).graph(64)
    assert graph.cache_layers == [] and graph.n_states == 4
    assert len(of_type(graph, SelectiveScan if architecture == "mamba" else LinearAttention)) == 2
    expected = forward(graph, TOKENS)
    runtime = Runtime(graph, threads=2, context=64)
    sequence = runtime.sequence()
    runtime.evaluate(sequence, TOKENS[:13], "none")
    assert sequence.returnable() > 0
    twin, loaded = sequence.fork(), runtime.sequence()
    loaded.restore({name: values.copy() for name, values in sequence.state().items()})
    rest = [runtime.evaluate(one, TOKENS[13:], "all") for one in (sequence, twin, loaded)]
    np.testing.assert_allclose(rest[0], expected[13:], rtol=1e-3, atol=1e-4)
    assert all(np.array_equal(rest[0], one) for one in rest[1:])
    assert sequence.truncate(17) == 17
    runtime.evaluate(sequence, TOKENS[17:], "none")
    runtime.close()


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("ssm.time_step_rank", 10, "ssm.inner_size is 48, which is not a multiple of 10 heads"),
        ("ssm.time_step_rank", 0, "ssm.time_step_rank is 0, expected 1 to 4096"),
        ("ssm.inner_size", 4096, "ssm.inner_size is 4096: heads of more than 256 are not supported"),
        ("ssm.group_count", 3, "ssm.group_count is 3, which does not divide 4 heads"),
        ("ssm.group_count", 0, "ssm.group_count is 0, expected 1 to 4096"),
        ("ssm.state_size", 257, "ssm.state_size is 257, expected 1 to 256"),
        ("ssm.state_size", 7, "tensor blk.0.ssm_in.weight has shape (124, 32), expected (128, 32)"),
        ("ssm.conv_kernel", 17, "ssm.conv_kernel is 17, expected 1 to 16"),
        ("ssm.conv_kernel", 4, "tensor blk.0.ssm_conv1d.weight has shape (72, 3), expected"),
        ("ssm.inner_size", None, "ssm.inner_size is missing"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(key: str, value: Any, problem: str) -> None:
    assert problem in without_heads("mamba2").set({key: value}).error()
    if key in ("ssm.state_size", "ssm.conv_kernel") and value > 8:
        assert problem in without_heads("mamba").set({key: value}).error()


@pytest.mark.parametrize("architecture", ["mamba", "mamba2"])
def test_tensors_that_are_missing_or_not_finite_are_refused(architecture: str) -> None:
    names = [name for name in without_heads(architecture).tensors if name.startswith("blk.1.ssm_")]
    assert len(names) in (8, 9)
    for name in names:
        toy = without_heads(architecture)
        del toy.tensors[name]
        if name.endswith(("conv1d.bias", "ssm_norm.weight")) or (architecture == "mamba" and name.endswith("dt.bias")):
            toy.graph()
        else:
            assert f"tensor {name} is missing" in toy.error()
        if name.endswith(("ssm_a", "ssm_d", "conv1d.weight", ".bias")):
            toy = without_heads(architecture)
            values = get(toy, name)
            values.reshape(-1)[-1] = np.nan
            put(toy, name, values)
            assert f"tensor {name} has values that are not finite" in toy.error()


def test_heads_of_a_group_are_neighbours() -> None:
    """Two groups are the same as four, of which each two have the same B and C."""
    two = without_heads("mamba2")
    four = without_heads("mamba2").set({"ssm.group_count": 4})
    four.tensors |= two.tensors
    twice = np.repeat(np.arange(2 * GROUPS * STATE).reshape(2 * GROUPS, STATE), 2, axis=0).reshape(-1)
    for layer in range(2):
        for toy in (two, four):
            toy.tensors.pop(f"blk.{layer}.ssm_norm.weight")
        for name, start in (("ssm_in.weight", 2 * WIDTH), ("ssm_conv1d.weight", WIDTH), ("ssm_conv1d.bias", WIDTH)):
            values = get(two, f"blk.{layer}.{name}")
            end = start + 2 * GROUPS * STATE
            put(four, f"blk.{layer}.{name}", np.concatenate([values[:start], values[start:end][twice], values[end:]]))
    np.testing.assert_allclose(forward(four.graph(), TOKENS), forward(two.graph(), TOKENS), rtol=1e-5, atol=1e-6)


def test_falcon_mamba_has_norms_without_weights() -> None:
    plain, normed = without_heads("mamba"), without_heads("mamba", **{"ssm.dt_b_c_rms": True})
    assert len(of_type(normed.graph(), RMSNorm)) == len(of_type(plain.graph(), RMSNorm)) + 6
    assert sum(norm.weight is None for norm in of_type(normed.graph(), RMSNorm)) == 6
    for layer in range(2):
        for name, size in (("dt", 3), ("b", STATE), ("c", STATE)):
            plain.add(f"blk.{layer}.ssm_{name}_norm.weight", size)
    assert all(norm.weight is not None for norm in of_type(plain.graph(), RMSNorm))
    assert len(of_type(plain.graph(), RMSNorm)) == len(of_type(normed.graph(), RMSNorm))


def hybrid(architecture: str, kv_heads: list[int], widths: list[int] | int = N_FF, **more: Any) -> Toy:
    keys = {"attention.head_count_kv": np.array(kv_heads, np.int32)}
    if isinstance(widths, list):
        keys["feed_forward_length"] = np.array(widths, np.int32)
    toy = Toy(architecture, n_layer=len(kv_heads), **SIZES | keys | more)
    for layer, heads in enumerate(kv_heads):
        if not heads:
            (add_mamba if architecture == "jamba" else add_mamba2)(toy, layer)
    return toy


def test_nemotron_h_has_one_part_in_a_layer() -> None:
    toy = hybrid("nemotron_h", [0, 2, 0, 0], [0, 0, N_FF, 0])
    graph = toy.graph()
    names = [linear.weight.name for linear in of_type(graph, Linear)]
    assert [name.split(".")[2] for name in names if name.startswith("blk")] == [
        "ssm_in", "ssm_out", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down", "ssm_in", "ssm_out",
    ]  # fmt: skip
    assert len(of_type(graph, Attention)) == 1 and len(of_type(graph, Convolution)) == 2
    toy.set({"attention.layer_norm_rms_epsilon": 0.25})
    del toy.metadata["nemotron_h.attention.layer_norm_rms_epsilon"]
    toy.set({"attention.layer_norm_epsilon": 0.125})
    assert {norm.eps for norm in of_type(toy.graph(), RMSNorm)} == {0.125}


def test_the_experts_of_nemotron_h_may_be_narrow_and_as_many_as_a_layer_likes() -> None:
    used = np.array([0, 2, 3, 0], np.int32)
    toy = hybrid(
        "nemotron_h_moe", [0, 0, 0, 2], [0, 20, 20, 0], expert_count=5, expert_used_count=used, moe_latent_size=8,
        expert_feed_forward_length=np.array([0, 20, 20, 0], np.int32), expert_shared_feed_forward_length=24,
        expert_weights_scale=2.5, expert_weights_norm=True,
    )  # fmt: skip
    for layer in (1, 2):
        for name, *shape in (
            ("ffn_gate_inp", 5, N_EMBD), ("ffn_latent_down", 8, N_EMBD), ("ffn_latent_up", N_EMBD, 8),
            ("ffn_up_exps", 5, 20, 8), ("ffn_down_exps", 5, 8, 20), ("ffn_up_shexp", 24, N_EMBD),
            ("ffn_down_shexp", N_EMBD, 24),
        ):  # fmt: skip
            toy.add(f"blk.{layer}.{name}.weight", *shape)
        toy.add(f"blk.{layer}.exp_probs_b.bias", 5)
    first, second = of_type(toy.graph(), MoE)
    assert (first.n_used, second.n_used) == (2, 3)
    assert first.gate is None and first.x.width == 8 and first.router_x.width == N_EMBD
    assert (first.gating, first.scale, first.normalize, first.kind) == ("sigmoid", 2.5, True, "relu_squared")
    assert first.selection_bias is not None
    assert forward(toy.graph(), TOKENS).shape == (len(TOKENS), N_VOCAB)
    assert "expert_used_count is 0, expected 1 to 5" in toy.set({"expert_used_count": 0}).error()
    assert "expert_used_count is 0 for every layer" in toy.set({"expert_used_count": 0 * used}).error()
    assert "expert_used_count is 6, expected 0 to 5" in toy.set({"expert_used_count": 2 * used}).error()


def test_granites_without_heads_are_mixers() -> None:
    toy = hybrid("granitehybrid", [0, 2, 0], residual_scale=0.5, **{"rope.scaling.finetuned": False})
    graph = toy.graph()
    assert len(of_type(graph, LinearAttention)) == 2 and len(of_type(graph, Attention)) == 1
    all_attend = Toy("granitehybrid", n_layer=2).graph()
    assert len(of_type(all_attend, Attention)) == 2 and all_attend.n_states == 0


def test_jamba_has_experts_where_the_file_has_a_router() -> None:
    toy = hybrid("jamba", [0, 2, 0], expert_count=4, expert_used_count=2)
    toy.add("blk.1.ffn_gate_inp.weight", 4, N_EMBD)
    for name, *shape in (("gate", N_FF, N_EMBD), ("up", N_FF, N_EMBD), ("down", N_EMBD, N_FF)):
        toy.add(f"blk.1.ffn_{name}_exps.weight", 4, *shape)
    toy.set({"ssm.time_step_rank": 3})
    graph = toy.graph()
    (moe,) = of_type(graph, MoE)
    assert not moe.normalize and moe.gating == "softmax"
    assert len(of_type(graph, SelectiveScan)) == 2


def test_falcon_h1_has_both_in_every_layer() -> None:
    toy = Toy("falcon-h1", **SIZES)
    for layer in range(2):
        add_mamba2(toy, layer, normed=layer == 0)
        toy.add(f"blk.{layer}.attn_output.bias", N_EMBD)  # which the reference engine does not add
        toy.tensors[f"blk.{layer}.ffn_norm"] = toy.tensors.pop(f"blk.{layer}.ffn_norm.weight")
    graph = toy.graph()
    assert len(of_type(graph, Attention)) == len(of_type(graph, LinearAttention)) == 2
    assert all(linear.bias is None for linear in of_type(graph, Linear) if "attn_output" in linear.weight.name)
    assert sum(norm.groups == GROUPS for norm in of_type(graph, RMSNorm)) == 1
    none = toy.set({"attention.head_count": 0, "attention.head_count_kv": 0})
    assert "attention.head_count_kv is 0 for layer 0, which has attention" in none.error()


def test_plamo2_takes_time_steps_from_the_convolution() -> None:
    toy = hybrid("plamo2", [0, 2], **{"ssm.group_count": 0})
    rank = 64
    for name, *shape in (("in", 2 * WIDTH, N_EMBD), ("x", rank + 2 * STATE, WIDTH), ("dt", HEADS, rank)):
        toy.add(f"blk.0.ssm_{name}.weight", *shape)
    toy.add("blk.0.ssm_conv1d.weight", WIDTH, TAPS)
    del toy.tensors["blk.0.ssm_conv1d.bias"]
    for name in ("a", "d"):
        toy.add(f"blk.0.ssm_{name}", HEADS)
    for name, size in (("dt", rank), ("b", STATE), ("c", STATE)):
        toy.add(f"blk.0.ssm_{name}_norm", size)
    toy.add("blk.1.attn_qkv.weight", (N_HEADS + 2 * N_KV_HEADS) * HEAD_DIM, N_EMBD)
    toy.add("blk.1.attn_q_norm.weight", N_HEADS, HEAD_DIM)
    toy.add("blk.1.attn_k_norm.weight", N_KV_HEADS, HEAD_DIM)
    for layer in range(2):
        for name in ("post_attention_norm", "post_ffw_norm"):
            toy.tensors[f"blk.{layer}.{name}"] = toy.tensors.pop(f"blk.{layer}.{name}.weight")
        toy.add(f"blk.{layer}.ffn_up.weight", 2 * N_FF, N_EMBD)
    graph = toy.graph()
    (scan,) = of_type(graph, LinearAttention)
    assert (scan.n_heads, scan.n_key_heads, scan.dim_k, scan.dim_v) == (HEADS, 1, STATE, DIM)
    assert forward(graph, TOKENS).shape == (len(TOKENS), N_VOCAB)


def test_adapters_change_the_matrices_of_mixers(rng: np.random.Generator) -> None:
    graph = without_heads("mamba2").graph()
    names = ["blk.0.ssm_in.weight", "blk.1.ssm_out.weight"]
    adapter = Toy("mamba2")
    adapter.tensors.clear()
    for name in names:
        (weight,) = (linear.weight for linear in of_type(graph, Linear) if linear.weight.name == name)
        adapter.add(f"{name}.lora_a", 2, weight.shape[1])
        adapter.add(f"{name}.lora_b", weight.shape[0], 2)
    adapter.metadata |= {"general.type": "adapter", "adapter.type": "lora"}
    reader: Any = adapter
    changed = adapt(graph, [Adapter(reader, 1.0)])
    assert len(changed.operations) > len(graph.operations)
    assert np.abs(forward(changed, TOKENS) - forward(graph, TOKENS)).max() > 1e-3
