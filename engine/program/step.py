"""What a step is about: its rows, as kernels read them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qrun.engine.kernels import records as R
from qrun.engine.program.kv_cache import KVSequence


class Step:
    """The step's record, and the arrays that it points to."""

    def __init__(self, batch: int, groups: int) -> None:
        self.tokens = np.zeros(batch, np.int64)
        self.positions = np.zeros(batch, np.int64)
        self.selected = np.zeros(batch, np.int64)
        self.tables = np.zeros(batch * groups, np.int64)
        self.tiles = np.zeros((batch, R.TILE_BYTES // 8), np.int64)
        self.segments = np.zeros((batch, R.SEG_BYTES // 8), np.int64)
        self.record = np.zeros(R.STEP_BYTES // 8, np.int64)
        for offset, array in (
            (R.TOKENS, self.tokens), (R.POSITIONS, self.positions), (R.SELECTED, self.selected), (R.TILES, self.tiles),
            (R.PAGE_TABLES, self.tables), (R.SEGMENTS, self.segments),
        ):  # fmt: skip
            self.record[offset // 8] = array.ctypes.data

    @property
    def address(self) -> int:
        return int(self.record.ctypes.data)

    def fill(self, parts: list[tuple[KVSequence, NDArray[np.int64]]]) -> int:
        """Lay out the rows of all parts. Returns how many there are."""
        total = sum(len(ids) for _, ids in parts)
        tables = self.tables[: total * (len(self.tables) // len(self.tokens))].reshape(-1, total)
        row = n_tiles = 0
        self.record[R.N_SEGMENTS // 8] = len(parts)
        for number, (sequence, ids) in enumerate(parts):
            count, past = len(ids), sequence.n_past
            self.segments[number] = (row, count, *sequence.states.segment(past))
            self.tokens[row : row + count] = ids
            self.positions[row : row + count] = np.arange(past, past + count)
            addresses = sequence.tables.ctypes.data + np.arange(len(tables)) * sequence.tables.strides[0]
            tables[:, row : row + count] = addresses[:, None]
            for first in range(0, count, R.TILE_SIZE):
                rows = min(R.TILE_SIZE, count - first)
                self.tiles[n_tiles] = (row + first, rows, past + first, past + count, len(sequence.source))
                n_tiles += 1
            row += count
        self.record[R.N_TILES // 8] = n_tiles
        self._rows(total)
        return total

    def select(self, rows: Sequence[int]) -> None:
        """The rows that the head works on: it has as many rows as are wanted."""
        self.selected[: len(rows)] = rows
        self._rows(len(rows))

    def _rows(self, count: int) -> None:
        self.record[R.N_ROWS // 8] = count
        self.record[R.ROW_RANGES // 8 : R.ROW_RANGES // 8 + 4] = (1, 0, 0, count)
