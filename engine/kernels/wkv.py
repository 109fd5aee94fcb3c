"""The memory of RWKV (Peng et al., 2025: arXiv:2503.14456): each head keeps a matrix from keys to values.

Row by row, S = kept S + b^T (a S) + k^T v and out = r S, where S has a row for each dimension of a key. Columns of S
are independent of each other: each part takes some of them through all rows, and the lanes of a vector are columns.

A block of state is as in `state_columns`: a group logs v of the chunk's rows, and behind the groups are kept, k, a and
b of the chunk's rows, all heads' in a row.
"""

from __future__ import annotations

from qrun.engine.kernels import records as R
from qrun.engine.kernels.state_columns import CHANNELS, GROUP_BYTES, ROWS, Kernel, columns_kernel, copy_columns
from qrun.engine.simd import operations as v


def wkv(variant: str) -> Kernel:
    """The variant: "delta", or "plain" where there are no a and b."""
    delta = variant == "delta"
    n_logs = 4 if delta else 2
    lanes = v.target().lanes
    vector = 4 * lanes
    state_bytes = vector * R.MAX_STATE_DIM
    copy = copy_columns()

    @v.helper
    def place_of(op, block, group):  # type: ignore[no-untyped-def]
        """Where a group's part of a block begins."""
        dims = v.load_i64(op + R.WKV_DIM)
        return block + v.load_i64(op + R.WKV_STATE) + group * GROUP_BYTES * (2 * dims + 1 + ROWS)

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
    def some_columns(op, segment, group, i, known):  # type: ignore[no-untyped-def]
        """A vector of a group's columns, i bytes behind its beginning, through all rows of a segment."""
        dims = v.load_i64(op + R.WKV_DIM)
        width = v.load_i64(op + R.WKV_WIDTH)
        head = 4 * (group * CHANNELS // dims * dims)  # where the head's keys begin in a row, in bytes
        column = group * GROUP_BYTES + i
        state = v.scratch(state_bytes)
        place = place_of(op, v.load_i64(segment + R.SEG_IN), group) + i
        log = place + GROUP_BYTES * (2 * dims + 1)
        t = v.load_i64(segment + R.SEG_LOGGED)
        if known == t:
            copy(place + GROUP_BYTES * dims, GROUP_BYTES, state, vector, dims)
        else:
            copy(place, GROUP_BYTES, state, vector, dims)
            shared = shared_log(op, v.load_i64(segment + R.SEG_IN)) + head
            for past in range(t):
                at = shared + past * n_logs * 4 * width
                value = v.load(log + past * GROUP_BYTES)
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
                    log = place + GROUP_BYTES * (2 * dims + 1)
                    copy(state, vector, place, GROUP_BYTES, dims)
            value = v.load(v.load_i64(op + R.WKV_V) + row * v.load_i64(op + R.WKV_V_STRIDE) + column)
            if logs:
                v.store(log + t * GROUP_BYTES, value)
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
        copy(state, vector, place + GROUP_BYTES * dims, GROUP_BYTES, dims)

    @v.helper
    def copy_row(source, out, width):  # type: ignore[no-untyped-def]
        for d in range(0, width, lanes):
            v.store(out + 4 * d, v.load(source + 4 * d))

    @v.helper
    def log_row(op, row, log, t):  # type: ignore[no-untyped-def]
        width = v.load_i64(op + R.WKV_WIDTH)
        out = log + t * n_logs * 4 * width
        copy_row(v.load_i64(op + R.WKV_KEPT) + row * v.load_i64(op + R.WKV_KEPT_STRIDE), out, width)
        copy_row(v.load_i64(op + R.WKV_K) + row * v.load_i64(op + R.WKV_K_STRIDE), out + 4 * width, width)
        if delta:
            copy_row(v.load_i64(op + R.WKV_A) + row * v.load_i64(op + R.WKV_A_STRIDE), out + 8 * width, width)
            copy_row(v.load_i64(op + R.WKV_B) + row * v.load_i64(op + R.WKV_B_STRIDE), out + 12 * width, width)

    return columns_kernel(R.WKV_DIM, R.WKV_WIDTH, place_of, some_columns, shared_log, log_row)
