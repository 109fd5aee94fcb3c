"""Attention to chosen positions: by an index of keys, in any batch to the same bits."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_operations import Maker, drawn

from qrun.engine.program.runtime import Runtime
from qrun.engine.simd.target import host_target
from qrun.models import graph as G
from tests.reference import forward, mask_of, values_of

N_ROWS, CONTEXT = 47, 64
PLAIN = G.CacheLayer(6, 2, 37, 21, None)
SHORT_ROWS = G.CacheLayer(6, 1, 45, 33, None, values_in_keys=True)
INDEXES = {
    "positions": G.Index(5, 19, 7),
    "one position": G.Index(5, 40, 1),
    "many heads": G.Index(19, 8, 12),
    "blocks": G.Index(5, 16, 3, block=6, clipped=False),
    "blocks of each head": G.Index(10, 17, 2, block=5, n_local=1, n_groups=2, clipped=False),
    "a key for some": G.Index(5, 33, 4, every=3),
    "a block of keys for some": G.Index(5, 9, 2, every=2, block=3),
}


def sparse(maker: Maker, cache: G.CacheLayer, index: G.Index, *, weighted: bool, sinks: bool = False) -> G.Value:
    """What is chosen follows from tokens, which repeat: of equal scores it must be the first. Values do not repeat."""
    tokens, places = maker.embed(32), maker.embed(32, by_position=True)
    x = maker.add(G.Add(maker.value(32), tokens, places))
    asked, keys = maker.linear(tokens, index.n_heads * index.dim), maker.linear(tokens, index.dim)
    weights = maker.linear(tokens, index.n_heads) if weighted else None
    maker.caches.append(G.CacheLayer(index.n_heads, 1, index.dim, 0, None, half=True, every=index.every))
    chosen = maker.value(index.n_groups * (1 + index.most))
    maker.add(G.Choose(chosen, asked, keys, weights, 0, index))
    q = maker.linear(x, cache.n_heads * cache.head_dim_k)
    k = maker.linear(x, cache.n_kv_heads * cache.head_dim_k)
    v = None if cache.values_in_keys else maker.linear(x, cache.n_kv_heads * cache.head_dim_v)
    out = maker.value(cache.n_heads * cache.head_dim_v)
    entries = None
    if index.of_entries:
        entries = maker.linear(x, k.width)
        maker.caches.append(replace(cache, window=None, every=index.every))
    maker.caches.append(cache)
    return maker.add(
        G.Attention(
            out, q, k, v, len(maker.caches) - 1, 0.4, None, maker.constant(cache.n_heads) if sinks else None,
            entries=entries, entries_layer=1 if entries else None, chosen=chosen, index=index,
        )
    )  # fmt: skip


def check(graph: G.Graph, tokens: np.ndarray, tolerance: float, form: str, cache_type: str = "f16") -> None:
    """What the engine makes of it is what the plain forward pass does, and it has the same bits in other batches: of
    one row, of few, and of so many that each thread takes a whole one."""
    expected = forward(graph, tokens.tolist())
    results = []
    for threads, batch in ((2, 64), (1, 9)):
        runtime = Runtime(
            graph, threads=threads, context=CONTEXT, batch=batch, target=host_target(form), cache_type=cache_type
        )
        results.append(runtime.evaluate(runtime.sequence(), tokens, "all"))
        if threads == 2:
            sequence = runtime.sequence()
            ends = [0, 1, 5, 6, 23, 24, 25, len(tokens)]
            parts = [runtime.evaluate(sequence, tokens[a:b], "all") for a, b in itertools.pairwise(ends)]
            results.append(np.concatenate(parts))  # type: ignore[arg-type]
        runtime.close()
    np.testing.assert_allclose(results[0], expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())
    assert all(np.array_equal(result, results[0]) for result in results)


@pytest.mark.parametrize(("name", "form"), [*((name, "best") for name in INDEXES), ("positions", "plain")])
def test_rows_attend_to_what_is_chosen(rng: np.random.Generator, name: str, form: str) -> None:
    index = INDEXES[name]
    cache = replace(PLAIN if index.n_groups > 1 or name == "positions" else SHORT_ROWS, exact=True)
    options = {"weighted": index.block == 1, "sinks": name == "many heads"}
    graph, tokens = drawn(rng, lambda maker: sparse(maker, cache, index, **options), N_ROWS, 20)
    check(graph, tokens, 1e-4, form)
    chosen = next(operation for operation in graph.operations if isinstance(operation, G.Choose))
    mask = mask_of(values_of(graph, tokens.tolist())[chosen.out.id], index)
    first = index.start
    assert (mask[:, -1].sum(-1) <= index.most).all() and index.most < N_ROWS
    assert mask[:, :first].all() and not mask[:, first, : first + 1].all()


@pytest.mark.parametrize(("cache_type", "tolerance"), [("f16", 4e-3), ("q8_0", 3e-2), ("q4_0", 0.3)])
@pytest.mark.parametrize("cache", [PLAIN, SHORT_ROWS], ids=["plain", "short rows"])
def test_in_caches_of_all_types(
    rng: np.random.Generator, cache: G.CacheLayer, cache_type: str, tolerance: float
) -> None:
    graph, tokens = drawn(rng, lambda maker: sparse(maker, cache, INDEXES["positions"], weighted=True), N_ROWS, 20)
    check(graph, tokens, tolerance, "best", cache_type)


@pytest.mark.parametrize(("every", "window"), [(4, 6), (1, 3)])
def test_entries_are_chosen_beside_a_window(rng: np.random.Generator, every: int, window: int) -> None:
    cache = G.CacheLayer(5, 1, 44, 44, window, values_in_keys=True, exact=True)
    index = G.Index(3, 20, 5, every=every, of_entries=True)
    graph, tokens = drawn(rng, lambda maker: sparse(maker, cache, index, weighted=True, sinks=True), N_ROWS, 20)
    check(graph, tokens, 1e-4, "best")


def test_a_context_of_many_pages(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are scored for a row at a time: in any batch, with others, forked and cut, to the same bits."""
    n = 1100

    def embed(maker: Maker, width: int, by_position: bool = False) -> G.Value:
        weight = maker.weight(f"embed{len(maker.operations)}", n if by_position else 40, width)
        return maker.add(G.Embed(maker.value(width), weight, 3.0, by_position))

    monkeypatch.setattr(Maker, "embed", embed)
    graph = (maker := Maker(rng)).graph(sparse(maker, PLAIN, replace(INDEXES["positions"], budget=70), weighted=True))
    tokens = rng.integers(0, 20, n)
    runtime = Runtime(graph, threads=2, context=n)
    whole = runtime.evaluate(runtime.sequence(), tokens, "all")
    assert whole is not None
    sequence, short = runtime.sequence(), runtime.sequence()
    ends = [0, 63, 66, 70, 71, 88, 600, 616, 633, 1030, 1040, n]
    parts = [runtime.evaluate(sequence, tokens[a:b], "all") for a, b in itertools.pairwise(ends)]
    assert np.array_equal(np.concatenate(parts), whole)  # type: ignore[arg-type]
    assert sequence.truncate(1050) == 1050
    twin = sequence.fork()
    runtime.evaluate(sequence, tokens[:20])
    together = runtime.evaluate_together([twin, short], [int(tokens[1050]), int(tokens[0])])
    assert np.array_equal(together, whole[[1050, 0]])
    assert np.array_equal(runtime.evaluate(twin, tokens[1051:], "all"), whole[1051:])  # type: ignore[arg-type]
    runtime.close()
    expected = forward(graph, tokens.tolist())
    assert ((whole - expected) ** 2).sum() < 1e-5 * (expected**2).sum()


def test_before_the_budget_is_used_up_nothing_changes(rng: np.random.Generator) -> None:
    """The bits are those of a graph without an index."""
    maker = Maker(rng)
    y = sparse(maker, PLAIN, INDEXES["positions"], weighted=True)
    graph = maker.graph(y)
    operations = [
        replace(o, chosen=None, index=None) if isinstance(o, G.Attention) else o
        for o in graph.operations if not isinstance(o, G.Choose)
    ]  # fmt: skip
    tokens = rng.integers(0, 20, INDEXES["positions"].start)
    results: list[Any] = []
    for each in (graph, replace(graph, operations=operations)):
        runtime = Runtime(each, threads=2, context=CONTEXT)
        results.append(runtime.evaluate(runtime.sequence(), tokens, "all"))
        runtime.close()
    assert np.array_equal(*results)


def test_scores_that_are_not_numbers_choose_nothing_that_is_not_there(rng: np.random.Generator) -> None:
    maker = Maker(rng)
    graph = maker.graph(sparse(maker, PLAIN, INDEXES["positions"], weighted=True))
    weights = next(o.weights for o in graph.operations if isinstance(o, G.Choose))
    made = next(o for o in graph.operations if isinstance(o, G.Linear) and o.out is weights)
    made.weight.raw.view(np.float32)[:] = np.nan
    runtime = Runtime(graph, threads=2, context=CONTEXT)
    result = runtime.evaluate(runtime.sequence(), rng.integers(0, 20, N_ROWS), "all")
    assert result is not None and result.shape == (N_ROWS, 40)
    runtime.close()


def test_sequences_are_forked_cut_saved_and_computed_together(rng: np.random.Generator) -> None:
    maker = Maker(rng)
    graph = maker.graph(sparse(maker, SHORT_ROWS, INDEXES["a key for some"], weighted=True))
    runtime = Runtime(graph, threads=2, context=CONTEXT)
    tokens = rng.integers(0, 20, N_ROWS)
    whole = runtime.evaluate(runtime.sequence(), tokens, "all")
    assert whole is not None
    sequence = runtime.sequence()
    runtime.evaluate(sequence, tokens[:30])
    twin, other = sequence.fork(), runtime.sequence()
    other.restore(sequence.state())
    runtime.evaluate(sequence, rng.integers(0, 20, 9))  # which the twin does not see
    assert sequence.truncate(30) == 30
    assert sequence.truncate(20) == 20
    assert np.array_equal(runtime.evaluate(sequence, tokens[20:], "all"), whole[20:])  # type: ignore[arg-type]
    assert np.array_equal(runtime.evaluate(twin, tokens[30:], "all"), whole[30:])  # type: ignore[arg-type]
    assert np.array_equal(runtime.evaluate(other, tokens[30:40], "all"), whole[30:40])  # type: ignore[arg-type]
    together = runtime.evaluate_together([other, runtime.sequence()], [int(tokens[40]), int(tokens[0])])
    assert np.array_equal(together, whole[[40, 0]])
    runtime.close()
