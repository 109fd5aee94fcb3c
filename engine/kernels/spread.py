"""Rounding a block of columns one by one, each error spread over those that are not yet rounded: "spread-Q4_K".

This is the inner loop of GPTQ: see `quantize.gptq`. Lanes are rows of the matrix, so that all is done in vectors, and
no lane depends on another. A tile has the weights of a block of columns for as many rows as there are lanes.
"""

from __future__ import annotations

from collections.abc import Callable

from qrun.engine.kernels import records as R
from qrun.engine.kernels.quantize import build_nearest
from qrun.engine.kernels.quantize_fit import tiny
from qrun.engine.simd import operations as v
from qrun.formats.blocks import SEARCHES, TensorType
from qrun.formats.blocks.fitting import Groups

Kernel = Callable[[int, int, int], None]


def spread(type_name: str) -> Kernel:
    """For a type whose codes are chosen weight by weight.

    X: tiles of float32 [block, lanes], the weights as they stand now. WEIGHTS: as they were at first; what they are off
    by at last takes the place of X. SCALES, MINIMUMS: tiles of [groups, lanes]. CODES: tiles of int32 [block, lanes].
    FACTOR: float32 [block, block], row j times the error of column j is what is taken off the columns after it.
    """
    search = SEARCHES[TensorType[type_name]]
    assert not isinstance(search.levels, Groups)
    nearest, code = build_nearest(search.levels)
    groups, size = search.groups, search.size
    block = groups * size
    vector = 4 * v.target().lanes
    tile_bytes, scales_bytes = block * vector, groups * vector

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        factor = v.load_i64(op + R.SPREAD_FACTOR)
        for tile in range(v.load_i64(op + R.SPREAD_TILES)):
            x = v.load_i64(op + R.SPREAD_X) + tile * tile_bytes
            weights = v.load_i64(op + R.SPREAD_WEIGHTS) + tile * tile_bytes
            codes = v.load_i64(op + R.SPREAD_CODES) + tile * tile_bytes
            scales = v.load_i64(op + R.SPREAD_SCALES) + tile * scales_bytes
            minimums = v.load_i64(op + R.SPREAD_MINIMUMS) + tile * scales_bytes
            for group in range(groups):
                scale, minimum = v.load(scales + group * vector), v.load(minimums + group * vector)
                inverse = v.divide(v.splat(1.0), scale, tiny)
                for j in range(group * size, (group + 1) * size):
                    value = v.load(x + j * vector)
                    q = nearest((value + minimum) * inverse)
                    rounded = scale * q - minimum
                    error = value - rounded
                    v.store(x + j * vector, v.load(weights + j * vector) - rounded)
                    v.store(codes + j * vector, code(q))
                    for k in range(j + 1, block):
                        share = v.splat(v.load_f32(factor + 4 * (j * block + k)))
                        v.store(x + k * vector, v.load(x + k * vector) - share * error)

    return kernel
