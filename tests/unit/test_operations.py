"""The operations of the vocabulary as the engine runs them, against their definition, on fresh data of odd sizes."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qrun.engine.program.runtime import Runtime
from qrun.engine.simd.target import host_target
from qrun.formats import TensorType
from qrun.models import graph as G
from tests.kernel_harness import ALL_FORMS
from tests.reference import forward, hangs_on_a_digit, values_of

N_VOCAB, N_ROWS = 50, 23
Make = Callable[["Maker", G.Value], G.Value]


class Maker:
    """Operations with random weights."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.operations: list[G.Operation] = []
        self.caches: list[G.CacheLayer] = []
        self.n_values = self.n_states = 0

    def state(self) -> int:
        self.n_states += 1
        return self.n_states - 1

    def weight(self, name: str, *shape: int) -> G.Weight:
        values = self.rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
        return G.Weight(name, TensorType.F32, shape, values.view(np.uint8).reshape(-1))

    def constant(self, *shape: int) -> np.ndarray:
        return self.rng.normal(size=shape).astype(np.float32)

    def value(self, width: int) -> G.Value:
        self.n_values += 1
        return G.Value(self.n_values - 1, width)

    def add(self, operation: G.Operation) -> G.Value:
        self.operations.append(operation)
        return operation.out

    def embed(self, width: int, by_position: bool = False) -> G.Value:
        rows = 64 if by_position else N_VOCAB
        weight = self.weight(f"embed{len(self.operations)}", rows, width)
        return self.add(G.Embed(self.value(width), weight, 3.0, by_position))

    def linear(self, x: G.Value, width: int) -> G.Value:
        weight = self.weight(f"w{len(self.operations)}", width, x.width)
        return self.add(G.Linear(self.value(width), x, weight, None))

    def graph(self, x: G.Value) -> G.Graph:
        """A program has at least one matrix."""
        out = self.linear(self.add(G.SelectRows(self.value(x.width), x)), 40)
        return G.Graph("test", self.operations, out, self.caches, out.width, 32, 64, n_states=self.n_states)


def drawn(
    rng: np.random.Generator, make: Callable[[Maker], G.Value], n_rows: int = N_ROWS, n_tokens: int | None = None
) -> tuple[G.Graph, np.ndarray]:
    """A graph with random weights, and a text of so many different tokens, that say clearly what is chosen."""
    while True:
        maker = Maker(rng)
        graph = maker.graph(make(maker))
        tokens = rng.integers(0, n_tokens or graph.n_vocab, n_rows)
        if not hangs_on_a_digit(graph, values_of(graph, tokens.tolist())):
            return graph, tokens


@pytest.fixture(params=["best", "plain"])
def check(request: pytest.FixtureRequest, rng: np.random.Generator) -> Iterator[Callable[..., None]]:
    """Builds a graph, and compares what the engine makes of it with the definition; also cut into batches."""

    def compare(make: Callable[[Maker], G.Value], tolerance: float = 1e-5, cache_type: str = "f16") -> None:
        if request.param == "plain" and cache_type != "f16" and not ALL_FORMS:
            pytest.skip("quantised caches in the plain form: make test-forms")
        graph, tokens = drawn(rng, make)
        expected = forward(graph, tokens.tolist())
        target = host_target(request.param)
        runtime = Runtime(graph, threads=2, context=64, batch=32, target=target, cache_type=cache_type)
        result = runtime.evaluate(runtime.sequence(), tokens, "all")
        assert result is not None
        if tolerance < 0.1:
            np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
        else:  # of four bits, one value may be far off; as a whole: 0.095 +- 0.012 of 3,000 draws, at most 0.144
            assert np.linalg.norm(result - expected) <= tolerance * np.linalg.norm(expected)
        sequence = runtime.sequence()
        parts = [runtime.evaluate(sequence, tokens[a:b], "all") for a, b in ((0, 1), (1, 9), (9, 10), (10, N_ROWS))]
        assert np.array_equal(np.concatenate(parts), result)  # type: ignore[arg-type]
        runtime.close()

    yield compare


@pytest.mark.parametrize(("width", "groups"), [(64, 1), (97, 1), (60, 4), (99, 3)])
@pytest.mark.parametrize("kind", ["both", "weight", "neither", "rows", "rows of weight"])
def test_norms(check: Any, width: int, groups: int, kind: str) -> None:
    """rows: a weight, or also a bias, of its own for each group."""
    size = width // groups
    shape = (groups, size) if kind.startswith("rows") else (size,)

    def make(maker: Maker) -> G.Value:
        weight = None if kind == "neither" else maker.constant(*shape)
        bias = maker.constant(*shape) if kind in ("both", "rows") else None
        x = maker.embed(width)
        y = maker.add(G.LayerNorm(maker.value(width), x, weight, bias, 1e-5, groups))
        z = maker.add(G.RMSNorm(maker.value(width), x, weight, 1e-5, groups, bias))
        return maker.add(G.Add(maker.value(width), y, z))

    check(make)


@pytest.mark.parametrize("kind", ["silu", "gelu", "relu", "clamped_silu", "limited_silu", "swiglu_oai", "situ"])
def test_gated_activations(check: Any, kind: Any) -> None:
    def make(maker: Maker) -> G.Value:
        gate, up = (maker.add(G.Scale(maker.value(61), maker.embed(61), 10.0)) for _ in range(2))
        return maker.add(G.Activate(maker.value(61), gate, up, kind, 2.0, 3.0))

    check(make)


@pytest.mark.parametrize("kind", ["gelu", "relu", "relu_squared", "sigmoid", "xielu", "signed_root", "exp"])
def test_activations_that_multiply_nothing(check: Any, kind: Any) -> None:
    def make(maker: Maker) -> G.Value:
        x = maker.add(G.Scale(maker.value(61), maker.embed(61), 4.0))
        parameters = np.array([0.9, 0.7, 0.5, -1e-6], np.float32) if kind == "xielu" else None
        return maker.linear(maker.add(G.ActivateAlone(maker.value(61), x, kind, parameters)), 48)

    check(make)


@pytest.mark.parametrize("kind", ["sigmoid", "softplus"])
@pytest.mark.parametrize("width", [1, 5, 95])
def test_gates(check: Any, kind: Any, width: int) -> None:
    """One for a row, for each of five heads, or for each value."""

    def make(maker: Maker) -> G.Value:
        gate = maker.add(G.Scale(maker.value(width), maker.embed(width), 8.0))
        return maker.linear(maker.add(G.Gate(maker.value(95), gate, maker.embed(95), kind)), 48)

    check(make)


def test_clamps(check: Any) -> None:
    check(lambda maker: maker.add(G.Clamp(maker.value(61), maker.embed(61), 0.2)))


@pytest.mark.parametrize("kind", ["weight", "bias", "both"])
def test_rows_times_a_row_and_plus_a_row(check: Any, kind: str) -> None:
    def make(maker: Maker) -> G.Value:
        weight, bias = (maker.constant(61) if kind in (name, "both") else None for name in ("weight", "bias"))
        return maker.add(G.Affine(maker.value(61), maker.embed(61), weight, bias))

    check(make)


@pytest.mark.parametrize(("n_out", "n_in"), [(1, 4), (4, 1), (3, 5)])
@pytest.mark.parametrize("added", [False, True])
def test_streams_are_mixed_by_weights_of_each_row(check: Any, n_out: int, n_in: int, added: bool) -> None:
    width = 37

    def make(maker: Maker) -> G.Value:
        x, weights = maker.embed(n_in * width), maker.embed(n_out * n_in)
        add = maker.embed(n_out * width) if added else None
        return maker.linear(maker.add(G.Mix(maker.value(n_out * width), x, weights, add, n_out)), 48)

    check(make)


def test_an_activation_whose_second_limit_is_none(check: Any) -> None:
    def make(maker: Maker) -> G.Value:
        return maker.add(G.Activate(maker.value(61), maker.embed(61), maker.embed(61), "situ", 1.5))

    check(make)


@pytest.mark.parametrize(("n", "width"), [(1, 64), (5, 37)])
def test_streams_are_mixed_by_how_well_they_fit(check: Any, n: int, width: int) -> None:
    def make(maker: Maker) -> G.Value:
        x, z = maker.embed(n * width), maker.embed(width)
        weight = maker.constant(width)
        return maker.linear(maker.add(G.MixByScore(maker.value(width), x, z, weight, 1e-5)), 48)

    check(make)


@pytest.mark.parametrize(("n", "rounds"), [(4, 20), (5, 2), (3, 1)])
def test_a_matrix_of_each_row_is_balanced(check: Any, n: int, rounds: int) -> None:
    check(lambda maker: maker.add(G.Balance(maker.value(n * n), maker.embed(n * n), n, rounds, 1e-6)))


@pytest.mark.parametrize("groups", [1, 3])
def test_groups_made_as_long_as_a_row(check: Any, groups: int) -> None:
    def make(maker: Maker) -> G.Value:
        return maker.add(G.MatchMagnitude(maker.value(groups * 37), maker.embed(groups * 37), maker.embed(37)))

    check(make)


@pytest.mark.parametrize("deviations", [1.6, 0.0, -0.5])
def test_what_exceeds_the_mean(check: Any, deviations: float) -> None:
    check(lambda maker: maker.add(G.GaussianTopK(maker.value(61), maker.embed(61), deviations)))


@pytest.mark.parametrize(("groups", "size"), [(1, 61), (5, 16), (7, 3)])
def test_sums_of_products_of_groups(check: Any, groups: int, size: int) -> None:
    def make(maker: Maker) -> G.Value:
        a, b = (maker.embed(groups * size) for _ in range(2))
        return maker.linear(maker.add(G.Dot(maker.value(groups), a, b)), 48)

    check(make)


def test_learned_positions(check: Any) -> None:
    def make(maker: Maker) -> G.Value:
        tokens, positions = maker.embed(36), maker.embed(36, by_position=True)
        return maker.add(G.Add(maker.value(36), tokens, positions))

    check(make)


def test_no_more_context_than_there_are_learned_positions(rng: np.random.Generator) -> None:
    maker = Maker(rng)
    graph = maker.graph(maker.embed(36, by_position=True))
    with pytest.raises(ValueError, match="the model has 64 positions: a context of 65 is not supported"):
        Runtime(graph, threads=1, context=65)


@pytest.mark.parametrize(("start", "columns"), [(0, 12), (3, 9), (5, 4)])
def test_a_matrix_for_each_head(check: Any, start: int, columns: int) -> None:
    def make(maker: Maker) -> G.Value:
        x = maker.embed(5 * 12)
        return maker.add(G.HeadLinear(maker.value(5 * 7), x, maker.weight("heads", 5, 7, columns), start))

    check(make)


@pytest.mark.parametrize("kind", ["one", "all", "none", "repeated"])
def test_heads_are_joined(check: Any, kind: str) -> None:
    """To a part of the only head of another, of each of its heads, or to nothing; or only that one is repeated."""

    def make(maker: Maker) -> G.Value:
        if kind == "repeated":
            x = maker.embed(41)
            return maker.linear(maker.add(G.Join(maker.value(3 * 41), x, x, 3, range(0), range(41), 1)), 32)
        x, z = maker.embed(3 * 10), None if kind == "none" else maker.embed(6 if kind == "one" else 3 * 6)
        of_z = range(0) if kind == "none" else range(1, 6)
        out = maker.value(3 * (7 + len(of_z)))
        joined = maker.add(G.Join(out, x, z, 3, range(2, 9), of_z, 3 if kind == "all" else 1))
        return maker.linear(joined, 32)

    check(make)


@pytest.mark.parametrize("interleaved", [True, False])
def test_only_a_part_of_each_head_turns(check: Any, interleaved: bool) -> None:
    def make(maker: Maker) -> G.Value:
        frequencies = np.array([1.0, 0.3, 0.02], np.float32)
        temperature = G.Temperature(0.5, 7)
        rope = G.Rope(maker.value(33), maker.embed(33), 11, 6, interleaved, frequencies, 1.2, temperature, 4)
        return maker.add(rope)

    check(make)


def heads(maker: Maker, cache: G.CacheLayer) -> tuple[G.Value, G.Value, G.Value]:
    x = maker.embed(32)
    q = maker.linear(x, cache.n_heads * cache.head_dim_k)
    k = maker.linear(x, cache.n_kv_heads * cache.head_dim_k)
    v = maker.linear(x, cache.n_kv_heads * cache.head_dim_v)
    return q, k, v


@pytest.mark.parametrize("cache", [G.CacheLayer(6, 2, 20, 12, None), G.CacheLayer(4, 4, 32, 32, 5)])
@pytest.mark.parametrize("kind", ["sinks", "slopes", "both"])
def test_attention_with_sinks_and_slopes(check: Any, cache: G.CacheLayer, kind: str) -> None:
    def make(maker: Maker) -> G.Value:
        q, k, v = heads(maker, cache)
        maker.caches.append(cache)
        sinks = maker.constant(cache.n_heads) * 3 if kind != "slopes" else None
        slopes = np.abs(maker.constant(cache.n_heads)) if kind != "sinks" else None
        out = maker.value(cache.n_heads * cache.head_dim_v)
        return maker.add(G.Attention(out, q, k, v, 0, 0.4, None, sinks, slopes))

    check(make, 2e-3)  # the cache is float16


@pytest.mark.parametrize("cache", [G.CacheLayer(6, 1, 45, 33, None), G.CacheLayer(8, 2, 40, 40, 5)])
@pytest.mark.parametrize(("cache_type", "tolerance"), [("f16", 2e-3), ("q8_0", 2e-2), ("q4_0", 0.2)])
def test_attention_whose_values_are_a_part_of_keys(
    check: Any, cache: G.CacheLayer, cache_type: str, tolerance: float
) -> None:
    cache = replace(cache, values_in_keys=True)

    def make(maker: Maker) -> G.Value:
        q, k, _ = heads(maker, cache)
        maker.caches.append(cache)
        return maker.add(G.Attention(maker.value(cache.n_heads * cache.head_dim_v), q, k, None, 0, 0.4, None))

    check(make, tolerance, cache_type)


@pytest.mark.parametrize("values_in_keys", [False, True])
def test_attention_that_needs_every_digit(check: Any, values_in_keys: bool) -> None:
    cache = G.CacheLayer(6, 2, 20, 12, None, values_in_keys=values_in_keys, precise=True)

    def make(maker: Maker) -> G.Value:
        q, k, v = heads(maker, cache)
        maker.caches.append(cache)
        return maker.add(G.Attention(maker.value(72), q, k, None if values_in_keys else v, 0, 0.4, None))

    check(make)


@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
def test_attention_within_chunks(check: Any, chunk: int) -> None:
    cache = G.CacheLayer(6, 2, 20, 12, chunk, chunked=True)

    def make(maker: Maker) -> G.Value:
        q, k, v = heads(maker, cache)
        maker.caches.append(cache)
        return maker.add(G.Attention(maker.value(72), q, k, v, 0, 0.4, None))

    check(make, 2e-3)


def test_attention_to_the_keys_and_values_of_an_earlier_layer(check: Any) -> None:
    cache = G.CacheLayer(4, 2, 16, 16, None)

    def make(maker: Maker) -> G.Value:
        q, k, v = heads(maker, cache)
        maker.caches.append(cache)
        y = maker.add(G.Attention(maker.value(64), q, k, v, 0, 0.25, None))
        return maker.add(G.Attention(maker.value(64), maker.linear(y, 64), None, None, 0, 0.25, None))

    check(make, 2e-3)


@pytest.mark.parametrize(("every", "overlap", "width"), [(4, True, 40), (4, True, 13), (5, False, 32), (1, True, 3)])
@pytest.mark.parametrize("cache_type", ["f16", "q4_0"])
def test_rows_of_several_positions_as_one(
    check: Any, every: int, overlap: bool, width: int, cache_type: str
) -> None:
    def make(maker: Maker) -> G.Value:
        kept = 2 * width if overlap else width
        x, scores = maker.embed(kept), maker.embed(kept)
        maker.caches.append(
            G.CacheLayer(2, 2, kept, kept, 2 * every if overlap else every, values_in_keys=True, exact=True)
        )
        y = maker.add(G.Pool(maker.value(width), x, scores, maker.constant(every, kept), every, overlap, 0))
        return maker.linear(y, 36)

    check(make, cache_type=cache_type)


@pytest.mark.parametrize(("cache_type", "tolerance"), [("f16", 2e-3), ("q8_0", 3e-2)])
@pytest.mark.parametrize(("heads", "every", "window"), [(6, 4, 7), (3, 1, 2), (4, 30, 5)])
def test_attention_to_entries_beside_a_window(
    check: Any, heads: int, every: int, window: int, cache_type: str, tolerance: float
) -> None:
    """With 30 positions for each, there are none yet."""
    cache = G.CacheLayer(heads, 1, 44, 44, window, values_in_keys=True)

    def make(maker: Maker) -> G.Value:
        q, k, entries = (maker.linear(maker.embed(32), width) for width in (heads * 44, 44, 44))
        maker.caches += [cache, replace(cache, window=None, every=every)]
        out, sinks = maker.value(heads * 44), maker.constant(heads)
        return maker.add(G.Attention(out, q, k, None, 0, 0.4, None, sinks, entries=entries, entries_layer=1))

    check(make, tolerance, cache_type)


def test_rows_may_turn_as_those_before_them(check: Any) -> None:
    def make(maker: Maker) -> G.Value:
        x, frequencies = maker.embed(48), np.array([1.0, 0.3, 0.01], np.float32)
        y = maker.add(G.Rope(maker.value(48), x, 16, 6, True, frequencies, 1.0, start=4, behind=3))
        return maker.add(G.Rope(maker.value(48), y, 16, 6, False, -frequencies, 1.0))

    check(make)


def experts(maker: Maker, **options: Any) -> G.Value:
    """Three of twelve, each 20 wide, over rows of 36.

    `joined` gate and up, or `ungated`; `adjusted` products, `apart` routing, and choices that are the same `together`.
    `by_token`: there is no choice.
    """
    n, width, ff = 12, 36, 20
    n_matrices = n // options.get("together", 1)
    joined, ungated, adjusted, apart = (options.pop(name, False) for name in ("joined", "ungated", "adjusted", "apart"))
    x = options.pop("x", None) or maker.embed(width)
    if apart:
        options["router_x"] = maker.embed(24)
    router = maker.weight("router", n, 24 if apart else width)
    gate = None if ungated else maker.weight("gate", n_matrices, ff * (1 + joined), width)
    up = gate if gate is not None and joined else maker.weight("up", n_matrices, ff, width)
    down = maker.weight("down", n_matrices, width, ff)
    if adjusted:
        options["adjustments"] = (
            G.Adjustment(gate or up, None, maker.constant(n, (gate or up).shape[1])),
            G.Adjustment(down, np.abs(maker.constant(n)), maker.constant(n, width)),
        )
    if options.pop("biased", False):
        options["selection_bias"] = maker.constant(n)
    if options.pop("by_token", False):
        options["by_token"] = np.stack([maker.rng.permutation(n)[:3] for _ in range(N_VOCAB)]).astype(np.int32)
    settings = {"kind": "silu", "normalize": True, "gating": "softmax"} | options
    kind, normalize, gating = (settings.pop(name) for name in ("kind", "normalize", "gating"))
    moe = G.MoE(
        maker.value(width), x, router, None, gate, up, down, 3, kind, normalize, 1.7, gating, **settings
    )  # fmt: skip
    return maker.add(moe)


@pytest.mark.parametrize(
    "options",
    [
        {"biased": True, "gating": "sigmoid"},
        {"biased": True, "normalize": False},
        {"n_groups": 4, "n_groups_used": 2, "gating": "sigmoid"},
        {"n_groups": 3, "n_groups_used": 2, "biased": True, "gating": "sigmoid"},
        {"n_groups": 6, "n_groups_used": 3},
        {"n_groups": 3, "n_groups_used": 2, "gating": "softmax_of_chosen", "normalize": False},
        {"n_groups": 4, "n_groups_used": 2, "gating": "sigmoid_of_chosen", "weigh_inputs": True},
        {"gating": "softmax_of_chosen", "biased": True},
        {"biased": True, "gating": "sqrt_softplus"},
        {"by_token": True, "gating": "sqrt_softplus"},
        {"joined": True},
        {"adjusted": True},
        {"joined": True, "adjusted": True, "kind": "swiglu_oai"},
        {"apart": True, "kind": "relu"},
        {"kind": "clamped_silu", "limit": 0.1, "joined": True},
        {"kind": "situ", "limit": 0.3, "up_limit": 0.5, "apart": True},
        {"weigh_inputs": True, "gating": "sigmoid", "normalize": False},
        {"weigh_inputs": True, "joined": True, "kind": "limited_silu", "limit": 0.2},
        {"together": 4, "apart": True},
        {"ungated": True, "kind": "gelu"},
        {"ungated": True, "kind": "relu_squared", "apart": True, "biased": True, "gating": "sigmoid"},
        {"ungated": True, "kind": "relu_squared", "adjusted": True},
        {"ungated": True, "kind": "gelu", "weigh_inputs": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_experts(check: Any, options: dict[str, Any]) -> None:
    check(lambda maker: experts(maker, **options))
