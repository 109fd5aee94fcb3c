"""Vectors of texts: many texts in few steps, each with the bits that it has alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from qrun.engine.errors import ContextOverflow
from qrun.engine.native.locks import ForkAwareLock
from qrun.engine.program.runtime import Part, Runtime
from qrun.models.pooling import Pooling, PoolingKind

STEP_ROWS = 512
"""Rows of a step of several texts: with more, what a layer leaves for the next one has left the cache."""

Vector = NDArray[np.float32]


class Embedder:
    """Makes vectors of tokens, with a runtime whose graph ends in rows. For any number of threads."""

    def __init__(self, runtime: Runtime, pooling: Pooling, *, owned: bool) -> None:
        """owned: `close` closes the runtime, too."""
        self.runtime, self.pooling, self._owned = runtime, pooling, owned
        self._lock = ForkAwareLock()  # the runtime's result is in memory that is used again

    @property
    def kind(self) -> PoolingKind:
        """What the file asks for; where it does not say, the mean if tokens see the whole text, else the last row."""
        if self.pooling.kind is None or self.pooling.kind == "none":
            return "last" if self.runtime.causal else "mean"
        return self.pooling.kind

    def width(self, kind: PoolingKind) -> int:
        """How many numbers a vector has."""
        steps = {"none": (), "rank": self.pooling.rank_steps}.get(kind, self.pooling.steps)
        return len(steps[-1].weight) if steps else self.runtime.width

    def vectors(
        self, texts: Sequence[Sequence[int]], kind: PoolingKind, cancelled: Callable[[], bool] | None = None,
        names: Sequence[str] | None = None,
    ) -> list[Vector]:  # fmt: skip
        """A vector for each text's tokens; of "none", its rows [n_tokens, n_embd]. names: of the texts, for errors.

        Raises ContextOverflow for a text that is too long, ValueError for one without tokens.
        """
        for which, tokens in zip(names or names_of(len(texts)), texts, strict=True):
            if not len(tokens):
                raise ValueError(f"{which} is empty: there are no tokens to make a vector of")
            if len(tokens) > self.runtime.context:
                raise ContextOverflow(
                    f"{which} has {len(tokens)} tokens, and the context holds {self.runtime.context}",
                    len(tokens), self.runtime.context, which,
                )  # fmt: skip
        found: list[Vector | None] = [None] * len(texts)
        for numbers in self._steps([len(tokens) for tokens in texts]):
            with self._lock:
                for number, rows in zip(numbers, self._rows([texts[i] for i in numbers], kind, cancelled), strict=True):
                    found[number] = rows.copy() if kind == "none" else self.pooling.vector(rows, kind)
        return cast("list[Vector]", found)

    def _steps(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Texts to compute together, longest first: few rows are left over where short ones fill the rest."""
        most = min(STEP_ROWS, self.runtime.batch)
        waiting = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        while waiting:
            chosen, rows, left = [waiting[0]], lengths[waiting[0]], []
            for number in waiting[1:]:
                if rows + lengths[number] <= most:
                    chosen.append(number)
                    rows += lengths[number]
                else:
                    left.append(number)
            waiting = left
            yield chosen

    def _rows(
        self, texts: Sequence[Sequence[int]], kind: PoolingKind, cancelled: Callable[[], bool] | None
    ) -> list[Vector]:
        """The rows that count, of texts that fit into a step, or of one alone."""
        row = self.pooling.row_of(kind)
        sequences = [self.runtime.sequence() for _ in texts]
        try:
            if len(texts) == 1 and len(texts[0]) > self.runtime.batch:
                rows = self.runtime.evaluate(sequences[0], texts[0], "last" if row == "last" else "all", cancelled)
                assert rows is not None
                rows = rows.reshape(-1, self.runtime.width)
                return [rows[:1] if row == "cls" else rows]
            wanted = {"cls": "first", "last": "last"}.get(row, "all")
            parts = [
                Part(sequence, tokens, wanted)  # type: ignore[arg-type]
                for sequence, tokens in zip(sequences, texts, strict=True)
            ]
            return self.runtime.step(parts, cancelled)
        finally:
            for sequence in sequences:
                sequence.close()

    def close(self) -> None:
        """Free what is its own."""
        if self._owned:
            self.runtime.close()


def names_of(total: int, what: str = "text") -> list[str]:
    """What texts are called in errors: "text 2 of 3", or "the text" of a single one."""
    return [f"{what} {number} of {total}" for number in range(1, total + 1)] if total != 1 else [f"the {what}"]


def normalized(vector: Vector) -> Vector:
    """The same direction, with the length 1; 0 stays 0."""
    length = float(np.sqrt(np.sum(vector.astype(np.float64) ** 2)))
    return vector if length == 0.0 else (vector / np.float32(length)).astype(np.float32)


def numbers(vector: Vector) -> list[float]:
    """The shortest numbers that give the vector again as float32: for JSON, where they are half as long as others."""
    return [float(number) for number in map(str, vector)]
