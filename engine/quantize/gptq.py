"""GPTQ: rounding the columns of a matrix one by one, each error made good by the columns that follow.

Frantar et al., arXiv:2210.17323. The error that matters is that of the matrix's outputs on real inputs: with H the sum
of x x^T over the inputs x, an error e of a row costs e^T H e. When column j is rounded, the columns after it are
changed so that this is least again: by error[j] * U[j, k] / U[j, j], where U is the upper triangular factor of
H^-1 = U^T U.

Scales and minimums of a block are those that the ordinary search finds, with the mean squares of the inputs as
importance, for the weights as they stand when the block is reached; then its columns are rounded, and what they did
wrong goes to the columns of all later blocks at once. Columns keep their order, as blocks do.

What inputs have in common with few or no others must not be trusted: to the diagonal of H goes a part of its mean
(DAMPING), and ten times as much where the factor cannot be found otherwise. If not even that helps, nothing is known of
the inputs, and weights are rounded each by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

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
# Rows that are rounded together by a thread. Results do not depend on it beyond the last bit of a product.
ROWS = 256

GPTQ_TYPES = frozenset(CODES)


def factor(moments: NDArray[np.floating]) -> F32Array | None:
    """U of H^-1 = U^T U, its rows divided by their diagonals: float32 [n, n] from the sum of x x^T. None if the matrix
    is singular however it is damped."""
    n = len(moments)
    mean = float(np.trace(moments, dtype=np.float64)) / n
    if not mean > 0:
        return None
    places = np.arange(n)
    for damping in DAMPING * 10.0 ** np.arange(TRIES):
        # H = R R^T with R upper triangular: the ordinary factor of H backwards. Then U is the inverse of R.
        h = np.array(moments[::-1, ::-1], np.float64, order="C")
        h[places, places] += damping * mean
        try:
            _cholesky(h)
            _invert_lower(h)
        except np.linalg.LinAlgError:
            continue
        h /= h[places, places][:, None]
        result = np.ascontiguousarray(h[::-1, ::-1], np.float32)
        if np.isfinite(result).all():
            return result
    return None


# NumPy's own would take the memory of a wide matrix several times.
BLOCK, STRIP = 256, 1024


def _cholesky(h: F64Array) -> None:
    """Leaves L of H = L L^T in the place of H. Raises LinAlgError if it is not positive."""
    n = len(h)
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        h[start:, start:end] -= h[start:, :start] @ h[start:end, :start].T
        h[start:end, start:end] = np.linalg.cholesky(h[start:end, start:end])
        h[end:, start:end] = h[end:, start:end] @ np.linalg.inv(h[start:end, start:end]).T
        h[start:end, end:] = 0


def _invert_lower(matrix: F64Array) -> None:
    """Leaves the inverse of a lower triangular matrix in its place."""
    if (n := len(matrix)) <= BLOCK:
        matrix[:] = np.tril(np.linalg.inv(matrix))
        return
    half = n // 2
    first, last, below = matrix[:half, :half], matrix[half:, half:], matrix[half:, :half]
    _invert_lower(first)
    _invert_lower(last)
    for start in range(0, half, STRIP):
        of = slice(start, min(start + STRIP, half))
        below[:, of] = below[:, start:] @ first[start:, of]
    for start in reversed(range(0, n - half, STRIP)):
        of = slice(start, min(start + STRIP, n - half))
        below[of] = -(last[of, : of.stop] @ below[: of.stop])


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

        def work(start: int) -> U8Array:
            return self._round(rows(start, min(start + ROWS, n_rows)), type, importance, factor)

        return np.concatenate(list(pool.map(work, range(0, n_rows, ROWS))))

    def _round(self, weights: F32Array, type: TensorType, importance: F32Array, factor: F32Array) -> U8Array:
        size, n_bytes = BLOCK_SIZES[type]
        n_rows, n_columns = weights.shape
        padded = -(-n_rows // self._lanes) * self._lanes
        left = np.zeros((padded, n_columns), np.float32)
        left[:n_rows] = weights
        out = np.empty((n_rows, n_columns // size, n_bytes), np.uint8)
        for start in range(0, n_columns, size):
            end = start + size
            block = np.ascontiguousarray(left[:, start:end])
            raw = self._encoder.encode(block, type, importance[start:end]).raw.reshape(padded, n_bytes)
            codes, errors = self._columns(block, raw, type, np.ascontiguousarray(factor[start:end, start:end]))
            CODES[type].put(raw, codes)
            out[:, start // size] = raw[:n_rows]
            if end < n_columns:
                left[:, end:] -= errors @ factor[start:end, end:]
        return out.reshape(-1)

    def _columns(self, block: F32Array, raw: U8Array, type: TensorType, factor: F32Array) -> tuple[U8Array, F32Array]:
        """The codes of a block of columns, and the errors: both [rows, block]."""
        n_rows, size = block.shape
        lanes, groups = self._lanes, SEARCHES[type].groups
        scales, minimums = (self._tiles(np.ascontiguousarray(part, np.float32)) for part in CODES[type].scales(raw))
        x = self._tiles(block)
        codes = np.empty(x.shape, np.int32)
        record = np.zeros(R.RECORD_BYTES // 8, np.int64)
        fields = {
            R.SPREAD_X: x.ctypes.data, R.SPREAD_TILES: n_rows // lanes, R.SPREAD_SCALES: scales.ctypes.data,
            R.SPREAD_MINIMUMS: minimums.ctypes.data, R.SPREAD_CODES: codes.ctypes.data,
            R.SPREAD_FACTOR: factor.ctypes.data,
        }  # fmt: skip
        assert scales.shape[1] == groups
        for offset, value in fields.items():
            record[offset // 8] = value
        self._functions[type](record.ctypes.data, 0, 0)
        as_rows = codes.astype(np.uint8).transpose(0, 2, 1).reshape(n_rows, size)
        return as_rows, x.transpose(0, 2, 1).reshape(n_rows, size)

    def _tiles(self, array: F32Array) -> F32Array:
        """[rows, n] -> [tiles, n, lanes]."""
        return np.ascontiguousarray(array.reshape(-1, self._lanes, array.shape[1]).transpose(0, 2, 1))
