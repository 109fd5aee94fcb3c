"""A batch of one sequence that is computed a while at a time, between the steps of others.

It has a program of its own, with memory for what it has computed so far, so that steps may come in between. Rows have
the same bits in any batch, so it matters to nobody how they were computed.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from qrun.engine.native.team import Team
from qrun.engine.program.kv_cache import KVSequence
from qrun.engine.program.pieces import Pace, run_pieces
from qrun.engine.program.program import Program

if TYPE_CHECKING:
    from qrun.engine.program.adapted import SwitchedAdapters
    from qrun.engine.program.step import Step

# Enough for matrices to be read seldom, and so few that none of its operations takes as long as a step of others.
BACKGROUND_ROWS = 128
PIECE_SECONDS = 0.002


class Computing(Protocol):
    """What computes: see `Runtime`."""

    width: int

    @property
    def team(self) -> Team: ...

    def alone(self) -> AbstractContextManager[None]: ...

    def check_files(self) -> None: ...


class Background:
    """The program of such batches, of which there is one at a time, and what is common to them.

    switched: adapters that sequences may have, where there are any.
    """

    def __init__(self, program: Program, step: Step, switched: SwitchedAdapters | None) -> None:
        self.program, self.step, self.switched = program, step, switched
        self.pace = Pace(PIECE_SECONDS, first_tiles=1)
        self.batch: weakref.ref[BackgroundBatch] | None = None
        """The one that is under way."""
        self.place: tuple[weakref.ref[KVSequence], int] | None = None
        """Where the last one has ended."""


class BackgroundBatch:
    """Tokens that are appended to a sequence by and by; made by `Runtime.begin_in_background`.

    The sequence has the tokens when it is `over`, and before that none of them. logits: float32 [1, n_vocab], those
    after the last token, or [0, n_vocab] where they are not wanted.
    """

    def __init__(
        self, runtime: Computing, background: Background, sequence: KVSequence, ids: NDArray[np.int64], *, ends: bool
    ) -> None:
        """ends: are logits wanted?"""
        self._runtime, self._background, self._sequence, self._ids = runtime, background, sequence, ids
        self.over = False
        self.logits = np.empty((0, runtime.width), np.float32)
        end = sequence.n_past + len(ids)
        if background.place != (weakref.ref(sequence), sequence.n_past):  # attention is as dear as a text is long
            background.pace.tiles.clear()
        background.place, background.batch = (weakref.ref(sequence), end), weakref.ref(self)
        sequence.reserve(len(ids))
        self._changes = sequence.changes
        self._ends = ends
        self._pieces = _pieces(runtime, background, sequence, ids, ends)

    def __len__(self) -> int:
        return len(self._ids)

    def run(self, seconds: float, cancelled: Callable[[], bool] = lambda: False) -> bool:
        """Go on for about so long, at least by a piece. Returns `over`. ValueError unless `valid`."""
        if not self.valid:
            raise ValueError("the sequence has changed, or another batch was begun in the background")
        end = time.perf_counter() + seconds - PIECE_SECONDS / 2
        with self._runtime.alone():
            while not self.over:
                if next(self._pieces, None) is None:
                    self._sequence.advance(len(self._ids))
                    if self._ends:
                        self.logits = self._background.program.logits[:1].copy()
                    self.over, self._background.batch = True, None
                elif time.perf_counter() >= end or cancelled():
                    break
        return self.over

    @property
    def valid(self) -> bool:
        """Can it go on? Not if anything else was done with the sequence, or another batch took its place."""
        batch = self._background.batch
        return batch is not None and batch() is self and self._sequence.changes == self._changes


def _pieces(
    runtime: Computing, background: Background, sequence: KVSequence, ids: NDArray[np.int64], ends: bool
) -> Iterator[int]:
    """Compute it, and pause after each piece."""
    program, step, n_rows = background.program, background.step, len(ids)
    step.fill([(sequence, ids)])
    if background.switched is not None:
        background.switched.fill([(sequence.adapters, n_rows)])
    for table in program.rope_tables:
        table.fill(sequence.n_past + n_rows)
    team, pace, check = runtime.team, background.pace, runtime.check_files
    yield from run_pieces(team, program, program.body, step.record, n_rows, pace, program.attentions, check)
    if ends:
        step.select([n_rows - 1])
        yield from run_pieces(team, program, program.head, step.record, 1, pace, frozenset(), check)
