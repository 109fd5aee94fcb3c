"""The searches of `formats.blocks.mxfp4` and `nvfp4`: a few scales of a byte each, of which the best."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from qrun.engine.kernels import records as R
from qrun.engine.kernels.quantize_fit import SCALES, build_finish, tiny
from qrun.engine.simd import operations as v
from qrun.engine.simd.operations import VectorType, operation
from qrun.engine.simd.vector import F32, I32, Emitter, Vector
from qrun.formats.blocks.fitting import Search
from qrun.formats.blocks.mxfp4 import SHIFTS
from qrun.formats.blocks.nvfp4 import DENORMALS, LARGEST, MANTISSA_BITS

# What lies between the exponents of a float32 and of half an E4M3 number, above three bits of mantissa.
REBIAS = 119 << 3


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


@operation(lambda *_: VectorType("i32", v.target().lanes))
def nearest_scale(e: Emitter, x: Vector) -> Vector:
    """The code next to numbers that are not negative: as in formats.blocks.nvfp4."""
    normal = (x.bits_as(I32) + (1 << MANTISSA_BITS - 1)) >> MANTISSA_BITS
    normal = normal - REBIAS
    small = x * float(DENORMALS) + 0.5
    small = small.less(8.0).choose(small, small.constant(8.0))
    return normal.less(8).choose(small.to_int(), normal)


@operation(lambda *_: VectorType("i32", v.target().lanes))
def shifted_code(e: Emitter, code: Vector, shift: ir.Value) -> Vector:
    """One of the codes 1 to LARGEST."""
    code = code + e.splat(e.builder.fptosi(shift, I32))
    code = code.less(1).choose(code.constant(1), code)
    return code.constant(LARGEST).less(code).choose(code.constant(LARGEST), code)


@operation(lambda *_: VectorType("f32", v.target().lanes))
def scale_of(e: Emitter, code: Vector) -> Vector:
    normal = ((code + REBIAS) << MANTISSA_BITS).bits_as(F32)
    return code.less(8).choose(code.to_float() * (1 / DENORMALS), normal)


@operation(lambda *_: v.types.void)
def store_codes(e: Emitter, address: ir.Value, code: Vector) -> None:
    e.store(code.value, address)


def build_fit_scales(search: Search, nearest: Any, code: Any, weighted: bool) -> Any:
    groups, size = search.groups, search.size
    vector = 4 * v.target().lanes
    sub_bytes = size * vector
    one_over_largest = 1 / search.levels.largest
    finish = build_finish(search, nearest, code, weighted)

    @v.helper
    def fit_group(op, x, w, place):  # type: ignore[no-untyped-def]
        """The scale. Its code goes to `place`."""
        zero = v.splat(0.0)
        top = v.magnitude(v.load(x))
        for j in range(1, size):
            value = v.magnitude(v.load(x + j * vector))
            top = v.choose(top < value, value, top)
        first = nearest_scale(top * v.splat(one_over_largest))
        least, best = zero, zero
        for trial in range(v.load_i64(op + R.Q_N_TRIALS)):
            shift = v.load_f32(v.load_i64(op + R.Q_TRIALS) + 8 * trial)
            scale = scale_of(shifted_code(first, shift))
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
        store_codes(place, nearest_scale(best))
        return best

    @v.helper
    def fit(op, x, w, head, stats):  # type: ignore[no-untyped-def]
        zero = v.splat(0.0)
        for i in range(groups):
            scale = fit_group(op, x + i * sub_bytes, w + i * sub_bytes, head + (SCALES + i) * vector)
            finish(x, w, stats, v.divide(v.splat(1.0), scale, tiny), scale, zero, i * size, (i + 1) * size)

    return fit
