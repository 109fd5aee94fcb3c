"""Watching what matmuls take: for each column of their input, the sum of squares over the rows, and how many rows; or
the rows themselves.

A part is some of the columns and takes the rows in their order, so that sums are the same on any number of
threads. Sums are added to in float32; whoever reads them begins anew from time to time (see `program.observing`).
"""

from __future__ import annotations

from collections.abc import Callable

from qrun.engine.kernels import records as R
from qrun.engine.simd import operations as v

Kernel = Callable[[int, int, int], None]

# Columns are dealt out by so many: a cache line of sums belongs to one part.
SHARE = 16


def observe(variant: str) -> Kernel:
    """"rows": every row counts once. "experts": every row counts for each expert that it goes to. "keep": SUMS takes
    the rows of the step, and COUNTS how many they are."""
    lanes = v.target().lanes
    by_expert, keeps = variant == "experts", variant == "keep"

    @v.helper
    def add_squares(x, sums, begin, end):  # type: ignore[no-untyped-def]
        whole = begin + (end - begin) // lanes * lanes
        for i in range(begin, whole, lanes):
            value = v.load(x + 4 * i)
            v.store(sums + 4 * i, v.fma(value, value, v.load(sums + 4 * i)))
        for i in range(whole, end):
            one = v.load_f32(x + 4 * i)
            v.store_f32(sums + 4 * i, v.load_f32(sums + 4 * i) + one * one)

    @v.helper
    def expert_of(ranges, slot):  # type: ignore[no-untyped-def]
        """The expert in whose range of slots this one is. Ranges: see `kernels.matmul`."""
        for i in range(v.load_i64(ranges)):
            entry = ranges + 8 + 24 * i
            within = slot - v.load_i64(entry + 8)
            if within >= 0 and within < v.load_i64(entry + 16):
                return v.load_i64(entry)
        return 0

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        n_rows = v.load_i64(step + R.N_ROWS)
        parts = v.load_i64(step + R.STEP_PARTS)
        width = v.load_i64(op + R.OBS_WIDTH)
        shares = (width + SHARE - 1) // SHARE
        begin = shares * part // parts * SHARE
        end = min(shares * (part + 1) // parts * SHARE, width)
        x = v.load_i64(op + R.OBS_X)
        stride = v.load_i64(op + R.OBS_X_STRIDE)
        sums = v.load_i64(op + R.OBS_SUMS)
        counts = v.load_i64(op + R.OBS_COUNTS)
        if keeps:
            for row in range(n_rows):
                for i in range(4 * begin, 4 * end, 4):
                    v.store_f32(sums + row * width * 4 + i, v.load_f32(x + row * stride + i))
            if part == 0:
                v.store_i64(counts, n_rows)
        elif by_expert:
            n_used = v.load_i64(op + R.OBS_USED)
            for i in range(n_rows * n_used):
                slot = v.load_i64(v.load_i64(op + R.OBS_SLOTS) + 8 * i)
                expert = expert_of(v.load_i64(op + R.OBS_RANGES), slot)
                row = slot if v.load_i64(op + R.OBS_BY_SLOT) != 0 else i // n_used
                add_squares(x + row * stride, sums + expert * width * 4, begin, end)
                if part == 0:
                    v.store_i64(counts + 8 * expert, v.load_i64(counts + 8 * expert) + 1)
        else:
            for row in range(n_rows):
                add_squares(x + row * stride, sums, begin, end)
            if part == 0:
                v.store_i64(counts, v.load_i64(counts) + n_rows)

    return kernel
