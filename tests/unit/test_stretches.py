"""A model computed stretch by stretch: inputs of its matrices are those, to the bit, of the model as a whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from tiny_model import ARCHITECTURES

from qrun.engine.judging.scoring import Chunks
from qrun.engine.program.observing import Observation
from qrun.engine.program.runtime import Runtime
from qrun.engine.quantize.mixes import layer_of
from qrun.engine.quantize.stretches import Relay, cuts, starts
from qrun.formats import GGUFReader
from qrun.models import build_graph
from qrun.models.graph import Embed, Graph, Linear

SIZE, COUNT = 24, 2
Inputs = dict[str, list[np.ndarray]]


@contextmanager
def at_work(graph: Graph, keep: Callable[[str], bool] | None) -> Iterator[Runtime]:
    with closing(Runtime(graph, threads=2, context=SIZE, observe=keep is not None, keep=keep)) as runtime:
        yield runtime


def by_layer(graph: Graph) -> list[list[str]]:
    """The matrices that each layer has, of those with one use."""
    names = [each.weight.name for each in graph.operations if isinstance(each, Linear)]
    layers: dict[int, list[str]] = {}
    for name in names:
        if layer_of(name) >= 0 and Counter(names)[name] == 1:
            layers.setdefault(layer_of(name), []).append(name)
    return list(layers.values())


def samples(graph: Graph) -> Chunks:
    tokens = np.random.default_rng(4).integers(0, graph.n_vocab, COUNT * SIZE).tolist()
    return Chunks(tokens, SIZE, COUNT, None)


def taking(found: Inputs) -> Callable[[list[Observation]], None]:
    def take(observations: list[Observation]) -> None:
        for seen in observations:
            for name in seen.names:
                found.setdefault(name, []).append(seen.sums[: seen.counts[0]].copy())

    return take


def as_a_whole(graph: Graph, names: set[str]) -> Inputs:
    found: Inputs = {}
    with at_work(graph, names.__contains__) as runtime:
        for sample in samples(graph):
            with closing(runtime.sequence()) as sequence:
                runtime.evaluate(sequence, sample, logits="none")
                taking(found)(runtime.observations)
    return found


@pytest.mark.parametrize("model", sorted(path.stem for path in ARCHITECTURES.glob("*.gguf")))
def test_inputs_are_those_of_the_whole_model(model: str, tmp_path: Path) -> None:
    with GGUFReader(ARCHITECTURES / f"{model}.gguf") as reader:
        graph = build_graph(reader, SIZE)
        bands = by_layer(graph)
        assert len({start.at for start in starts(graph, bands)}) == len(bands) > 1
        found: Inputs = {}
        steps: list[int] = []
        relay = Relay(graph, bands, samples(graph), tmp_path / "entering", at_work)
        for number, band in enumerate(bands):
            relay.reach(number, lambda: steps.append(0))
            assert len(list(tmp_path.iterdir())) == min(number, 1)
            relay.observe(number, band, taking(found), lambda: steps.append(1))
        relay.clean()
        assert not list(tmp_path.iterdir())
        assert (steps.count(0), steps.count(1)) == ((len(bands) - 1) * COUNT, len(bands) * COUNT)
        expected = as_a_whole(graph, {name for band in bands for name in band})
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        np.testing.assert_array_equal(np.concatenate(found[name]), np.concatenate(rows))


def test_a_relay_goes_on_from_what_an_earlier_one_left(tmp_path: Path) -> None:
    with GGUFReader(ARCHITECTURES / "llama-dense.gguf") as reader:
        graph = build_graph(reader, SIZE)
        bands = by_layer(graph)
        calls: list[int] = []

        @contextmanager
        def counted(part: Graph, keep: Callable[[str], bool] | None) -> Iterator[Runtime]:
            calls.append(len(part.operations))
            with at_work(part, keep) as runtime:
                yield runtime

        for _ in range(2):
            relay = Relay(graph, bands, samples(graph), tmp_path / "entering", counted)
            relay.reach(1, lambda: None)
        assert len(calls) == 1
        (file,) = tmp_path.iterdir()
        rows = np.fromfile(file, np.float32).reshape(COUNT * SIZE, graph.n_embd)
        assert np.isfinite(rows).all() and rows.any()
        assert calls[0] < 0.7 * len(graph.operations)


def test_one_value_goes_over_a_cut() -> None:
    with GGUFReader(ARCHITECTURES / "llama-dense.gguf") as reader:
        graph = build_graph(reader, SIZE)
        found = cuts(graph)
        for cut in found:
            before = {each.out.id for each in graph.operations[: cut.at] if not isinstance(each, Embed)}
            taken = {
                value.id for each in graph.operations[cut.at :] for name, value in vars(each).items()
                if name != "out" and hasattr(value, "id")
            }  # fmt: skip
            assert cut.value is not None and before & taken == {cut.value.id}
    assert len({cut.at for cut in found}) == len(found) > 2 * len(graph.cache_layers)
