"""The selective scan of Mamba (Gu and Dao, 2023): each channel keeps a vector, which fades by its time step.

Row by row, h = exp(time fading) h + time x B and out = C . h + kept x. The channels are independent of each other, so
each part takes some of them through all rows, and the lanes of a vector are channels.

A block of state is as in `state_columns`: a group logs the time steps and x of the chunk's rows, 16 channels each, and
behind the groups is B [16, dim].
"""

from __future__ import annotations

from qrun.engine.kernels import records as R
from qrun.engine.kernels.state_columns import CHANNELS, GROUP_BYTES, ROWS, Kernel, columns_kernel, copy_columns
from qrun.engine.simd import operations as v


def selective_scan(_: str) -> Kernel:
    lanes = v.target().lanes
    vector = 4 * lanes
    state_bytes = vector * R.MAX_STATE_DIM
    copy = copy_columns()
    ends_bytes = 3 * GROUP_BYTES

    @v.helper
    def place_of(op, block, group):  # type: ignore[no-untyped-def]
        """Where a group's part of a block begins."""
        dims = v.load_i64(op + R.SCAN_DIM)
        return block + v.load_i64(op + R.SCAN_STATE) + group * GROUP_BYTES * (2 * dims + 1 + 2 * ROWS)

    @v.helper
    def log_of_b(op, block):  # type: ignore[no-untyped-def]
        return place_of(op, block, (v.load_i64(op + R.SCAN_WIDTH) + CHANNELS - 1) // CHANNELS)

    @v.helper
    def advance(h, dims, fading, time, x, b):  # type: ignore[no-untyped-def]
        """One row, without asking."""
        change = time * x
        for d in range(dims):
            kept = v.load(h + vector * d) * v.exp(time * v.load(fading + GROUP_BYTES * d))
            v.store(h + vector * d, v.fma(change, v.splat(v.load_f32(b + 4 * d)), kept))

    @v.helper
    def advance_and_ask(h, dims, fading, time, x, b, c):  # type: ignore[no-untyped-def]
        """One row, and c . h."""
        change = time * x
        total = v.splat(0.0)
        for d in range(dims):
            kept = v.load(h + vector * d) * v.exp(time * v.load(fading + GROUP_BYTES * d))
            value = v.fma(change, v.splat(v.load_f32(b + 4 * d)), kept)
            v.store(h + vector * d, value)
            total = v.fma(value, v.splat(v.load_f32(c + 4 * d)), total)
        return total

    @v.helper
    def some_channels(op, segment, group, i, known):  # type: ignore[no-untyped-def]
        """A vector of a group's channels, i bytes behind its beginning, through all rows of a segment."""
        dims = v.load_i64(op + R.SCAN_DIM)
        width = v.load_i64(op + R.SCAN_WIDTH)
        fading = v.load_i64(op + R.SCAN_FADING) + group * dims * GROUP_BYTES + i
        kept = v.load(v.load_i64(op + R.SCAN_KEPT) + group * GROUP_BYTES + i)
        h = v.scratch(state_bytes)
        ends = v.scratch(ends_bytes)
        first = group * CHANNELS + i // 4
        here = min(width - first, lanes)
        place = place_of(op, v.load_i64(segment + R.SEG_IN), group) + i
        log = place + GROUP_BYTES * (2 * dims + 1)
        t = v.load_i64(segment + R.SEG_LOGGED)
        b_log = log_of_b(op, v.load_i64(segment + R.SEG_IN))
        if known == t:
            copy(place + GROUP_BYTES * dims, GROUP_BYTES, h, vector, dims)
        else:
            copy(place, GROUP_BYTES, h, vector, dims)
            for row in range(t):
                time = v.load(log + 2 * row * GROUP_BYTES)
                x = v.load(log + (2 * row + 1) * GROUP_BYTES)
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
                    log = place + GROUP_BYTES * (2 * dims + 1)
                    copy(h, vector, place, GROUP_BYTES, dims)
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
                v.store(log + 2 * t * GROUP_BYTES, time)
                v.store(log + (2 * t + 1) * GROUP_BYTES, x)
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
        copy(h, vector, place + GROUP_BYTES * dims, GROUP_BYTES, dims)

    @v.helper
    def log_row(op, row, log, t):  # type: ignore[no-untyped-def]
        dims = v.load_i64(op + R.SCAN_DIM)
        b = v.load_i64(op + R.SCAN_B) + row * v.load_i64(op + R.SCAN_B_STRIDE)
        for d in range(dims):
            v.store_f32(log + 4 * (t * dims + d), v.load_f32(b + 4 * d))

    return columns_kernel(R.SCAN_DIM, R.SCAN_WIDTH, place_of, some_channels, log_of_b, log_row)
