"""Rows of several positions as one, each column by shares of its own (DeepSeek V4's compressed attention).

x and its scores lie in pages of float32 rows, padded to a multiple of 32; those of a position that is not the last of
its group are only kept.
"""

from __future__ import annotations

from collections.abc import Callable

from qrun.engine.kernels import records as R
from qrun.engine.kernels.columns import first_row
from qrun.engine.simd import operations as v

Kernel = Callable[[int, int, int], None]

POSITIONS = R.PAGE_POSITIONS


def pool(_: str) -> Kernel:
    """y = the sum of softmax(score) * x over the rows of a group, the oldest first; 0 before a group's last row."""
    lanes = v.target().lanes
    ends_bytes = 4 * lanes

    @v.helper
    def row_at(op, table, offset, position):  # type: ignore[no-untyped-def]
        """Where a position's row lies in the cache."""
        page = v.load_i64(table + 8 * (position // POSITIONS))
        return page + offset + position % POSITIONS * v.load_i64(op + R.POOL_ROW_BYTES)

    @v.helper
    def score_at(op, table, position, column):  # type: ignore[no-untyped-def]
        row = row_at(op, table, v.load_i64(op + R.POOL_SCORES_OFFSET), position)
        place = position % v.load_i64(op + R.POOL_EVERY) * v.load_i64(op + R.POOL_ROW_BYTES)
        return v.load(row + 4 * column) + v.load(v.load_i64(op + R.POOL_PLACES) + place + 4 * column)

    @v.helper
    def mean(op, table, first, end, half, column):  # type: ignore[no-untyped-def]
        """A vector of columns over the positions first .. end - 1. Those of the last group have theirs `half` further
        on, which is 0 where there is only one."""
        begin = end - v.load_i64(op + R.POOL_EVERY)
        largest = v.splat(-1e30)
        for position in range(first, end):
            largest = v.maximum(largest, score_at(op, table, position, column + (half if position >= begin else 0)))
        total = v.splat(0.0)
        out = v.splat(0.0)
        x_offset = v.load_i64(op + R.POOL_X_OFFSET)
        for position in range(first, end):
            at = column + (half if position >= begin else 0)
            share = v.exp(score_at(op, table, position, at) - largest)
            total = total + share
            out = v.fma(v.load(row_at(op, table, x_offset, position) + 4 * at), share, out)
        return out / total

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        n_rows = v.load_i64(step + R.N_ROWS)
        parts = v.load_i64(step + R.STEP_PARTS)
        width = v.load_i64(op + R.POOL_WIDTH)
        every = v.load_i64(op + R.POOL_EVERY)
        overlap = v.load_i64(op + R.POOL_OVERLAP)
        whole = width // lanes * lanes
        tables = v.load_i64(step + R.PAGE_TABLES) + 8 * v.load_i64(op + R.POOL_GROUP) * n_rows
        ends = v.scratch(ends_bytes)
        for row in range(first_row(n_rows, part, parts), first_row(n_rows, part + 1, parts)):
            y = v.load_i64(op + R.POOL_Y) + row * v.load_i64(op + R.POOL_Y_STRIDE)
            end = v.load_i64(v.load_i64(step + R.POSITIONS) + 8 * row) + 1
            if end % every != 0:
                for i in range(width):
                    v.store_f32(y + 4 * i, v.float32(0.0))
                continue
            table = v.load_i64(tables + 8 * row)
            first = max(end - 2 * every, 0) if overlap != 0 else end - every
            half = width if overlap != 0 else 0
            for i in range(0, whole, lanes):
                v.store(y + 4 * i, mean(op, table, first, end, half, i))
            if whole < width:
                v.store(ends, mean(op, table, first, end, half, whole))
                for i in range(whole, width):
                    v.store_f32(y + 4 * i, v.load_f32(ends + 4 * (i - whole)))

    return kernel
