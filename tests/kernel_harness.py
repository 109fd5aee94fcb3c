"""Running single kernels from tests: records filled by hand, on one thread."""

from __future__ import annotations

import numpy as np

from qrun.engine import records as R
from qrun.engine.compiler import Kernels, load_kernels
from qrun.engine.lowering import FLOAT_TYPES, blocks_and_tail
from qrun.engine.simd.target import Target
from qrun.formats import TensorType

# Added to an offset: the address of that field of the step's record.
IN_STEP = -(1 << 40)


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

    def run(
        self, key: str, fields: dict[int, int | float], rows: int, step: dict[int, int | float] | None = None
    ) -> None:
        words = record(R.STEP_BYTES, {R.STEP_THREADS: 1, R.N_ROWS: rows, **(step or {})})
        words[R.ROW_RANGES // 8 : R.ROW_RANGES // 8 + 4] = (1, 0, 0, rows)
        base = words.ctypes.data
        places = {IN_STEP + offset: base + offset for offset in (R.N_ROWS, R.ROW_RANGES)}
        op = record(R.RECORD_BYTES, {offset: places.get(value, value) for offset, value in fields.items()})  # type: ignore[call-overload]
        self.kernels.function(key)(op.ctypes.data, base, 0)

    def packed(self, x: np.ndarray, packing: str) -> np.ndarray:
        """The rows of x as the matmul kernels take them."""
        rows, width = x.shape
        columns = 1 if rows == 1 else self.target.columns
        panels = -(-rows // columns) * columns
        packed = np.zeros(panels * width * 4, np.uint8)
        fields = {
            R.ROW_COUNT: IN_STEP + R.N_ROWS, R.ROW_X: x.ctypes.data, R.ROW_X_STRIDE: width * 4, R.ROW_Y: x.ctypes.data,
            R.ROW_Y_STRIDE: width * 4, R.ROW_Z: x.ctypes.data, R.ROW_WIDTH: width, R.ROW_PACKED: packed.ctypes.data,
        }  # fmt: skip
        self.run(f"pack-{packing}", fields, rows)
        return packed

    def matmul(
        self,
        type_name: str,
        weights: np.ndarray,
        n_rows: int,
        x: np.ndarray,
        extra: dict[int, int | float] | None = None,
    ) -> np.ndarray:
        """x @ weights.T by the kernel; weights: the file's bytes."""
        type_ = TensorType[type_name]
        rows, width = x.shape
        blocks, tail = blocks_and_tail(type_, width)
        packing, column_bytes = ("f32", width * 4) if type_ in FLOAT_TYPES else ("q8", width // 32 * R.PACKED_BYTES)
        row_bytes = len(weights) // n_rows
        packed = self.packed(np.ascontiguousarray(x, np.float32), packing)
        out = np.full((rows, n_rows), np.nan, np.float32)
        fields = {
            R.MM_WEIGHTS: weights.ctypes.data, R.MM_ROW_BYTES: row_bytes, R.MM_ROWS: n_rows, R.MM_BLOCKS: blocks,
            R.MM_TAIL: tail, R.MM_INPUT: packed.ctypes.data, R.MM_COLUMN_BYTES: column_bytes,
            R.MM_OUT: out.ctypes.data, R.MM_OUT_STRIDE: n_rows * 4, R.MM_SCALE: 1.0, R.MM_CHUNK: 32,
            R.MM_RANGES: IN_STEP + R.ROW_RANGES, **(extra or {}),
        }  # fmt: skip
        self.run(f"matmul-{type_name}", fields, rows)
        return out
