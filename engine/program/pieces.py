"""Running a program's operations a piece at a time, between which others can have the threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Set

import numpy as np
from numpy.typing import NDArray

from qrun.engine.kernels import records as R
from qrun.engine.native.team import Team
from qrun.engine.program.program import Program

FIRST_PIECE = 4  # operations, while it is not known how long they take
FIRST_TILES = 16  # of an attention, while it is not known how long they take
AVERAGED = 32  # operations: a block of a model or two, so that cheap and dear ones have their share


class Pace:
    """How long a piece is to take, and how long operations took so far.

    first_tiles: of an attention that is run by itself, while it is not known how long they take.
    """

    def __init__(self, piece_seconds: float, first_tiles: int = FIRST_TILES) -> None:
        self.piece_seconds, self.first_tiles = piece_seconds, first_tiles
        self.operations: dict[int, float] = {}  # seconds of one, by the order of magnitude of the rows
        self.tiles: dict[int, float] = {}  # of a tile of each attention that is run by itself

    def piece(self, magnitude: int) -> int:
        """How many operations make a piece."""
        seconds = self.operations.get(magnitude)
        return FIRST_PIECE if seconds is None else max(int(self.piece_seconds / seconds), 1)

    def learn(self, magnitude: int, count: int, seconds: float) -> None:
        """So many operations took so long."""
        before, each = self.operations.get(magnitude), seconds / count
        weight = 1.0 if before is None else min(count / AVERAGED, 1.0)
        before = each if before is None else before
        self.operations[magnitude] = max(before + (each - before) * weight, 1e-9)


def run_pieces(
    team: Team, program: Program, operations: NDArray[np.int64], step: NDArray[np.int64], rows: int, pace: Pace,
    apart: Set[int], check: Callable[[], None],
) -> Iterator[int]:  # fmt: skip
    """Run operations of a program on the step's rows. Gives after each piece how many operations are done; the next one
    begins when it is asked for. check: called before each. apart: attentions that are run by themselves, some tiles at
    a time."""
    start, magnitude = 0, rows.bit_length()
    while start < len(operations):
        check()
        if start in apart:
            end = start + 1
            for _ in _attention(team, operations[start:end], step, pace, start):
                yield start
                check()
        else:
            stops = [index for index in apart if index > start]
            end = min([program.piece(operations, start, pace.piece(magnitude)), *stops])
            begin = time.perf_counter()
            team.run(operations[start:end], step)
            pace.learn(magnitude, end - start, time.perf_counter() - begin)
        start = end
        yield start


def _attention(
    team: Team, operation: NDArray[np.int64], step: NDArray[np.int64], pace: Pace, number: int
) -> Iterator[None]:
    """Run an attention, some tiles at a time; pauses between two of these."""
    tiles, n_tiles = int(step[R.TILES // 8]), int(step[R.N_TILES // 8])
    done = 0
    try:
        while done < n_tiles:
            seconds = pace.tiles.get(number)
            count = pace.first_tiles if seconds is None else max(int(pace.piece_seconds / seconds), 1)
            count = min(count, n_tiles - done)
            step[R.TILES // 8], step[R.N_TILES // 8] = tiles + done * R.TILE_BYTES, count
            begin = time.perf_counter()
            team.run(operation, step)
            pace.tiles[number] = max((time.perf_counter() - begin) / count, 1e-9)
            done += count
            if done < n_tiles:
                yield
    finally:
        step[R.TILES // 8], step[R.N_TILES // 8] = tiles, n_tiles
