"""Rows are dropped behind the last attention: the same bits, from fewer operations on all rows."""

from pathlib import Path

import numpy as np
import pytest
from test_operations import Maker, experts, heads

from qrun.engine.program.early_selection import select_early
from qrun.engine.program.runtime import Runtime
from qrun.formats import GGUFReader, TensorType
from qrun.models import build_graph
from qrun.models import graph as G

FILES = sorted((Path(__file__).parents[1] / "data" / "arch").glob("*.gguf"))


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def graph(request: pytest.FixtureRequest) -> G.Graph:
    return build_graph(GGUFReader(request.param), 128)


def test_only_what_attention_needs_is_left_before_it(graph: G.Graph) -> None:
    early = select_early(graph)
    kinds = [type(operation) for operation in early.operations]
    first = kinds.index(G.SelectRows)
    assert kinds[first - 1] is G.Attention
    assert kinds[first : first + 2] == [G.SelectRows, G.SelectRows]  # what attention gave, and what it is added to
    assert kinds.count(G.SelectRows) == 2 and G.Attention not in kinds[first:]
    made = {operation.out.id for operation in early.operations[:first]}
    for operation in early.operations[first + 2 :]:
        inputs = {v.id for name, v in vars(operation).items() if name != "out" and isinstance(v, G.Value)}
        assert inputs and not inputs & made
    assert len(early.operations) == len(graph.operations) + 1
    assert early.operations[-1].out is early.logits


def test_logits_are_those_of_all_rows(graph: G.Graph, rng: np.random.Generator) -> None:
    """What observes selects no rows before the head."""
    tokens = rng.integers(0, graph.n_vocab, 40)
    late, early = (Runtime(graph, threads=2, context=128, observe=observe) for observe in (True, False))
    expected = late.evaluate(late.sequence(), tokens, "all")
    assert expected is not None
    assert np.array_equal(early.evaluate(early.sequence(), tokens, "all"), expected)
    sequence = early.sequence()
    assert early.evaluate(sequence, tokens[:17], "none") is None
    assert np.array_equal(early.evaluate(sequence, tokens[17:39]), expected[38])
    assert np.array_equal(early.evaluate(sequence, tokens[39:]), expected[39])
    late.close()
    early.close()


@pytest.mark.parametrize("kind", ["turns", "by token", "by position"])
def test_what_depends_on_its_place_has_all_rows(kind: str, rng: np.random.Generator) -> None:
    maker = Maker(rng)
    q, k, v = heads(maker, cache := G.CacheLayer(4, 2, 16, 16, None))
    maker.caches.append(cache)
    x = maker.add(G.Attention(maker.value(64), q, k, v, 0, 0.25, None))
    if kind == "turns":
        x = maker.add(G.Rope(maker.value(64), x, 16, 8, True, np.ones(4, np.float32), 1.0))
    elif kind == "by token":
        x = experts(maker, by_token=True, x=maker.linear(x, 36))
    else:
        x = maker.add(G.Add(maker.value(64), x, maker.embed(64, by_position=True)))
    runtime = Runtime(maker.graph(x), threads=2, context=64)
    tokens = rng.integers(0, 40, 40)
    expected = runtime.evaluate(runtime.sequence(), tokens, "all")
    assert expected is not None
    assert np.array_equal(runtime.evaluate(runtime.sequence(), tokens), expected[-1])
    runtime.close()


def test_a_graph_without_attention_stays_as_it_is() -> None:
    x = G.Value(0, 4)
    weight = G.Weight("w", TensorType.F32, (3, 4), np.zeros(48, np.uint8))
    graph = G.Graph("test", [G.Embed(x, weight, 1.0)], x, [], 3, 4, 8)
    assert select_early(graph) is graph
