"""Second moments: the sums of x x^T over the inputs of a matrix, by which errors of its outputs are known.

They are most of what rounding column by column has to compute: for each token half of the square of a matrix's width.
With AMX, inputs are rounded to bfloat16 and sums are float32 (see `kernels.moments`): that is as if each input were off
by a 256th at most, by chance. It takes a quarter of the time of NumPy's matrix products, which do it elsewhere, in
float32.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from qrun.engine.kernels import records as R
from qrun.engine.native.compiler import Progress, default_target, load_kernels
from qrun.engine.native.cpu_count import available_cores

F32Array = NDArray[np.float32]

# Rows wait until there are so many: to fill half of a wide matrix and to add it takes longer than the product of a few.
GATHERED = 2048
SUMMED = 512  # columns of a strip
WIDE = 4096  # above it, sums of float64 would take too much memory
# Blocks of columns that are taken together, by tiles: with all rows a megabyte in bfloat16.
TOGETHER = 8


class Moments:
    """The sum of x x^T over the rows of an input."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._waiting = np.empty((GATHERED, width), np.float32)
        self._count = 0

    def add(self, rows: F32Array) -> None:
        """rows: float32 [n, width]."""
        while len(rows):
            taken = rows[: GATHERED - self._count]
            self._waiting[self._count : self._count + len(taken)] = taken
            self._count += len(taken)
            rows = rows[len(taken) :]
            if self._count == GATHERED:
                self.flush()

    def matrix(self) -> F32Array:
        """float32 [width, width]. Nothing can be added after it."""
        self.flush()
        result = self._lower()
        for strip in range(0, self._width, SUMMED):
            end = strip + SUMMED
            result[strip:end, end:] = result[end:, strip:end].T
        return result

    def flush(self) -> None:
        """Add what still waits."""
        if self._count:
            self._sum(self._count)
            self._count = 0

    def _sum(self, n_rows: int) -> None:
        """Add the first rows that wait."""
        raise NotImplementedError

    def _lower(self) -> F32Array:
        """The matrix, of which what lies above the diagonal's blocks of SUMMED columns does not count."""
        raise NotImplementedError

    @staticmethod
    def bytes_for(width: int) -> int:
        """What they take while they are added up."""
        return (8 if width <= WIDE else 4) * width**2 + 4 * GATHERED * width


class FloatMoments(Moments):
    """By NumPy: float32 for each product of GATHERED rows, and float64 for their sum unless that is WIDE. Only the
    lower half is computed, in strips."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self._sums = np.zeros((width, width), np.float64 if width <= WIDE else np.float32)

    def _sum(self, n_rows: int) -> None:
        rows = self._waiting[:n_rows]
        for strip in range(0, self._width, SUMMED):
            of = slice(strip, strip + SUMMED)
            self._sums[strip:, of] += rows[:, strip:].T @ rows[:, of]

    def _lower(self) -> F32Array:
        return self._sums.astype(np.float32, copy=False)


class TileMoments(Moments):
    """By AMX. Only blocks of 32 columns up to the diagonal are computed, and they lie one behind the other."""

    def __init__(self, width: int, run: Callable[[str, list[dict[int, int]]], None]) -> None:
        super().__init__(width)
        self._run = run
        self._blocks = width // R.MOM_BLOCK
        half = R.MOM_BLOCK // 2
        self._sums = np.zeros((self._blocks * (self._blocks + 1) // 2, 2, 2, half, half), np.float32)
        # Pairs of bfloat16, as they are and turned.
        self._packed = np.empty((2, GATHERED // 2, width), np.uint32)

    def _sum(self, n_rows: int) -> None:
        steps = -(-n_rows // R.MOM_ROWS)
        self._waiting[n_rows : steps * R.MOM_ROWS] = 0
        fields = {
            R.MOM_X: self._waiting.ctypes.data, R.MOM_X_STRIDE: 4 * self._width, R.MOM_STEPS: steps,
            R.MOM_PACKED: self._packed[0].ctypes.data, R.MOM_TURNED: self._packed[1].ctypes.data,
            R.MOM_SUMS: self._sums.ctypes.data,
        }  # fmt: skip
        # The last ones have most to do.
        firsts = reversed(range(0, self._blocks, TOGETHER))
        parts = [fields | {R.MOM_FIRST: first, R.MOM_LAST: min(first + TOGETHER, self._blocks)} for first in firsts]
        self._run("moments-pack", parts)
        self._run("moments-add", parts)

    def _lower(self) -> F32Array:
        del self._packed  # the result needs the memory
        result = np.empty((self._width, self._width), np.float32)
        for i in range(self._blocks):
            blocks = self._sums[i * (i + 1) // 2 :][: i + 1]
            row, end = i * R.MOM_BLOCK, (i + 1) * R.MOM_BLOCK
            result[row:end, :end] = blocks.transpose(1, 3, 0, 2, 4).reshape(R.MOM_BLOCK, end)
            result[:row, row:end] = result[row:end, :row].T
        return result


class MomentsMaker:
    """Makes sums for inputs of any width, by tiles where there are some. Close it: it has threads."""

    def __init__(self, threads: int | None = None, progress: Progress | None = None) -> None:
        """progress: called while kernels are compiled."""
        target = default_target()
        self._pool = ThreadPoolExecutor(threads or available_cores(), "qrun-moments")
        self._kernels = load_kernels(["moments-pack", "moments-add"], target, progress) if target.tiles else None

    def sums(self, width: int) -> Moments:
        """Of nothing yet."""
        if self._kernels is not None and width % R.MOM_BLOCK == 0:
            return TileMoments(width, self._run)
        return FloatMoments(width)

    def _run(self, key: str, parts: list[dict[int, int]]) -> None:
        assert self._kernels is not None
        function = self._kernels.function(key)

        def work(fields: dict[int, int]) -> None:
            record = np.zeros(R.RECORD_BYTES // 8, np.int64)
            for offset, value in fields.items():
                record[offset // 8] = value
            function(record.ctypes.data, 0, 0)

        list(self._pool.map(work, parts))

    def close(self) -> None:
        """Let the threads go."""
        self._pool.shutdown()
