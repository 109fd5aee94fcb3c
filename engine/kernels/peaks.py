"""The highest logits of each part of a row, so that whoever chooses among them need not look at all: of a large
vocabulary that takes one thread long enough to matter, once all have computed a step.
"""

from __future__ import annotations

from collections.abc import Callable

from qrun.engine.kernels import records as R
from qrun.engine.simd import operations as v

Kernel = Callable[[int, int, int], None]


def peaks(_: str) -> Kernel:
    """Of each group of PEAK_GROUP numbers the highest of those that are PEAKS apart, each with its own place; a NaN
    where one of them is no finite number."""
    lanes = v.target().lanes
    vector_bytes, row_bytes = 4 * lanes, 4 * R.PEAKS
    vectors, rows = R.PEAKS // lanes, R.PEAK_GROUP // R.PEAKS

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        parts = v.load_i64(step + R.STEP_PARTS)
        groups = v.load_i64(op + R.PEAKS_GROUPS)
        begin, end = groups * part // parts, groups * (part + 1) // parts
        for row in range(v.load_i64(step + R.N_ROWS)):
            x = v.load_i64(op + R.PEAKS_X) + row * v.load_i64(op + R.PEAKS_X_STRIDE) + begin * rows * row_bytes
            y = v.load_i64(op + R.PEAKS_Y) + row * groups * row_bytes + begin * row_bytes
            for _ in range(begin, end):
                for vector in range(vectors):
                    place = x + vector * vector_bytes
                    highest = v.load(place)
                    odd = highest - highest  # not 0 where it is infinite, or none
                    for _ in range(1, rows):
                        place += row_bytes
                        value = v.load(place)
                        highest = v.maximum(highest, value)
                        odd = odd + (value - value)
                    v.store(y + vector * vector_bytes, highest + odd)
                x += rows * row_bytes
                y += row_bytes

    return kernel
