"""Running single kernels from tests: records filled by hand, on one thread."""

from __future__ import annotations

import numpy as np

from qrun.engine import records as R
from qrun.engine.compiler import Kernels, load_kernels
from qrun.engine.simd.target import Target


def record(size: int, fields: dict[int, int | float]) -> np.ndarray:
    """A record with its fields set: integers as int64, floats as float32 in the low half."""
    words = np.zeros(size // 8, np.int64)
    for offset, value in fields.items():
        if isinstance(value, float):
            words.view(np.float32)[offset // 4] = value
        else:
            words[offset // 8] = value
    return words


class Harness:
    """Kernels for one target, and a step of `rows` rows."""

    def __init__(self, target: Target, keys: list[str]) -> None:
        self.target = target
        self.kernels: Kernels = load_kernels(keys, target)

    def run(self, key: str, fields: dict[int, int | float], rows: int, step: dict[int, int | float] | None = None) -> None:
        words = record(R.STEP_BYTES, {R.STEP_THREADS: 1, R.N_ROWS: rows, **(step or {})})
        words[R.ROW_RANGES // 8 : R.ROW_RANGES // 8 + 4] = (1, 0, 0, rows)
        base = words.ctypes.data
        pointers = {offset: base + value for offset, value in fields.items() if offset in (R.ROW_COUNT,)}
        op = record(R.RECORD_BYTES, {**fields, **pointers})
        if key.startswith("matmul"):
            op[R.MM_RANGES // 8] = base + R.ROW_RANGES
        self.kernels.function(key)(op.ctypes.data, base, 0)

    def packed(self, x: np.ndarray, packing: str) -> np.ndarray:
        """The rows of x as the matmul kernels take them."""
        rows, width = x.shape
        columns = 1 if rows == 1 else self.target.columns
        panels = -(-rows // columns) * columns
        packed = np.zeros(panels * width * 4, np.uint8)
        fields = {
            R.ROW_COUNT: R.N_ROWS, R.ROW_X: x.ctypes.data, R.ROW_X_STRIDE: width * 4, R.ROW_Y: x.ctypes.data,
            R.ROW_Y_STRIDE: width * 4, R.ROW_Z: x.ctypes.data, R.ROW_WIDTH: width, R.ROW_PACKED: packed.ctypes.data,
        }  # fmt: skip
        self.run(f"pack-{packing}", fields, rows)
        return packed

    def matmul(self, type_name: str, weights: np.ndarray, n_rows: int, x: np.ndarray, **extra: int | float) -> np.ndarray:
        """x @ weights.T by the kernel; weights: the file's bytes."""
        from qrun.engine.kernels.unpack import TYPES, Quantised

        spec = TYPES[type_name]
        rows, width = x.shape
        if isinstance(spec, Quantised):
            packing, blocks, tail = "q8", width // spec.block_size, 0
            row_bytes, column_bytes = blocks * spec.block_bytes, width // 32 * 48
        else:
            per_block = 16 // spec.weight_bytes
            packing, blocks, tail = "f32", width // per_block, width % per_block
            row_bytes, column_bytes = width * spec.weight_bytes, width * 4
        packed = self.packed(np.ascontiguousarray(x, np.float32), packing)
        out = np.full((rows, n_rows), np.nan, np.float32)
        fields = {
            R.MM_WEIGHTS: weights.ctypes.data, R.MM_ROW_BYTES: row_bytes, R.MM_ROWS: n_rows, R.MM_BLOCKS: blocks,
            R.MM_TAIL: tail, R.MM_INPUT: packed.ctypes.data, R.MM_COLUMN_BYTES: column_bytes,
            R.MM_OUT: out.ctypes.data, R.MM_OUT_STRIDE: n_rows * 4, R.MM_SCALE: 1.0, R.MM_CHUNK: 32, **extra,
        }  # fmt: skip
        self.run(f"matmul-{type_name}", fields, rows)
        return out
