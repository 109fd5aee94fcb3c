"""GPTQ: rounding the columns of a matrix one by one, each error made good by the columns that follow.

Frantar et al., arXiv:2210.17323. The error that matters is that of the matrix's outputs on real inputs: with H the sum
of x x^T over the inputs x, an error e of a row costs e^T H e. When column j is rounded, the columns after it are
changed so that this is least again: by error[j] * U[j, k] / U[j, j], where U is the upper triangular factor of
H^-1 = U^T U.

U is the inverse of R of H = R R^T, and only the inverses of the blocks on R's diagonal are needed. With F = R, its
columns divided by R's diagonal, and e what the weights w before a block are off by, those of the block are to become
w + e F[before, block] F[block, block]^-1; and the rows of that inverse are U's, divided by its diagonal.

Scales and minimums of a block are those that the ordinary search finds, with the mean squares of the inputs as
importance, for the weights as they stand when the block is reached; then its columns are rounded. Columns keep their
order, as blocks do.

What inputs have in common with few or no others must not be trusted: to the diagonal of H goes a part of its mean
(DAMPING), and ten times as much where the factor cannot be found otherwise. If not even that helps, nothing is known of
the inputs, and weights are rounded each by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from qrun.engine.kernels import records as R
from qrun.engine.native.compiler import Progress, default_target, load_kernels
from qrun.engine.quantize.encoder import Encoder
from qrun.engine.quantize.imatrix import FLOOR
from qrun.engine.simd.target import Target
from qrun.formats.blocks import BLOCK_SIZES, SEARCHES, TensorType
from qrun.formats.blocks.codes import CODES

F32Array = NDArray[np.float32]
F64Array = NDArray[np.float64]
U8Array = NDArray[np.uint8]

DAMPING = 0.01
TRIES = 4
# Rows that are rounded together, and by one thread; columns whose changes by all before are computed at once. Results
# do not depend on these beyond the last bit of a product.
TOGETHER, ROWS, COLUMNS = 4096, 256, 256

GPTQ_TYPES = frozenset(CODES)


def factor(moments: NDArray[np.floating]) -> F32Array | None:
    """R of H = R R^T, upper triangular, its columns divided by their diagonals: float32 [n, n] from the sum of x x^T.
    None if the matrix is singular however it is damped."""
    n = len(moments)
    mean = float(np.trace(moments, dtype=np.float64)) / n
    if not mean > 0:
        return None
    places = np.arange(n)
    for damping in DAMPING * 10.0 ** np.arange(TRIES):
        # The ordinary factor of H backwards.
        h = np.array(moments[::-1, ::-1], np.float64, order="C")
        h[places, places] += damping * mean
        try:
            _cholesky(h)
        except np.linalg.LinAlgError:
            continue
        h /= h[places, places]
        result = np.ascontiguousarray(h[::-1, ::-1], np.float32)
        if np.isfinite(result).all():
            return result
    return None


BLOCK = 256


def _cholesky(h: F64Array) -> None:
    """Leaves L of H = L L^T in the place of H. Raises LinAlgError if it is not positive.

    NumPy's own would take the memory of a wide matrix several times."""
    n = len(h)
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        h[start:, start:end] -= h[start:, :start] @ h[start:end, :start].T
        h[start:end, start:end] = np.linalg.cholesky(h[start:end, start:end])
        h[end:, start:end] = h[end:, start:end] @ np.linalg.inv(h[start:end, start:end]).T
        h[start:end, end:] = 0


class Gptq:
    """Rounds matrices to some types."""

    def __init__(
        self, types: Iterable[TensorType], target: Target | None = None, progress: Progress | None = None
    ) -> None:
        """progress: called while kernels are compiled."""
        target = target or default_target()
        wanted = sorted(set(types))
        self._encoder = Encoder(wanted, target, progress)
        kernels = load_kernels([f"spread-{type.name}" for type in wanted], target, progress)
        self._functions = {type: kernels.function(f"spread-{type.name}") for type in wanted}
        self._lanes = target.lanes

    def round(
        self, rows: Callable[[int, int], F32Array], n_rows: int, type: TensorType, moments: F32Array,
        factor: F32Array, pool: ThreadPoolExecutor,
    ) -> U8Array:  # fmt: skip
        """The bytes of a matrix. rows(start, end): its weights. moments: as `factor` takes them."""
        importance = np.diag(moments).astype(np.float64)
        importance = np.maximum(importance / importance.mean(), FLOOR).astype(np.float32)
        size = BLOCK_SIZES[type][0]
        blocks = [factor[start : start + size, start : start + size] for start in range(0, len(factor), size)]
        inverses: F32Array = np.linalg.inv(np.array(blocks, np.float64)).astype(np.float32)
        parts = (
            self._round(rows(start, min(start + TOGETHER, n_rows)), type, importance, factor, inverses, pool)
            for start in range(0, n_rows, TOGETHER)
        )
        return np.concatenate(list(parts))

    def _round(
        self, weights: F32Array, type: TensorType, importance: F32Array, factor: F32Array, inverses: F32Array,
        pool: ThreadPoolExecutor,
    ) -> U8Array:  # fmt: skip
        size, n_bytes = BLOCK_SIZES[type]
        n_rows, n_columns = weights.shape
        padded = -(-n_rows // self._lanes) * self._lanes
        errors = np.zeros((padded, n_columns), np.float32)
        out = np.empty((padded, n_columns // size, n_bytes), np.uint8)
        for first in range(0, n_columns, COLUMNS):
            # Products of all rows at once, not by each thread: NumPy's take threads of their own.
            change = errors[:, :first] @ factor[:first, first : first + COLUMNS]
            for start in range(first, min(first + COLUMNS, n_columns), size):
                end = start + size
                changed = change[:, start - first : end - first]
                if start > first:
                    changed += errors[:, first:start] @ factor[first:start, start:end]
                inverse: F32Array = inverses[start // size]
                original = np.zeros((padded, size), np.float32)
                original[:n_rows] = weights[:, start:end]
                block = original + changed @ inverse
                found = pool.map(
                    partial(self._block, type, importance[start:end], inverse),
                    (block[row : row + ROWS] for row in range(0, padded, ROWS)),
                    (original[row : row + ROWS] for row in range(0, padded, ROWS)),
                )
                for row, (raw, miss) in zip(range(0, padded, ROWS), found, strict=True):
                    out[row : row + ROWS, start // size], errors[row : row + ROWS, start:end] = raw, miss
        return out[:n_rows].reshape(-1)

    def _block(
        self, type: TensorType, importance: F32Array, factor: F32Array, block: F32Array, original: F32Array
    ) -> tuple[U8Array, F32Array]:
        """The bytes of a block of columns [rows, bytes], and what the weights are off by [rows, block]. block,
        original: the weights as they stand now, and as they were."""
        n_rows, size = block.shape
        raw = self._encoder.encode(block, type, importance).raw.reshape(n_rows, -1)
        lanes, groups = self._lanes, SEARCHES[type].groups
        scales, minimums = (self._tiles(np.ascontiguousarray(part, np.float32)) for part in CODES[type].scales(raw))
        x, weights = self._tiles(block), self._tiles(original)
        codes = np.empty(x.shape, np.int32)
        record = np.zeros(R.RECORD_BYTES // 8, np.int64)
        fields = {
            R.SPREAD_X: x.ctypes.data, R.SPREAD_WEIGHTS: weights.ctypes.data, R.SPREAD_TILES: n_rows // lanes,
            R.SPREAD_SCALES: scales.ctypes.data, R.SPREAD_MINIMUMS: minimums.ctypes.data,
            R.SPREAD_CODES: codes.ctypes.data, R.SPREAD_FACTOR: factor.ctypes.data,
        }  # fmt: skip
        assert scales.shape[1] == groups
        for offset, value in fields.items():
            record[offset // 8] = value
        self._functions[type](record.ctypes.data, 0, 0)
        CODES[type].put(raw, codes.astype(np.uint8).transpose(0, 2, 1).reshape(n_rows, size))
        return raw, x.transpose(0, 2, 1).reshape(n_rows, size)

    def _tiles(self, array: F32Array) -> F32Array:
        """[rows, n] -> [tiles, n, lanes]."""
        return np.ascontiguousarray(array.reshape(-1, self._lanes, array.shape[1]).transpose(0, 2, 1))
