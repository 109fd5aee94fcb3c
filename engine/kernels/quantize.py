"""Quantising blocks of floats, one block in each vector lane: "quantize-Q4_K" and so on.

`formats.blocks.fitting` states the problem and solves it in NumPy. Here are the same operations in the same order, none
fused, so that the bytes are the same; sums run along a block while lanes are blocks, so they also do not depend on how
many lanes there are. What is tried (starts, refinements, rounds) comes with the record.

Lanes lie side by side in scratch memory: weight j of all blocks is one vector, which `quantize_lanes` puts there. Once
the search is over its place takes the code of the weight. Codes and scales are then put into the bytes of blocks, by
`quantize_lanes` for blocks of 32 weights, by `quantize_pack` for all others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from qrun.engine.kernels import records as R
from qrun.engine.kernels.quantize_fit import (
    HEAD_VECTORS,
    STATS,
    build_fit_with_minimum,
    build_fit_without_minimum,
    tiny,
)
from qrun.engine.kernels.quantize_groups import build_fit_groups
from qrun.engine.kernels.quantize_lanes import LAYOUTS, SOURCES, build_pack_lanes, build_to_lanes
from qrun.engine.kernels.quantize_microscaled import build_fit_exponent, build_fit_scales
from qrun.engine.kernels.quantize_pack import build_pack_codes, build_pack_groups
from qrun.engine.simd import operations as v
from qrun.engine.simd.operations import operation
from qrun.engine.simd.vector import Emitter, Vector
from qrun.formats.blocks import BLOCK_SIZES, SEARCHES, TensorType
from qrun.formats.blocks.fitting import SPARED, Groups, Levels, Search, Steps

Kernel = Callable[[int, int, int], None]
F32, F16, BF16 = int(TensorType.F32), int(TensorType.F16), int(TensorType.BF16)


def build_nearest(levels: Levels) -> tuple[Any, Any]:
    """The operations `nearest(vector)` of the levels, and `code(level)` as int32."""

    @operation(lambda x: x)
    def nearest(e: Emitter, x: Vector) -> Vector:
        if isinstance(levels, Steps):
            x = x.intrinsic("llvm.rint")
            x = x.less(levels.low).choose(x.constant(levels.low), x)
            return x.constant(levels.high).less(x).choose(x.constant(levels.high), x)
        level = x.constant(levels.levels[0])
        for threshold, above in zip(levels.thresholds, levels.levels[1:], strict=True):
            level = x.constant(threshold).less(x).choose(x.constant(above), level)
        return level

    @operation(lambda x: v.VectorType("i32", v.target().lanes))
    def code(e: Emitter, x: Vector) -> Vector:
        if isinstance(levels, Steps):
            return (x - levels.low).to_int()
        index = x.constant(0.0)
        for number, (threshold, _) in enumerate(zip(levels.thresholds, levels.levels[1:], strict=True), 1):
            index = x.constant(threshold).less(x).choose(x.constant(number), index)
        return index.to_int()

    return nearest, code


@operation(lambda x: x)
def square_root(e: Emitter, x: Vector) -> Vector:
    """Rounded properly."""
    return x.intrinsic("llvm.sqrt")


@operation(lambda *_: v.types.void)
def fill(e: Emitter, address: ir.Value, value: ir.Value) -> None:
    e.store(e.splat(value).value, address)


def build_load(source_type: int, block_size: int) -> Any:
    """load(source, first, count, period, x): `count` blocks of a row of `period` blocks to lanes, a vector a weight.

    Block `first` + i, modulo the period, goes to lane i. Lanes to spare repeat the last of the blocks.
    """
    lanes, vector = v.target().lanes, 4 * v.target().lanes
    width = SOURCES[source_type][0]
    to_lanes = build_to_lanes(source_type, block_size)
    block_bytes = width * block_size
    gathered_bytes = lanes * block_bytes

    @v.helper
    def load(source, first, count, period, x):  # type: ignore[no-untyped-def]
        first %= period
        place = source + first * block_bytes
        if count < lanes or first + count > period:
            place = v.scratch(gathered_bytes)
            for lane in range(lanes):
                block = (first + min(lane, count - 1)) % period
                for j in range(0, block_bytes, 8):
                    v.store_i64(place + lane * block_bytes + j, v.load_i64(source + block * block_bytes + j))
        for j in range(0, block_size, lanes):
            to_lanes(place + j * width, x + j * vector)

    return load


def build_fits(type_name: str, search: Search) -> tuple[Any, Any]:
    """fit(op, x, w, head, stats) for weights with importance, and for weights that are all alike."""
    if isinstance(search.levels, Groups):
        fit = build_fit_groups(search)
        return fit, fit
    nearest, code = build_nearest(search.levels)
    build: Callable[..., Any] = build_fit_with_minimum if search.has_minimum else build_fit_without_minimum
    build = {"MXFP4": build_fit_exponent, "NVFP4": build_fit_scales}.get(type_name, build)
    weighted = build(search, nearest, code, True)
    # A second fit doubles what there is to compile: only the types that are soon done gain enough by it.
    return weighted, build(search, nearest, code, False) if type_name in LAYOUTS else weighted


def build_pack(type_name: str, search: Search) -> Any:
    """pack(x, head, out, count), from what a fit has left to the bytes of blocks."""
    if isinstance(search.levels, Groups):
        return build_pack_groups(type_name)
    return (build_pack_lanes if type_name in LAYOUTS else build_pack_codes)(type_name)


def quantize(type_name: str) -> Kernel:
    type = TensorType[type_name]
    search = SEARCHES[type]
    block_size, block_bytes = BLOCK_SIZES[type]
    fit_weighted, fit_alike = build_fits(type_name, search)
    pack = build_pack(type_name, search)
    load_f32, load_f16, load_bf16 = (build_load(source, block_size) for source in (F32, F16, BF16))
    lanes = v.target().lanes
    vector = 4 * lanes
    weight_bytes = block_size * vector
    both_bytes = 2 * weight_bytes
    one_over_size, smallest_square, largest_square = 1 / block_size, float(SPARED), float(block_size)
    head_bytes = HEAD_VECTORS * vector
    stats_bytes = STATS * vector

    @v.helper
    def weigh_by_size(x, w):  # type: ignore[no-untyped-def]
        """As `formats.blocks.fitting.by_size`."""
        squares = v.splat(0.0)
        for j in range(0, weight_bytes, vector):
            squares = squares + v.load(x + j) * v.load(x + j)
        inverse = v.divide(v.splat(1.0), squares * v.splat(one_over_size), tiny)
        for j in range(0, weight_bytes, vector):
            square = (v.load(x + j) * v.load(x + j)) * inverse
            square = v.choose(square < v.splat(largest_square), square, v.splat(largest_square))
            v.store(w + j, v.load(w + j) * square_root(v.splat(smallest_square) + square))

    @v.helper
    def add_stats(stats, sums, count):  # type: ignore[no-untyped-def]
        """Of the lanes that are no repetition."""
        counted = v.lane_numbers() < v.splat_int(count)
        for i in range(0, stats_bytes, vector):
            v.store(sums + i, v.load(sums + i) + v.choose(counted, v.load(stats + i), v.splat(0.0)))

    def kernel(op, step, thread):  # type: ignore[no-untyped-def]
        x, w = v.scratch(weight_bytes), v.scratch(both_bytes)
        head, stats = v.scratch(head_bytes), v.scratch(stats_bytes)
        source, out = v.load_i64(op + R.Q_SOURCE), v.load_i64(op + R.Q_OUT)
        source_type = v.load_i64(op + R.Q_SOURCE_TYPE)
        importance, row_blocks = v.load_i64(op + R.Q_IMPORTANCE), v.load_i64(op + R.Q_ROW_BLOCKS)
        by_size = v.load_i64(op + R.Q_BY_SIZE)
        n_blocks, sums = v.load_i64(op + R.Q_BLOCKS), v.load_i64(op + R.Q_SUMS)
        for i in range(0, stats_bytes, vector):
            fill(sums + i, 0.0)
        for j in range(0, both_bytes, vector):
            fill(w + j, 1.0)
        for first in range(0, n_blocks, lanes):
            count = min(lanes, n_blocks - first)
            if source_type == F16:
                load_f16(source, first, count, n_blocks, x)
            elif source_type == BF16:
                load_bf16(source, first, count, n_blocks, x)
            else:
                load_f32(source, first, count, n_blocks, x)
            for i in range(0, stats_bytes, vector):
                fill(stats + i, 0.0)
            if importance == 0:
                fit_alike(op, x, w, head, stats)
            else:
                load_f32(importance, first, count, row_blocks, w)
                for j in range(0, weight_bytes, vector):
                    v.store(w + weight_bytes + j, v.load(w + j))
                if by_size != 0:
                    weigh_by_size(x, w)
                fit_weighted(op, x, w, head, stats)
            pack(x, head, out + first * block_bytes, count)
            add_stats(stats, sums, count)

    return kernel
