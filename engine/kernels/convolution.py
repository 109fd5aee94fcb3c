"""Convolution over time: each channel from its own last few values.

A block of state (`program.state_blocks`) has TAPS - 1 rows from before its chunk, and then those of the chunk. Each
part takes a range of channels of all rows, so that it reads of a block what it has written itself.
"""

from __future__ import annotations

from collections.abc import Callable

from qrun.engine.kernels import records as R
from qrun.engine.simd import operations as v

Kernel = Callable[[int, int, int], None]


def convolution(activation: str) -> Kernel:
    """y[t] = act(sum of weight[j] * x[t - TAPS + 1 + j], the oldest first, + bias). The activation: silu, or none."""
    lanes = v.target().lanes
    with_silu = activation == "silu"
    size = 4 * lanes

    @v.helper
    def source(op, segment, i):  # type: ignore[no-untyped-def]
        """Where the input of row i of a segment lies; rows before 0 are in its block."""
        if i >= 0:
            row = v.load_i64(segment + R.SEG_FIRST_ROW) + i
            return v.load_i64(op + R.CONV_X) + row * v.load_i64(op + R.CONV_X_STRIDE)
        before = v.load_i64(op + R.CONV_TAPS) - 1 + v.load_i64(segment + R.SEG_LOGGED) + i
        place = v.load_i64(segment + R.SEG_IN) + v.load_i64(op + R.CONV_STATE)
        return place + 4 * before * v.load_i64(op + R.CONV_WIDTH)

    @v.helper
    def finish(value):  # type: ignore[no-untyped-def]
        if with_silu:
            return value / (v.splat(1.0) + v.exp(v.splat(0.0) - value))
        return value

    @v.helper
    def compute(op, segment, first, last):  # type: ignore[no-untyped-def]
        """Channels `first` to `last`, all rows."""
        taps = v.load_i64(op + R.CONV_TAPS)
        width = v.load_i64(op + R.CONV_WIDTH)
        weight = v.load_i64(op + R.CONV_WEIGHT)
        bias = v.load_i64(op + R.CONV_BIAS)
        ends = v.scratch(size)
        whole = first + (last - first) // lanes * lanes
        for i in range(v.load_i64(segment + R.SEG_ROWS)):
            row = v.load_i64(segment + R.SEG_FIRST_ROW) + i
            y = v.load_i64(op + R.CONV_Y) + row * v.load_i64(op + R.CONV_Y_STRIDE)
            for c in range(first, whole, lanes):
                total = v.splat(0.0)
                for j in range(taps):
                    x = source(op, segment, i - taps + 1 + j)
                    total = v.fma(v.load(x + 4 * c), v.load(weight + 4 * (j * width + c)), total)
                if bias != 0:
                    total = total + v.load(bias + 4 * c)
                v.store(y + 4 * c, finish(total))
            for c in range(whole, last):
                total = v.splat(0.0)
                for j in range(taps):
                    x = source(op, segment, i - taps + 1 + j)
                    factor = v.splat(v.load_f32(weight + 4 * (j * width + c)))
                    total = v.fma(v.splat(v.load_f32(x + 4 * c)), factor, total)
                if bias != 0:
                    total = total + v.splat(v.load_f32(bias + 4 * c))
                v.store(ends, finish(total))
                v.store_f32(y + 4 * c, v.load_f32(ends))

    @v.helper
    def copy(x, out, first, last):  # type: ignore[no-untyped-def]
        whole = first + (last - first) // lanes * lanes
        for c in range(first, whole, lanes):
            v.store(out + 4 * c, v.load(x + 4 * c))
        for c in range(whole, last):
            v.store_f32(out + 4 * c, v.load_f32(x + 4 * c))

    @v.helper
    def keep(op, segment, first, last):  # type: ignore[no-untyped-def]
        """Write the rows into the block, and where the step ends in another one, into that."""
        before = v.load_i64(op + R.CONV_TAPS) - 1
        width = v.load_i64(op + R.CONV_WIDTH)
        n_rows = v.load_i64(segment + R.SEG_ROWS)
        logged = v.load_i64(segment + R.SEG_LOGGED)
        state = v.load_i64(op + R.CONV_STATE)
        place = v.load_i64(segment + R.SEG_IN) + state
        for i in range(min(n_rows, R.STATE_ROWS - logged)):
            copy(source(op, segment, i), place + 4 * (before + logged + i) * width, first, last)
        if logged + n_rows <= R.STATE_ROWS:
            return
        place = v.load_i64(segment + R.SEG_OUT) + state
        here = (logged + n_rows - 1) % R.STATE_ROWS + 1  # rows in the last chunk
        for i in range(before + here):
            copy(source(op, segment, n_rows - here - before + i), place + 4 * i * width, first, last)

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        parts = v.load_i64(step + R.STEP_PARTS)
        width = v.load_i64(op + R.CONV_WIDTH)
        vectors = (width + lanes - 1) // lanes
        first = vectors * part // parts * lanes
        last = min(vectors * (part + 1) // parts * lanes, width)
        for number in range(v.load_i64(step + R.N_SEGMENTS)):
            segment = v.load_i64(step + R.SEGMENTS) + number * R.SEG_BYTES
            compute(op, segment, first, last)
            keep(op, segment, first, last)

    return kernel
