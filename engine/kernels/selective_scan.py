"""The selective scan of Mamba (Gu and Dao, 2023): each channel keeps a vector, which fades by its time step.

Row by row, h = exp(time fading) h + time x B and out = C . h + kept x. The channels are independent of each other, so
each part takes some of them through all rows, and the lanes of a vector are channels.

In a block of state (`program.state_blocks`), each group of ROWS channels has h [dim, 16] as it was where the chunk
begins; h after the newest row, and after how many rows of the chunk that was, so that generating need not begin at the
chunk's beginning; and the time steps and x of the chunk's rows, 16 channels each. Behind the groups is B [16, dim].
"""

from __future__ import annotations

from collections.abc import Callable

from qrun.engine.kernels import records as R
from qrun.engine.simd import operations as v

Kernel = Callable[[int, int, int], None]

ROWS = R.STATE_ROWS
CHANNELS = R.SCAN_CHANNELS


def selective_scan(_: str) -> Kernel:
    lanes = v.target().lanes
    vector = 4 * lanes
    group_bytes = 4 * CHANNELS
    state_bytes = vector * R.MAX_STATE_DIM
    ends_bytes = 3 * group_bytes

    @v.helper
    def place_of(op, block, group):  # type: ignore[no-untyped-def]
        """Where a group's part of a block begins."""
        dims = v.load_i64(op + R.SCAN_DIM)
        return block + v.load_i64(op + R.SCAN_STATE) + group * group_bytes * (2 * dims + 1 + 2 * ROWS)

    @v.helper
    def log_of_b(op, block):  # type: ignore[no-untyped-def]
        return place_of(op, block, (v.load_i64(op + R.SCAN_WIDTH) + CHANNELS - 1) // CHANNELS)

    @v.helper
    def advance(h, dims, fading, time, x, b):  # type: ignore[no-untyped-def]
        """One row, without asking."""
        change = time * x
        for d in range(dims):
            kept = v.load(h + vector * d) * v.exp(time * v.load(fading + group_bytes * d))
            v.store(h + vector * d, v.fma(change, v.splat(v.load_f32(b + 4 * d)), kept))

    @v.helper
    def advance_and_ask(h, dims, fading, time, x, b, c):  # type: ignore[no-untyped-def]
        """One row, and c . h."""
        change = time * x
        total = v.splat(0.0)
        for d in range(dims):
            kept = v.load(h + vector * d) * v.exp(time * v.load(fading + group_bytes * d))
            value = v.fma(change, v.splat(v.load_f32(b + 4 * d)), kept)
            v.store(h + vector * d, value)
            total = v.fma(value, v.splat(v.load_f32(c + 4 * d)), total)
        return total

    @v.helper
    def copy(source, source_stride, out, out_stride, dims):  # type: ignore[no-untyped-def]
        for d in range(dims):
            v.store(out + d * out_stride, v.load(source + d * source_stride))

    @v.helper
    def some_channels(op, segment, group, i, known):  # type: ignore[no-untyped-def]
        """A vector of a group's channels, i bytes behind its beginning, through all rows of a segment."""
        dims = v.load_i64(op + R.SCAN_DIM)
        width = v.load_i64(op + R.SCAN_WIDTH)
        fading = v.load_i64(op + R.SCAN_FADING) + group * dims * group_bytes + i
        kept = v.load(v.load_i64(op + R.SCAN_KEPT) + group * group_bytes + i)
        h = v.scratch(state_bytes)
        ends = v.scratch(ends_bytes)
        first = group * CHANNELS + i // 4
        here = min(width - first, lanes)
        place = place_of(op, v.load_i64(segment + R.SEG_IN), group) + i
        log = place + group_bytes * (2 * dims + 1)
        t = v.load_i64(segment + R.SEG_LOGGED)
        b_log = log_of_b(op, v.load_i64(segment + R.SEG_IN))
        if known == t:
            copy(place + group_bytes * dims, group_bytes, h, vector, dims)
        else:
            copy(place, group_bytes, h, vector, dims)
            for row in range(t):
                time = v.load(log + 2 * row * group_bytes)
                x = v.load(log + (2 * row + 1) * group_bytes)
                advance(h, dims, fading, time, x, b_log + 4 * row * dims)
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
                    copy(h, vector, place, group_bytes, dims)
            x_at = v.load_i64(op + R.SCAN_X) + row * v.load_i64(op + R.SCAN_X_STRIDE) + 4 * first
            time_at = v.load_i64(op + R.SCAN_TIME) + row * v.load_i64(op + R.SCAN_TIME_STRIDE) + 4 * first
            if here < lanes:
                for j in range(lanes):
                    v.store_f32(ends + 4 * j, v.load_f32(x_at + 4 * j) if j < here else v.float32(0.0))
                    v.store_f32(ends + vector + 4 * j, v.load_f32(time_at + 4 * j) if j < here else v.float32(0.0))
                x_at, time_at = ends, ends + vector
            x = v.load(x_at)
            time = v.load(time_at)
            if logs:
                v.store(log + 2 * t * group_bytes, time)
                v.store(log + (2 * t + 1) * group_bytes, x)
            b = v.load_i64(op + R.SCAN_B) + row * v.load_i64(op + R.SCAN_B_STRIDE)
            c = v.load_i64(op + R.SCAN_C) + row * v.load_i64(op + R.SCAN_C_STRIDE)
            result = v.fma(kept, x, advance_and_ask(h, dims, fading, time, x, b, c))
            out = v.load_i64(op + R.SCAN_OUT) + row * v.load_i64(op + R.SCAN_OUT_STRIDE) + 4 * first
            if here < lanes:
                v.store(ends + 2 * vector, result)
                for j in range(here):
                    v.store_f32(out + 4 * j, v.load_f32(ends + 2 * vector + 4 * j))
            else:
                v.store(out, result)
            row += 1
            t += 1
        copy(h, vector, place + group_bytes * dims, group_bytes, dims)

    @v.helper
    def log_b(op, segment):  # type: ignore[no-untyped-def]
        """Write the rows of B into the block, and where the step ends in another one, into that."""
        dims = v.load_i64(op + R.SCAN_DIM)
        logged = v.load_i64(segment + R.SEG_LOGGED)
        n_rows = v.load_i64(segment + R.SEG_ROWS)
        out = log_of_b(op, v.load_i64(segment + R.SEG_IN)) + 4 * logged * dims
        for i in range(min(n_rows, ROWS - logged)):
            copy_b(op, segment, i, out + 4 * i * dims)
        if logged + n_rows > ROWS:
            here = (logged + n_rows - 1) % ROWS + 1  # rows in the last chunk
            out = log_of_b(op, v.load_i64(segment + R.SEG_OUT))
            for i in range(here):
                copy_b(op, segment, n_rows - here + i, out + 4 * i * dims)

    @v.helper
    def copy_b(op, segment, i, out):  # type: ignore[no-untyped-def]
        row = v.load_i64(segment + R.SEG_FIRST_ROW) + i
        b = v.load_i64(op + R.SCAN_B) + row * v.load_i64(op + R.SCAN_B_STRIDE)
        for d in range(v.load_i64(op + R.SCAN_DIM)):
            v.store_f32(out + 4 * d, v.load_f32(b + 4 * d))

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        parts = v.load_i64(step + R.STEP_PARTS)
        dims = v.load_i64(op + R.SCAN_DIM)
        width = v.load_i64(op + R.SCAN_WIDTH)
        groups = (width + CHANNELS - 1) // CHANNELS
        for number in range(v.load_i64(step + R.N_SEGMENTS)):
            segment = v.load_i64(step + R.SEGMENTS) + number * R.SEG_BYTES
            logged = v.load_i64(segment + R.SEG_LOGGED)
            last = logged + v.load_i64(segment + R.SEG_ROWS)
            for group in range(groups * part // parts, groups * (part + 1) // parts):
                # How many rows the newest h is after; those of a step that was taken back do not count.
                count = place_of(op, v.load_i64(segment + R.SEG_IN), group) + 2 * dims * group_bytes
                known = v.load_i64(count)
                for i in range(0, group_bytes, vector):
                    if group * CHANNELS + i // 4 < width:
                        some_channels(op, segment, group, i, known)
                if last <= ROWS:
                    v.store_i64(count, last)
                else:
                    if known > logged:
                        v.store_i64(count, 0)
                    count = place_of(op, v.load_i64(segment + R.SEG_OUT), group) + 2 * dims * group_bytes
                    v.store_i64(count, (last - 1) % ROWS + 1)
            if part == 0:
                log_b(op, segment)

    return kernel
