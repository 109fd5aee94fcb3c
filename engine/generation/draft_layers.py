"""Guesses from draft layers of a model's own file (see `models.drafts`).

They read along with the model. A row of theirs takes the model's hidden state at the position before, so all rows that
the model has evaluated go through them, too; a few at once, or when somebody asks for a guess. While they guess, their
own hidden states stand in for the model's. What they made of those is forgotten when the model has gone on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qrun.engine.generation.draft import Reading

if TYPE_CHECKING:
    from qrun.engine.program.kv_cache import KVSequence
    from qrun.engine.program.runtime import Runtime, Tap

_WAITING = 64  # rows that are not evaluated before somebody needs them, at most


class LayersDrafter:
    """The draft layers of one session. Each has a sequence of its own, all of them with the same past.

    A single layer guesses token after token. Of several, each guesses one: the second goes on from what the first made
    of all tokens since the model's last, and so on.
    """

    def __init__(self, runtimes: Sequence[Runtime], sequences: Sequence[KVSequence] | None = None) -> None:
        self._runtimes = runtimes
        self._sequences = sequences or [runtime.sequence() for runtime in runtimes]
        self._width = runtimes[0].graph.n_embd
        # Positions count from where the text was when the layers began to read: what they see is relative to that.
        self._start = 0
        self._n_read = 0  # of the model's rows
        self._tokens = np.empty(0, np.int64)  # of rows that wait
        self._hidden = np.empty((0, self._width), np.float32)  # the model's, of these rows
        self._before = np.zeros(self._width, np.float32)  # and of the row before them
        self._guessed: list[int] = []  # the model's last token, and guesses
        self._states: list[NDArray[np.float32]] = []  # from which each of these goes on

    @property
    def tap(self) -> Tap:
        """What is to be told of all that the model evaluates."""
        return self.take

    def take(self, position: int, tokens: NDArray[np.int64], hidden: NDArray[np.float32]) -> None:
        """The model has evaluated tokens from a position on."""
        self._go_back(position)
        if len(self._tokens) + len(tokens) > _WAITING:
            self._read_waiting()
        self._tokens = np.concatenate([self._tokens, tokens])
        self._hidden = np.concatenate([self._hidden, hidden])

    def read(self, text: list[int], most: int, cancelled: Callable[[], bool]) -> Reading:
        self._go_back(len(text) - 1)
        evaluated = len(self._tokens) + 1
        self._read_waiting()
        self._guessed, self._states = [], [self._before]
        room = min(sequence.returnable(self._n_read) for sequence in self._sequences)
        room = min(room, len(self._runtimes)) if len(self._runtimes) > 1 else room
        if not room:  # a window would move on for good
            return Reading(np.empty(0, np.float32), 0, evaluated - 1)
        return Reading(self.follow(text[-1]), room, evaluated)

    def follow(self, token: int) -> np.ndarray:
        self._guessed.append(token)
        number = len(self._guessed) - 1
        if len(self._runtimes) > 1:
            runtime, sequence, first = self._runtimes[number], self._sequences[number], 0
        else:
            runtime, sequence, first = self._runtimes[0], self._sequences[0], number
        logits = runtime.evaluate(
            sequence, self._guessed[first:], inputs=np.stack(self._states[first:]),
            tap=lambda position, tokens, hidden: self._states.append(hidden[-1]),
        )  # fmt: skip
        assert logits is not None
        return logits

    def fork(self) -> LayersDrafter:
        twin = LayersDrafter(self._runtimes, [sequence.fork() for sequence in self._sequences])
        twin._start, twin._n_read = self._start, self._n_read
        twin._tokens, twin._hidden, twin._before = self._tokens, self._hidden, self._before
        return twin

    def close(self) -> None:
        for sequence in self._sequences:
            sequence.close()

    def _go_back(self, position: int) -> None:
        """Forget what was guessed, and what the model has taken back: it has the text up to a position."""
        count = position - self._start
        kept = min(count, self._n_read)
        if 0 <= count <= self._n_read + len(self._tokens) and self._truncate(kept):
            if count < self._n_read:
                self._before = np.zeros(self._width, np.float32)  # nobody knows it any more
                self._n_read = count
            self._tokens, self._hidden = self._tokens[: count - kept], self._hidden[: count - kept]
        else:
            self._begin(position)

    def _begin(self, position: int) -> None:
        """Know nothing of what was before a position."""
        self._truncate(0)
        self._start, self._n_read = position, 0
        self._tokens, self._hidden = self._tokens[:0], self._hidden[:0]
        self._before = np.zeros(self._width, np.float32)

    def _truncate(self, count: int) -> bool:
        return all(sequence.truncate(count) == count for sequence in self._sequences)

    def _read_waiting(self) -> None:
        if not len(self._tokens):
            return
        states = np.concatenate([self._before[None], self._hidden[:-1]])
        end = self._start + self._n_read + len(self._tokens)
        try:
            for runtime, sequence in zip(self._runtimes, self._sequences, strict=True):
                runtime.evaluate(sequence, self._tokens, "none", inputs=states)
        except BaseException:
            self._begin(end)
            raise
        self._before = self._hidden[-1].copy()
        self._n_read += len(self._tokens)
        self._tokens, self._hidden = self._tokens[:0], self._hidden[:0]
