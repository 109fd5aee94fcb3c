"""A model computed stretch by stretch: what goes from one to the next is kept, so that each is computed once.

A graph can be cut where all that comes after takes one value of what comes before, as between the layers of most
models. Rows of an embedding are looked up again where they are needed. There is no cut between two layers that share
keys and values, or several streams: then what comes before is computed again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qrun.engine.judging.scoring import Chunks
from qrun.engine.program.early_selection import hidden_of_all_rows
from qrun.engine.program.observing import Observation
from qrun.engine.program.runtime import Runtime
from qrun.formats.whole_file import whole_file
from qrun.models import graph as G

F32Array = NDArray[np.float32]

# A model at work on a part of its graph: the part, and of which tensors the inputs are kept, if of any.
Open = Callable[[G.Graph, Callable[[str], bool] | None], AbstractContextManager[Runtime]]
# Gets what was observed of each step.
Take = Callable[[list[Observation]], None]
Step = Callable[[], None]


@dataclass(frozen=True)
class Cut:
    """A place in a graph: before the operation of that number. value: all that comes after takes of what comes before
    it; None at the beginning."""

    at: int
    value: G.Value | None

    @property
    def width(self) -> int:
        """Of its value."""
        return 0 if self.value is None else self.value.width


BEGINNING = Cut(0, None)


def cuts(graph: G.Graph) -> list[Cut]:
    """All places where the body of a graph can be cut."""
    operations = graph.operations
    last_use: dict[int, int] = {}
    touched: dict[str, tuple[int, int]] = {}  # what outlives a step: where it is used first and last
    for i, each in enumerate(operations):
        for name, value in vars(each).items():
            if isinstance(value, G.Value) and name != "out":
                last_use[value.id] = i
        for name in ("layer", "entries_layer", "state"):
            if isinstance(number := getattr(each, name, None), int):
                key = f"{'state' if name == 'state' else 'layer'} {number}"
                touched[key] = (touched.get(key, (i, i))[0], i)
    joined = np.zeros(len(operations) + 1, bool)
    for first, last in touched.values():
        joined[first + 1 : last + 1] = True
    found: list[Cut] = []
    alive: dict[int, G.Value] = {}
    for i, each in enumerate(operations):
        alive = {id: value for id, value in alive.items() if last_use.get(id, -1) >= i}
        if len(alive) == 1 and not joined[i]:
            found.append(Cut(i, next(iter(alive.values()))))
        if isinstance(each, G.SelectRows):
            break
        if not isinstance(each, G.Embed):
            alive[each.out.id] = each.out
    return found


def stretch(graph: G.Graph, start: Cut, end: int, out: G.Value | None = None) -> G.Graph:
    """The operations from a cut up to a number; what the cut's value has been comes in by an `Input`.

    out: what it leaves as its hidden states. Its head does nothing.
    """
    body = graph.operations[start.at : end]
    if start.value is not None:
        taken = {value.id for each in body for value in vars(each).values() if isinstance(value, G.Value)}
        before = graph.operations[: start.at]
        looked_up = [each for each in before if isinstance(each, G.Embed) and each.out.id in taken]
        body = [G.Input(start.value), *looked_up, *body]
    last = body[-1].out if out is None else out
    unused = 1 + max(each.out.id for each in graph.operations)
    selected = G.Value(unused, last.width)
    return replace(graph, operations=[*body, G.SelectRows(selected, last)], logits=selected, hidden=out)


class Relay:
    """Samples on their way through a model, band by band of its matrices, of which the first is computed first.

    What goes into a band lies in a file until a later one has been made. Matrices of the bands before may change as
    long as that is not made; those of other bands may not.
    """

    def __init__(
        self, graph: G.Graph, bands: Sequence[Collection[str]], samples: Chunks, name: Path, open: Open
    ) -> None:
        """name: of files, which get numbers behind it. open: puts a part of the graph to work."""
        self._graph, self._bands, self._samples, self._name, self._open = graph, bands, samples, name, open
        self._starts = starts(graph, bands)

    @property
    def largest_file(self) -> int:
        """Bytes of the largest file that it makes. There are two of them at most."""
        return 4 * max(start.width for start in self._starts) * len(self._samples) * self._samples.size

    def observe(self, band: int, names: Collection[str], take: Take, step: Step) -> None:
        """Shows the inputs of some of a band's matrices. step: called after each sample."""
        start = self._starts[band]
        end = 1 + max(i for i, each in enumerate(self._graph.operations) if _weight(each) in names)
        part = stretch(self._graph, start, end)
        rows = None if start.value is None else self._file(start)
        with self._open(part, set(names).__contains__) as runtime:
            for i, sample in enumerate(self._samples):
                with closing(runtime.sequence()) as sequence:
                    inputs = self._rows(rows, start, i)
                    for first in range(0, len(sample), runtime.batch):
                        of = slice(first, first + runtime.batch)
                        runtime.evaluate(
                            sequence, sample[of], logits="none", inputs=None if inputs is None else inputs[of]
                        )
                        take(runtime.observations)
                step()

    def reach(self, band: int, step: Step) -> None:
        """Makes what goes into a band, if it is not there, from the nearest before of which there is a file. What goes
        into bands before is removed."""
        goal = self._starts[band]
        before = list(dict.fromkeys(start for start in self._starts[:band] if start.at < goal.at))
        if goal.value is not None and not self._file(goal).is_file():
            there = [start for start in before if start.value is not None and self._file(start).is_file()]
            self._go(there[-1] if there else BEGINNING, goal, step)
        for start in before:
            if start.value is not None:
                self._file(start).unlink(missing_ok=True)

    def clean(self) -> None:
        """Removes all files."""
        for start in self._starts:
            self._file(start).unlink(missing_ok=True)

    def _go(self, start: Cut, goal: Cut, step: Step) -> None:
        assert goal.value is not None
        part = stretch(self._graph, start, goal.at, goal.value)
        assert hidden_of_all_rows(part)
        rows = None if start.value is None else self._file(start)
        with whole_file(self._file(goal)) as file, self._open(part, None) as runtime:

            def keep(first: int, tokens: NDArray[np.int64], hidden: F32Array) -> None:
                file.write(hidden.data)

            for i, sample in enumerate(self._samples):
                with closing(runtime.sequence()) as sequence:
                    runtime.evaluate(sequence, sample, logits="none", inputs=self._rows(rows, start, i), tap=keep)
                step()

    def _file(self, start: Cut) -> Path:
        return self._name.with_name(f"{self._name.name}-{start.at}")

    def _rows(self, path: Path | None, start: Cut, number: int) -> F32Array | None:
        """Of a sample."""
        if path is None:
            return None
        size = self._samples.size * start.width
        rows = np.fromfile(path, np.float32, size, offset=4 * size * number)
        return rows.reshape(self._samples.size, start.width)


def starts(graph: G.Graph, bands: Sequence[Collection[str]]) -> list[Cut]:
    """Where to begin for each of some bands of matrices, the first in the graph first: the narrowest cut before it and
    behind the band before, or if there is none the place where that begins."""
    places = {name: i for i, each in enumerate(graph.operations) if (name := _weight(each)) is not None}
    found = cuts(graph)
    result = [BEGINNING]
    for earlier, band in itertools.pairwise(bands):
        first, last = min(map(places.__getitem__, band)), max(map(places.__getitem__, earlier))
        between = [cut for cut in found if last < cut.at <= first]
        result.append(min(between, key=lambda cut: cut.width, default=result[-1]))
    return result


def _weight(operation: G.Operation) -> str | None:
    return operation.weight.name if isinstance(operation, G.Linear) else None
