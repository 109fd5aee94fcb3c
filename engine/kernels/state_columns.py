"""What operations share whose state is columns that need nothing of each other: selective scans, RWKV.

In a block of state (`program.state_blocks`), each group of 16 columns has the state [dim, 16] as it was where the chunk
begins; the state after the newest row, and after how many rows of the chunk that was, so that generating need not begin
at the chunk's beginning; and a log of what the chunk's rows brought to these columns. Behind the groups is a log of
what all columns share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qrun.engine.kernels import records as R
from qrun.engine.simd import operations as v

Kernel = Callable[[int, int, int], None]

ROWS = R.STATE_ROWS
CHANNELS = R.SCAN_CHANNELS
GROUP_BYTES = 4 * CHANNELS


def copy_columns() -> Any:
    """A helper that copies a vector of columns, `dims` deep. Strides are in bytes."""

    @v.helper
    def copy(source, source_stride, out, out_stride, dims):  # type: ignore[no-untyped-def]
        for d in range(dims):
            v.store(out + d * out_stride, v.load(source + d * source_stride))

    return copy


def columns_kernel(
    dim_at: int, width_at: int, place_of: Any, some_columns: Any, shared_log: Any, log_row: Any
) -> Kernel:
    """The kernel that takes all groups through all rows of a step.

    dim_at, width_at: where an operation's record has the depth of the state, and how many columns there are.
    place_of(op, block, group): where a group's part of a block begins.
    some_columns(op, segment, group, i, known): takes a vector of a group's columns, i bytes behind its beginning,
        through a segment; the newest state in the block is after `known` rows.
    shared_log(op, block): where the log begins of what columns share.
    log_row(op, row, log, t): writes a row of the step into that log, as its row t.
    """
    vector = 4 * v.target().lanes

    @v.helper
    def log_rows(op, segment):  # type: ignore[no-untyped-def]
        """Write what columns share into the block, and where the step ends in another one, into that."""
        logged = v.load_i64(segment + R.SEG_LOGGED)
        n_rows = v.load_i64(segment + R.SEG_ROWS)
        first = v.load_i64(segment + R.SEG_FIRST_ROW)
        log = shared_log(op, v.load_i64(segment + R.SEG_IN))
        for i in range(min(n_rows, ROWS - logged)):
            log_row(op, first + i, log, logged + i)
        if logged + n_rows > ROWS:
            here = (logged + n_rows - 1) % ROWS + 1  # rows in the last chunk
            log = shared_log(op, v.load_i64(segment + R.SEG_OUT))
            for i in range(here):
                log_row(op, first + n_rows - here + i, log, i)

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        parts = v.load_i64(step + R.STEP_PARTS)
        dims = v.load_i64(op + dim_at)
        width = v.load_i64(op + width_at)
        groups = (width + CHANNELS - 1) // CHANNELS
        for number in range(v.load_i64(step + R.N_SEGMENTS)):
            segment = v.load_i64(step + R.SEGMENTS) + number * R.SEG_BYTES
            logged = v.load_i64(segment + R.SEG_LOGGED)
            last = logged + v.load_i64(segment + R.SEG_ROWS)
            for group in range(groups * part // parts, groups * (part + 1) // parts):
                # How many rows the newest state is after; those of a step that was taken back do not count.
                count = place_of(op, v.load_i64(segment + R.SEG_IN), group) + 2 * dims * GROUP_BYTES
                known = v.load_i64(count)
                for i in range(0, GROUP_BYTES, vector):
                    if group * CHANNELS + i // 4 < width:
                        some_columns(op, segment, group, i, known)
                if last <= ROWS:
                    v.store_i64(count, last)
                else:
                    if known > logged:
                        v.store_i64(count, 0)
                    count = place_of(op, v.load_i64(segment + R.SEG_OUT), group) + 2 * dims * GROUP_BYTES
                    v.store_i64(count, (last - 1) % ROWS + 1)
            if part == 0:
                log_rows(op, segment)

    return kernel
