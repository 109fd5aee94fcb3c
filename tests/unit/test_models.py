"""Architectures and their hyper-parameters, on toy models that lie in memory."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qrun.formats import FormatError, TensorInfo, TensorType
from qrun.models import ARCHITECTURES, build_graph
from qrun.models.graph import Attention, Embed, Graph, Linear, MoE, Operation, RMSNorm, Rope, Slice, Softcap
from tests.reference import forward

N_VOCAB, N_EMBD, N_FF, HEAD_DIM, N_HEADS, N_KV_HEADS = 40, 32, 48, 16, 4, 2

METADATA: dict[str, Any] = {
    "context_length": 128,
    "embedding_length": N_EMBD,
    "feed_forward_length": N_FF,
    "attention.head_count": N_HEADS,
    "attention.head_count_kv": N_KV_HEADS,
    "attention.key_length": HEAD_DIM,
    "attention.value_length": HEAD_DIM,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


class Toy:
    """What `build_graph` wants of a reader. A hyper-parameter or tensor given as None is left out."""

    def __init__(self, architecture: str, n_layer: int = 2, n_expert: int = 0, **hyperparameters: Any) -> None:
        self.path = Path("toy.gguf")
        self.architecture = architecture
        self.metadata: dict[str, Any] = {"general.architecture": architecture}
        self.tensors: dict[str, TensorInfo] = {}
        self.random = np.random.default_rng(1)
        self.set(METADATA | {"block_count": n_layer, "expert_count": n_expert} | hyperparameters)
        self.add("token_embd.weight", N_VOCAB, N_EMBD)
        self.add("output_norm.weight", N_EMBD)
        for layer in range(n_layer):
            self.add_block(f"blk.{layer}", n_expert)

    def set(self, hyperparameters: dict[str, Any]) -> "Toy":
        for key, value in hyperparameters.items():
            self.metadata[f"{self.architecture}.{key}"] = value
            if value is None:
                del self.metadata[f"{self.architecture}.{key}"]
        return self

    def add(self, name: str, *shape: int) -> None:
        raw = (self.random.standard_normal(shape) * 0.3).astype(np.float32).reshape(-1).view(np.uint8)
        self.tensors[name] = TensorInfo(name, TensorType.F32, shape, raw.size, 0, self.path, raw)

    def add_block(self, block: str, n_expert: int) -> None:
        for norm in ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm"):
            self.add(f"{block}.{norm}.weight", N_EMBD)
        for norm in ("attn_q_norm", "attn_k_norm"):
            self.add(f"{block}.{norm}.weight", HEAD_DIM)
        self.add(f"{block}.attn_q.weight", N_HEADS * HEAD_DIM, N_EMBD)
        self.add(f"{block}.attn_k.weight", N_KV_HEADS * HEAD_DIM, N_EMBD)
        self.add(f"{block}.attn_v.weight", N_KV_HEADS * HEAD_DIM, N_EMBD)
        self.add(f"{block}.attn_output.weight", N_EMBD, N_HEADS * HEAD_DIM)
        experts, suffix = ((n_expert,), "_exps") if n_expert else ((), "")
        self.add(f"{block}.ffn_gate{suffix}.weight", *experts, N_FF, N_EMBD)
        self.add(f"{block}.ffn_up{suffix}.weight", *experts, N_FF * (1 + (self.architecture == "phi3")), N_EMBD)
        self.add(f"{block}.ffn_down{suffix}.weight", *experts, N_EMBD, N_FF)
        if n_expert:
            self.add(f"{block}.ffn_gate_inp.weight", n_expert, N_EMBD)

    def graph(self, context: int | None = None) -> Graph:
        reader: Any = self
        return build_graph(reader, context)

    def error(self) -> str:
        with pytest.raises(FormatError) as error:
            self.graph()
        assert "\n" not in str(error.value)
        return str(error.value)


def of_type(graph: Graph, kind: type[Operation]) -> list[Any]:
    return [operation for operation in graph.operations if isinstance(operation, kind)]


# What the families make of it


def test_llama_turns_adjacent_pairs_and_reuses_its_embedding() -> None:
    graph = Toy("llama").graph()
    assert all(rope.interleaved and rope.n_rot == HEAD_DIM for rope in of_type(graph, Rope))
    assert of_type(graph, Linear)[-1].weight is of_type(graph, Embed)[0].weight
    assert (graph.n_vocab, graph.n_embd, graph.context_length) == (N_VOCAB, N_EMBD, 128)
    assert [cache.window for cache in graph.cache_layers] == [None, None]


def test_an_output_matrix_of_its_own_is_used() -> None:
    toy = Toy("llama")
    toy.add("output.weight", N_VOCAB, N_EMBD)
    assert of_type(toy.graph(), Linear)[-1].weight.name == "output.weight"


def test_a_bias_of_the_output_counts_where_the_embedding_is_reused() -> None:
    toy = Toy("qwen2")
    plain = forward(toy.graph(), [1, 2, 3])
    toy.add("output.bias", N_VOCAB)
    bias = toy.tensors["output.bias"].raw.view(np.float32)
    np.testing.assert_allclose(forward(toy.graph(), [1, 2, 3]), plain + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3"])
def test_most_others_turn_halves(architecture: str) -> None:
    assert not any(rope.interleaved for rope in of_type(Toy(architecture).graph(), Rope))


def test_smollm3_leaves_every_fourth_layer_without_positions() -> None:
    operations = Toy("smollm3", n_layer=8).graph().operations
    queries = {operation.q.id: operation.layer for operation in operations if isinstance(operation, Attention)}
    turned = {
        queries[operation.out.id]
        for operation in operations
        if operation.out.id in queries and isinstance(operation, Rope)
    }
    assert turned == {0, 1, 2, 4, 5, 6}


def test_gemma2_has_a_window_on_even_layers_and_two_caps() -> None:
    graph = Toy("gemma2", n_layer=4, **{"attention.sliding_window": 16}).graph()
    assert [cache.window for cache in graph.cache_layers] == [16, None, 16, None]
    assert {attention.softcap for attention in of_type(graph, Attention)} == {50.0}
    assert [softcap.cap for softcap in of_type(graph, Softcap)] == [30.0]
    assert of_type(graph, Embed)[0].scale == pytest.approx(N_EMBD**0.5)


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [
        (None, [16, 16, 16, 16, 16, None, 16]),
        (3, [16, 16, None, 16, 16, None, 16]),
        (0, [16] * 7),
        (np.array([1, 0, 0, 1, 0, 0, 0], np.int32), [16, None, None, 16, None, None, None]),
    ],
)
def test_gemma3_takes_its_windows_from_the_file(pattern: Any, windows: list[int | None]) -> None:
    hyperparameters = {"attention.sliding_window": 16, "attention.sliding_window_pattern": pattern}
    graph = Toy("gemma3", n_layer=7, **hyperparameters).graph()
    assert [cache.window for cache in graph.cache_layers] == windows


def test_gemma3_stretches_only_the_layers_that_see_everything() -> None:
    scaled = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.freq_base": 1e6}
    graph = Toy("gemma3", n_layer=6, **scaled, **{"attention.sliding_window": 16}).graph()
    first = [rope.frequencies[0] for rope in of_type(graph, Rope)[::2]]
    second = [rope.frequencies[1] for rope in of_type(graph, Rope)[::2]]
    assert first == pytest.approx([1.0] * 5 + [1 / 8])
    assert second == pytest.approx([10000 ** (-1 / 8)] * 5 + [1e6 ** (-1 / 8) / 8])


@pytest.mark.parametrize(("architecture", "n_layer"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_scale_queries_by_another_width(architecture: str, n_layer: int) -> None:
    def scales(layers: int) -> set[float]:
        return {attention.scale for attention in of_type(Toy(architecture, n_layer=layers).graph(), Attention)}

    assert scales(2) == {HEAD_DIM**-0.5}
    assert scales(n_layer) == {(N_EMBD // N_HEADS) ** -0.5}


def test_phi3_chooses_rope_factors_by_context_and_ignores_the_window() -> None:
    toy = Toy("phi3", **{"rope.scaling.original_context_length": 64, "attention.sliding_window": 16})
    toy.add("rope_factors_long.weight", HEAD_DIM // 2)
    toy.add("rope_factors_short.weight", HEAD_DIM // 2)
    long, short = (toy.tensors[f"rope_factors_{name}.weight"].dequantize() for name in ("long", "short"))
    for context, factors in ((64, short), (65, long), (None, long)):
        graph = toy.graph(context)
        assert of_type(graph, Rope)[0].frequencies[0] == pytest.approx(1 / factors[0])
        assert graph.cache_layers[0].window is None


def test_queries_keys_and_values_may_share_a_matrix() -> None:
    apart, joined = Toy("llama"), Toy("llama")
    for layer in range(2):
        block = f"blk.{layer}"
        for part in ("attn_q", "attn_k", "attn_v"):
            apart.add(f"{block}.{part}.bias", apart.tensors[f"{block}.{part}.weight"].shape[0])
            joined.tensors[f"{block}.{part}.bias"] = apart.tensors[f"{block}.{part}.bias"]
        parts = [joined.tensors.pop(f"{block}.{part}.weight").raw for part in ("attn_q", "attn_k", "attn_v")]
        name, raw = f"{block}.attn_qkv.weight", np.concatenate(parts)
        joined.tensors[name] = TensorInfo(name, TensorType.F32, (128, N_EMBD), raw.size, 0, joined.path, raw)
    assert len(of_type(joined.graph(), Slice)) == 6
    tokens = [3, 1, 4, 1, 5]
    np.testing.assert_allclose(forward(joined.graph(), tokens), forward(apart.graph(), tokens), atol=1e-5)


def test_qwen3_norms_each_heads_query_and_key() -> None:
    groups = [norm.groups for norm in of_type(Toy("qwen3").graph(), RMSNorm)]
    assert groups == [1, N_HEADS, N_KV_HEADS, 1] * 2 + [1]


@pytest.mark.parametrize(
    ("architecture", "hyperparameters"),
    [("llama", {}), ("qwen3moe", {"expert_feed_forward_length": N_FF, "feed_forward_length": 999})],
)
def test_experts(architecture: str, hyperparameters: dict[str, int]) -> None:
    toy = Toy(architecture, n_expert=4, expert_used_count=2, **hyperparameters)
    moe = of_type(toy.graph(), MoE)[0]
    assert (moe.n_used, moe.normalize, moe.kind, moe.gate.shape) == (2, True, "silu", (4, N_FF, N_EMBD))


def test_layers_may_differ_in_heads_and_width() -> None:
    toy = Toy("llama")
    toy.set(
        {
            "feed_forward_length": np.array([N_FF, 64], np.int32),
            "attention.head_count": np.array([4, 8], np.int32),
            "attention.head_count_kv": np.array([2, 1], np.int32),
        }
    )
    toy.add("blk.1.attn_q.weight", 8 * HEAD_DIM, N_EMBD)
    toy.add("blk.1.attn_k.weight", HEAD_DIM, N_EMBD)
    toy.add("blk.1.attn_v.weight", HEAD_DIM, N_EMBD)
    toy.add("blk.1.attn_output.weight", N_EMBD, 8 * HEAD_DIM)
    for name in ("gate", "up"):
        toy.add(f"blk.1.ffn_{name}.weight", 64, N_EMBD)
    toy.add("blk.1.ffn_down.weight", N_EMBD, 64)
    graph = toy.graph()
    assert [(cache.n_heads, cache.n_kv_heads) for cache in graph.cache_layers] == [(4, 2), (8, 1)]
    assert forward(graph, [1, 2, 3]).shape == (3, N_VOCAB)


# What is refused


def test_an_unknown_architecture() -> None:
    assert Toy("magic").error() == f"toy.gguf: architecture 'magic' is not supported ({len(ARCHITECTURES)} others are)"
    assert Toy("llama3").error() == "toy.gguf: architecture 'llama3' is not supported (much like it: llama)"


@pytest.mark.parametrize("value", [None, 7, ["llama"]])
def test_no_architecture(value: Any) -> None:
    reader: Any = SimpleNamespace(path=Path("toy.gguf"), metadata={"general.architecture": value}, tensors={})
    with pytest.raises(FormatError, match=r"toy\.gguf: general\.architecture is missing or not a string"):
        build_graph(reader)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("embedding_length", None, "is missing"),
        ("embedding_length", 0, "is 0, expected 1 to 1048576"),
        ("embedding_length", 1 << 40, "is 1099511627776, expected 1 to 1048576"),
        ("embedding_length", "32", "is not a whole number: '32'"),
        ("embedding_length", True, "is not a whole number: True"),
        ("block_count", 0, "is 0, expected 1 to 512"),
        ("block_count", 1 << 31, "is 2147483648, expected 1 to 512"),
        ("block_count", 1, "is 1, but the file has tensors of block 1"),
        ("context_length", 0, "is 0, expected 1 to 1073741824"),
        ("attention.head_count", 0, "is 0, expected 1 to 4096"),
        ("attention.head_count", np.array([4, 4, 4]), "has 3 values, expected one for each of 2 layers"),
        ("attention.head_count", np.array([4.0, 4.0]), "is not a whole number: 4.0"),
        ("attention.head_count_kv", 3, "is 3, which does not divide 4 heads"),
        ("attention.head_count_kv", np.array([2, 0]), "is 0, expected 1 to 4096"),
        ("attention.key_length", 1 << 20, "is 1048576, expected 1 to 4096"),
        ("attention.layer_norm_rms_epsilon", None, "is missing"),
        ("attention.layer_norm_rms_epsilon", float("nan"), "is nan, expected 0 to 1"),
        ("attention.layer_norm_rms_epsilon", -1e-5, "is -1e-05, expected 0 to 1"),
        ("attention.layer_norm_rms_epsilon", [1e-5], "is not a number: an array"),
        ("feed_forward_length", -1, "is -1, expected 1 to 1048576"),
        ("expert_count", 1 << 20, "is 1048576, expected 0 to 1024"),
        ("rope.dimension_count", 15, "is 15, expected an even number"),
        ("rope.dimension_count", 18, "is 18, expected 2 to 16"),
        ("rope.freq_base", 0.0, "is 0.0, expected 1 to 1e+15"),
        ("rope.freq_base", 1.0, "is 1, expected more"),
        ("rope.freq_base", float("inf"), "is inf, expected 1 to 1e+15"),
        ("rope.scaling.type", "magic", "is 'magic', expected one of none, linear, yarn, longrope"),
        ("rope.scaling.type", 3, "is not a string: 3"),
        ("rope.scaling.factor", -1.0, "is -1.0, expected 0 to 1e+06"),
        ("rope.scaling.factor", 1e-30, "is 1e-30, expected at least 1e-06"),
    ],
)
def test_an_absurd_hyperparameter_is_named(key: str, value: Any, problem: str) -> None:
    assert Toy("llama").set({key: value}).error() == f"toy.gguf: llama.{key} {problem}"


@pytest.mark.parametrize("n_used", [0, 5])
def test_more_experts_in_use_than_there_are(n_used: int) -> None:
    message = Toy("llama", n_expert=4, expert_used_count=n_used).error()
    assert message == f"toy.gguf: llama.expert_used_count is {n_used}, expected 1 to 4"


def test_a_window_of_nothing() -> None:
    message = Toy("gemma2", **{"attention.sliding_window": 0}).error()
    assert message == "toy.gguf: gemma2.attention.sliding_window is 0, expected 1 to 1073741824"


def test_window_flags_for_too_few_layers() -> None:
    flags = {"attention.sliding_window": 16, "attention.sliding_window_pattern": np.array([True])}
    message = Toy("gemma3", **flags).error()
    assert message == "toy.gguf: gemma3.attention.sliding_window_pattern is not a flag for each of 2 layers"


def test_more_blocks_than_tensors() -> None:
    assert Toy("llama").set({"block_count": 500}).error() == "toy.gguf: tensor blk.2.attn_norm.weight is missing"


@pytest.mark.parametrize("name", ["token_embd.weight", "output_norm.weight", "blk.1.ffn_down.weight"])
def test_a_missing_tensor(name: str) -> None:
    toy = Toy("llama")
    del toy.tensors[name]
    assert toy.error() == f"toy.gguf: tensor {name} is missing"


def test_an_embedding_that_is_no_matrix() -> None:
    toy = Toy("llama")
    toy.add("token_embd.weight", N_VOCAB * N_EMBD)
    assert toy.error() == "toy.gguf: tensor token_embd.weight has shape (1280,), expected a matrix"


def test_rope_factors_of_zero() -> None:
    toy = Toy("llama")
    toy.add("rope_freqs.weight", HEAD_DIM // 2)
    toy.tensors["rope_freqs.weight"].raw[:4] = 0
    assert toy.error() == "toy.gguf: tensor rope_freqs.weight divides by numbers smaller than 1e-06"
