"""A matrix for each head: the way of rows to where one matmul takes all heads, and back.

A head's rows stand in consecutive columns, beginning on a panel's first: then the heads' matrices are one matmul with a
range for each head, as those of experts are (`kernels.experts`).
"""

from __future__ import annotations

from collections.abc import Callable

from qrun.engine.kernels import records as R
from qrun.engine.kernels.columns import first_row, packer_of
from qrun.engine.simd import operations as v

Kernel = Callable[[int, int, int], None]


def to_heads(packing: str) -> Kernel:
    """Pack a part of each head of each row, and write the ranges."""
    packer = packer_of(packing)
    panel_columns = v.target().columns

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        n_rows = v.load_i64(step + R.N_ROWS)
        parts = v.load_i64(step + R.STEP_PARTS)
        n_heads = v.load_i64(op + R.HEADS_COUNT)
        columns = 1 if n_rows == 1 else panel_columns
        apart = (n_rows + columns - 1) // columns * columns
        for row in range(first_row(n_rows, part, parts), first_row(n_rows, part + 1, parts)):
            x = v.load_i64(op + R.HEADS_X) + row * v.load_i64(op + R.HEADS_X_STRIDE)
            x += 4 * v.load_i64(op + R.HEADS_START)
            for head in range(n_heads):
                place = x + 4 * head * v.load_i64(op + R.HEADS_DIM)
                packer(place, v.load_i64(op + R.HEADS_WIDTH), v.load_i64(op + R.HEADS_Y), head * apart + row, columns)
        if part == 0:
            ranges = v.load_i64(op + R.HEADS_RANGES)
            v.store_i64(ranges, n_heads)
            for head in range(n_heads):
                entry = ranges + 8 + 24 * head
                v.store_i64(entry, head)
                v.store_i64(entry + 8, head * apart)
                v.store_i64(entry + 16, n_rows)

    return kernel


def from_heads(_: str) -> Kernel:
    """Each row's heads side by side again."""
    panel_columns = v.target().columns

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        n_rows = v.load_i64(step + R.N_ROWS)
        parts = v.load_i64(step + R.STEP_PARTS)
        width = v.load_i64(op + R.HEADS_WIDTH)
        columns = 1 if n_rows == 1 else panel_columns
        apart = (n_rows + columns - 1) // columns * columns
        for row in range(first_row(n_rows, part, parts), first_row(n_rows, part + 1, parts)):
            y = v.load_i64(op + R.HEADS_Y) + row * v.load_i64(op + R.HEADS_Y_STRIDE)
            for head in range(v.load_i64(op + R.HEADS_COUNT)):
                x = v.load_i64(op + R.HEADS_X) + (head * apart + row) * v.load_i64(op + R.HEADS_X_STRIDE)
                for i in range(width):
                    v.store_f32(y + 4 * (head * width + i), v.load_f32(x + 4 * i))

    return kernel
