"""The search of `formats.blocks.mxfp4`: three exponents, of which the best."""

from __future__ import annotations

from typing import Any

from qrun.engine.kernels.quantize_fit import build_finish, tiny
from qrun.engine.simd import operations as v
from qrun.formats.blocks.fitting import Search
from qrun.formats.blocks.mxfp4 import SHIFTS


def build_fit_exponent(search: Search, nearest: Any, code: Any, weighted: bool) -> Any:
    size, lanes = search.size, v.target().lanes
    vector = 4 * lanes
    finish = build_finish(search, nearest, code, weighted)

    @v.helper
    def fit(op, x, w, head, stats):  # type: ignore[no-untyped-def]
        """The exponents go to the place of the integer scales."""
        zero = v.splat(0.0)
        scales, tops = v.scratch(vector), v.scratch(vector)
        top = v.magnitude(v.load(x))
        for j in range(1, size):
            value = v.magnitude(v.load(x + j * vector))
            top = v.choose(top < value, value, top)
        v.store(tops, top)
        least, best = zero, zero
        for trial in range(3):
            for lane in range(lanes):
                exponent = (v.load_i32(tops + 4 * lane) >> 23) + SHIFTS[trial]
                v.store_i32(scales + 4 * lane, (min(max(exponent, 2), 254) - 1) << 23)
            scale = v.load(scales)
            inverse = v.divide(v.splat(1.0), scale, tiny)
            error = zero
            for j in range(size):
                value = v.load(x + j * vector)
                miss = value - nearest(value * inverse) * scale
                error = error + (v.load(w + j * vector) * miss if weighted else miss) * miss
            if trial == 0:
                least, best = error, scale
            else:
                better = error < least
                least, best = v.choose(better, error, least), v.choose(better, scale, best)
        v.store(head, best)
        for lane in range(lanes):
            v.store_i32(head + 2 * vector + 4 * lane, (v.load_i32(head + 4 * lane) >> 23) + 1)
        finish(x, w, stats, v.divide(v.splat(1.0), best, tiny), best, zero, 0, size)

    return fit
