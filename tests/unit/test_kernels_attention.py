"""Attention over the paged cache, against plain NumPy, for every cache type, with windows, caps and grouped heads."""

import dataclasses
from collections.abc import Iterator
from itertools import accumulate, pairwise

import numpy as np
import pytest

from qrun.engine.kernels import records as R
from qrun.engine.program.runtime import Part, Runtime
from qrun.engine.simd.target import host_target
from qrun.formats import TensorType
from qrun.models import graph as G
from tests.kernel_harness import ALL_FORMS
from tests.reference import attention as reference_attention
from tests.reference import forward

WIDTH = 32
# What a cache type may cost on average, relative to the largest result: of hundreds of seeds 2.0e-5 +- 0.4e-5, 6e-4 +-
# 1e-4 and 8e-3 +- 1.6e-3. The largest error has a long tail. And what is left where the reference rounds as it does:
# there, only what lay just between two numbers may have been rounded the other way, by a step of the type. That was at
# most 1.4e-6, 1e-5 and 1.9e-4.
TOLERANCE = {"f16": 6e-5, "q8_0": 2e-3, "q4_0": 3e-2}
ROUNDED_TOLERANCE = {"f16": 1e-5, "q8_0": 1e-4, "q4_0": 1e-3}


def rounded(x: np.ndarray, dim: int, block: int, divisor: float, half: bool) -> np.ndarray:
    """Rows of heads of `dim` values, rounded in blocks to whole multiples of a scale: the largest / `divisor`.

    half: the scale itself is kept as float16.
    """
    heads = x.astype(np.float32).reshape(len(x), -1, dim)
    blocks = np.pad(heads, ((0, 0), (0, 0), (0, -dim % block))).reshape(*heads.shape[:2], -1, block)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    scale = (np.abs(largest) if divisor > 0 else largest) / np.float32(divisor)
    whole = np.rint(blocks * (np.float32(1) / scale)).clip(*((-8, 7) if divisor == -8 else (-127, 127)))
    kept = scale.astype(np.float16).astype(np.float32) if half else scale
    return (whole * kept).reshape(*heads.shape[:2], -1)[..., :dim].reshape(x.shape)


def rounded_inputs(
    values: dict[int, np.ndarray], layer: G.CacheLayer, cache_type: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values as attention with this type of cache sees them."""
    q, k, v = values[1], values[2], values[3]
    if cache_type == "f16":
        return q, k.astype(np.float16).astype(np.float32), v.astype(np.float16).astype(np.float32)
    divisor = {"q8_0": 127, "q4_0": -8}[cache_type]
    q = rounded(q, layer.head_dim_k, 16, 127, False)
    return q, rounded(k, layer.head_dim_k, 32, divisor, True), rounded(v, layer.head_dim_v, 32, divisor, True)


def attention_graph(rng: np.random.Generator, layer: G.CacheLayer, softcap: float | None) -> G.Graph:
    """Embedding -> q, k, v -> attention: its logits are the attention's result."""

    def weight(name: str, rows: int, columns: int) -> G.Weight:
        values = rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)
        return G.Weight(name, TensorType.F32, (rows, columns), values.view(np.uint8).reshape(-1))

    heads, kv_heads = layer.n_heads, layer.n_kv_heads
    widths = [heads * layer.head_dim_k, kv_heads * layer.head_dim_k, kv_heads * layer.head_dim_v]
    x = G.Value(0, WIDTH)
    operations: list[G.Operation] = [G.Embed(x, weight("embed", 50, WIDTH), 5.0)]
    for i, width in enumerate(widths, 1):
        operations.append(G.Linear(G.Value(i, width), x, weight(f"w{i}", width, WIDTH), None))
    q, k, v = (operation.out for operation in operations[1:])
    out = G.Value(4, layer.n_heads * layer.head_dim_v)
    operations.append(G.Attention(out, q, k, v, 0, layer.head_dim_k**-0.5, softcap))
    logits = G.Value(5, out.width)
    operations.append(G.SelectRows(logits, out))
    return G.Graph("test", operations, logits, [layer], out.width, WIDTH, 512)


CASES = [
    (G.CacheLayer(2, 2, 32, 32, None), None),
    (G.CacheLayer(6, 2, 64, 64, None), 3.0),
    (G.CacheLayer(4, 1, 80, 48, 37), None),
    (G.CacheLayer(3, 3, 20, 20, 100), None),
    (G.CacheLayer(22, 2, 32, 32, None), None),
]


@pytest.fixture(params=range(len(CASES)))
def case(request: pytest.FixtureRequest) -> tuple[G.CacheLayer, float | None]:
    return CASES[request.param]


@pytest.fixture(params=["best", "plain"])
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["f16", "q8_0", "q4_0"])
def runtime(
    request: pytest.FixtureRequest, rng: np.random.Generator, case: tuple[G.CacheLayer, float | None], form: str
) -> Iterator[Runtime]:
    if form == "plain" and request.param != "f16" and case != CASES[2] and not ALL_FORMS:
        pytest.skip("quantised caches in the plain form: make test-forms")
    graph = attention_graph(rng, *case)
    runtime = Runtime(graph, threads=2, context=300, cache_type=request.param, batch=128, target=host_target(form))
    yield runtime
    runtime.close()


def test_attention_is_the_definition(runtime: Runtime, rng: np.random.Generator) -> None:
    graph = runtime.graph
    tokens = rng.integers(0, min(50, graph.n_vocab), 230)
    values: dict[int, np.ndarray] = {}
    from tests.reference import compute

    for operation in graph.operations[:4]:
        values[operation.out.id] = compute(operation, values, graph, tokens).astype(np.float32)
    operation = graph.operations[4]
    assert isinstance(operation, G.Attention)
    layer = graph.cache_layers[0]
    result = runtime.evaluate(runtime.sequence(), tokens, "all")

    def error(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        expected = reference_attention(q, k, v, layer, operation.scale, operation.softcap)
        return np.abs(result - expected) / np.abs(expected).max()

    assert error(values[1], values[2], values[3]).mean() < TOLERANCE[runtime.cache_type]
    rounded_error = error(*rounded_inputs(values, layer, runtime.cache_type)).mean()
    assert rounded_error < ROUNDED_TOLERANCE[runtime.cache_type]


def test_bits_do_not_depend_on_how_a_prompt_is_split(runtime: Runtime, rng: np.random.Generator) -> None:
    tokens = rng.integers(0, min(50, runtime.n_vocab), 150)
    whole = runtime.evaluate(runtime.sequence(), tokens, "all")
    sizes = rng.permutation(range(1, 17)).tolist()  # so that tiles of all sizes come up, at any place
    cuts = [0, *accumulate(sizes), 150]
    sequence = runtime.sequence()
    parts = [runtime.evaluate(sequence, tokens[a:b], "all") for a, b in pairwise(cuts)]
    assert np.array_equal(whole, np.concatenate(parts))  # type: ignore[arg-type]


def test_sequences_decoded_together_give_the_bits_of_each_alone(runtime: Runtime, rng: np.random.Generator) -> None:
    prompts = [rng.integers(0, min(50, runtime.n_vocab), n) for n in (1, 70, 64, 3, 129)]
    sequences, alone = [runtime.sequence() for _ in prompts], [runtime.sequence() for _ in prompts]
    for prompt, one, other in zip(prompts, sequences, alone, strict=True):
        runtime.evaluate(one, prompt, "none")
        runtime.evaluate(other, prompt, "none")
    for token in (5, 7, 9):
        together = runtime.evaluate_together(sequences, [token] * len(prompts))
        assert np.array_equal(together, np.stack([runtime.evaluate(s, [token]) for s in alone]))  # type: ignore[arg-type]


def test_pages_of_a_step_are_64_positions() -> None:
    assert R.PAGE_POSITIONS % host_target().lanes == 0


# Texts whose tokens all see each other, or those within half a window.
BOTH_WAYS = [
    (G.CacheLayer(4, 2, 32, 32, None, precise=True, causal=False), None),
    (G.CacheLayer(3, 3, 20, 20, None, precise=True, causal=False), np.array([0.5, 0.25, 0.03], np.float32)),
    (G.CacheLayer(6, 2, 64, 64, 37, precise=True, causal=False), None),
    (G.CacheLayer(2, 1, 32, 32, 130, precise=True, causal=False), np.array([0.5, 0.1], np.float32)),
]


@pytest.fixture(params=range(len(BOTH_WAYS)))
def both_ways(request: pytest.FixtureRequest, rng: np.random.Generator) -> G.Graph:
    layer, slopes = BOTH_WAYS[request.param]
    graph = attention_graph(rng, layer, None)
    graph.operations[4] = dataclasses.replace(graph.operations[4], slopes=slopes)  # type: ignore[type-var]
    return graph


@pytest.mark.parametrize("length", [1, 5, 64, 150, 700])
def test_attention_both_ways_is_the_definition(both_ways: G.Graph, rng: np.random.Generator, length: int) -> None:
    tokens = rng.integers(0, min(50, both_ways.n_vocab), length)
    runtime = Runtime(both_ways, threads=2, context=700)
    result = runtime.evaluate(runtime.sequence(), tokens, "all")
    runtime.close()
    expected = forward(both_ways, tokens.tolist())
    assert result is not None and np.abs(result - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_text_seen_both_ways_has_the_same_bits_whatever_it_is_computed_with(
    both_ways: G.Graph, rng: np.random.Generator
) -> None:
    texts = [rng.integers(0, min(50, both_ways.n_vocab), n) for n in (3, 70, 1, 64, 129)]
    alone = Runtime(both_ways, threads=1, context=130)
    expected = [alone.evaluate(alone.sequence(), text, "all") for text in texts]
    alone.close()
    together = Runtime(both_ways, threads=3, context=300)
    parts = [Part(together.sequence(), text.tolist(), "all") for text in texts]
    for result, one in zip(together.step(parts), expected, strict=True):
        assert np.array_equal(result, one)  # type: ignore[arg-type]
    together.close()


def test_nothing_is_appended_to_a_text_seen_both_ways(both_ways: G.Graph) -> None:
    runtime = Runtime(both_ways, threads=1, context=64)
    sequence = runtime.sequence()
    runtime.evaluate(sequence, [1, 2, 3], "none")
    with pytest.raises(ValueError, match="nothing can be appended"):
        runtime.evaluate(sequence, [4], "none")
    with pytest.raises(ValueError, match="nothing can be appended"):
        runtime.evaluate_together([sequence], [4])
    runtime.close()
