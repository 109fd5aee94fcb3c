"""The memory of RWKV (Peng et al., 2025: arXiv:2503.14456): each head keeps a matrix from keys to values.

Row by row, S = kept S + b^T (a S) + k^T v and out = r S, where S has a row for each dimension of a key. Columns of S
are independent of each other: each part takes some of them through all rows, and the lanes of a vector are columns.

In a block of state (`program.state_blocks`), each group of 16 columns has S [dim, 16] as it was where the chunk begins;
S after the newest row, and after how many rows of the chunk that was, so that generating need not begin at the chunk's
beginning; and v of the chunk's rows. Behind the groups are kept, k, a and b of the chunk's rows, all heads' in a row.
"""

from __future__ import annotations

from collections.abc import Callable

from qrun.engine.kernels import records as R
from qrun.engine.simd import operations as v

Kernel = Callable[[int, int, int], None]

ROWS = R.STATE_ROWS
CHANNELS = R.SCAN_CHANNELS


def wkv(variant: str) -> Kernel:
    """The variant: "delta", or "plain" where there are no a and b."""
    delta = variant == "delta"
    n_logs = 4 if delta else 2
    lanes = v.target().lanes
    vector = 4 * lanes
    group_bytes = 4 * CHANNELS
    state_bytes = vector * R.MAX_STATE_DIM

    @v.helper
    def place_of(op, block, group):  # type: ignore[no-untyped-def]
        """Where a group's part of a block begins."""
        dims = v.load_i64(op + R.WKV_DIM)
        return block + v.load_i64(op + R.WKV_STATE) + group * group_bytes * (2 * dims + 1 + ROWS)

    @v.helper
    def shared_log(op, block):  # type: ignore[no-untyped-def]
        return place_of(op, block, v.load_i64(op + R.WKV_WIDTH) // CHANNELS)

    @v.helper
    def advance(state, dims, kept, k, a, b, value):  # type: ignore[no-untyped-def]
        """One row, without asking."""
        if delta:
            known = v.splat(0.0)
            for d in range(dims):
                known = v.fma(v.splat(v.load_f32(a + 4 * d)), v.load(state + vector * d), known)
        for d in range(dims):
            one = v.load(state + vector * d) * v.splat(v.load_f32(kept + 4 * d))
            one = v.fma(v.splat(v.load_f32(k + 4 * d)), value, one)
            if delta:
                one = v.fma(v.splat(v.load_f32(b + 4 * d)), known, one)
            v.store(state + vector * d, one)

    @v.helper
    def ask(state, dims, r):  # type: ignore[no-untyped-def]
        total = v.splat(0.0)
        for d in range(dims):
            total = v.fma(v.splat(v.load_f32(r + 4 * d)), v.load(state + vector * d), total)
        return total

    @v.helper
    def copy(source, source_stride, out, out_stride, dims):  # type: ignore[no-untyped-def]
        for d in range(dims):
            v.store(out + d * out_stride, v.load(source + d * source_stride))

    @v.helper
    def some_columns(op, segment, group, i, known):  # type: ignore[no-untyped-def]
        """A vector of a group's columns, i bytes behind its beginning, through all rows of a segment."""
        dims = v.load_i64(op + R.WKV_DIM)
        width = v.load_i64(op + R.WKV_WIDTH)
        head = 4 * (group * CHANNELS // dims * dims)  # where the head's keys begin in a row, in bytes
        column = group * group_bytes + i
        state = v.scratch(state_bytes)
        place = place_of(op, v.load_i64(segment + R.SEG_IN), group) + i
        log = place + group_bytes * (2 * dims + 1)
        t = v.load_i64(segment + R.SEG_LOGGED)
        if known == t:
            copy(place + group_bytes * dims, group_bytes, state, vector, dims)
        else:
            copy(place, group_bytes, state, vector, dims)
            shared = shared_log(op, v.load_i64(segment + R.SEG_IN)) + head
            for past in range(t):
                at = shared + past * n_logs * 4 * width
                value = v.load(log + past * group_bytes)
                advance(state, dims, at, at + 4 * width, at + 8 * width, at + 12 * width, value)
        row = v.load_i64(segment + R.SEG_FIRST_ROW)
        end = row + v.load_i64(segment + R.SEG_ROWS)
        logs = t < ROWS
        while row < end:
            if t == ROWS:
                t = 0
                logs = end - row <= ROWS
                if logs:
                    place = place_of(op, v.load_i64(segment + R.SEG_OUT), group) + i
                    log = place + group_bytes * (2 * dims + 1)
                    copy(state, vector, place, group_bytes, dims)
            value = v.load(v.load_i64(op + R.WKV_V) + row * v.load_i64(op + R.WKV_V_STRIDE) + column)
            if logs:
                v.store(log + t * group_bytes, value)
            kept = v.load_i64(op + R.WKV_KEPT) + row * v.load_i64(op + R.WKV_KEPT_STRIDE) + head
            k = v.load_i64(op + R.WKV_K) + row * v.load_i64(op + R.WKV_K_STRIDE) + head
            a = v.load_i64(op + R.WKV_A) + row * v.load_i64(op + R.WKV_A_STRIDE) + head
            b = v.load_i64(op + R.WKV_B) + row * v.load_i64(op + R.WKV_B_STRIDE) + head
            advance(state, dims, kept, k, a, b, value)
            r = v.load_i64(op + R.WKV_R) + row * v.load_i64(op + R.WKV_R_STRIDE) + head
            out = v.load_i64(op + R.WKV_OUT) + row * v.load_i64(op + R.WKV_OUT_STRIDE) + column
            v.store(out, ask(state, dims, r))
            row += 1
            t += 1
        copy(state, vector, place + group_bytes * dims, group_bytes, dims)

    @v.helper
    def copy_row(source, out, width):  # type: ignore[no-untyped-def]
        for d in range(0, width, lanes):
            v.store(out + 4 * d, v.load(source + 4 * d))

    @v.helper
    def log_row(op, row, out):  # type: ignore[no-untyped-def]
        width = v.load_i64(op + R.WKV_WIDTH)
        copy_row(v.load_i64(op + R.WKV_KEPT) + row * v.load_i64(op + R.WKV_KEPT_STRIDE), out, width)
        copy_row(v.load_i64(op + R.WKV_K) + row * v.load_i64(op + R.WKV_K_STRIDE), out + 4 * width, width)
        if delta:
            copy_row(v.load_i64(op + R.WKV_A) + row * v.load_i64(op + R.WKV_A_STRIDE), out + 8 * width, width)
            copy_row(v.load_i64(op + R.WKV_B) + row * v.load_i64(op + R.WKV_B_STRIDE), out + 12 * width, width)

    @v.helper
    def log_rows(op, segment):  # type: ignore[no-untyped-def]
        """Write what heads share into the block, and where the step ends in another one, into that."""
        row_bytes = n_logs * 4 * v.load_i64(op + R.WKV_WIDTH)
        logged = v.load_i64(segment + R.SEG_LOGGED)
        n_rows = v.load_i64(segment + R.SEG_ROWS)
        first = v.load_i64(segment + R.SEG_FIRST_ROW)
        out = shared_log(op, v.load_i64(segment + R.SEG_IN)) + logged * row_bytes
        for i in range(min(n_rows, ROWS - logged)):
            log_row(op, first + i, out + i * row_bytes)
        if logged + n_rows > ROWS:
            here = (logged + n_rows - 1) % ROWS + 1  # rows in the last chunk
            out = shared_log(op, v.load_i64(segment + R.SEG_OUT))
            for i in range(here):
                log_row(op, first + n_rows - here + i, out + i * row_bytes)

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        parts = v.load_i64(step + R.STEP_PARTS)
        dims = v.load_i64(op + R.WKV_DIM)
        groups = v.load_i64(op + R.WKV_WIDTH) // CHANNELS
        for number in range(v.load_i64(step + R.N_SEGMENTS)):
            segment = v.load_i64(step + R.SEGMENTS) + number * R.SEG_BYTES
            logged = v.load_i64(segment + R.SEG_LOGGED)
            last = logged + v.load_i64(segment + R.SEG_ROWS)
            for group in range(groups * part // parts, groups * (part + 1) // parts):
                # How many rows the newest S is after; those of a step that was taken back do not count.
                count = place_of(op, v.load_i64(segment + R.SEG_IN), group) + 2 * dims * group_bytes
                known = v.load_i64(count)
                for i in range(0, group_bytes, vector):
                    some_columns(op, segment, group, i, known)
                if last <= ROWS:
                    v.store_i64(count, last)
                else:
                    if known > logged:
                        v.store_i64(count, 0)
                    count = place_of(op, v.load_i64(segment + R.SEG_OUT), group) + 2 * dims * group_bytes
                    v.store_i64(count, (last - 1) % ROWS + 1)
            if part == 0:
                log_rows(op, segment)

    return kernel
