"""Quantising blocks of float32, one block in each vector lane: "quantize-Q4_K" and so on.

`formats.blocks.fitting` states the problem and solves it in NumPy. Here are the same operations in the same order, none
fused, so that the bytes are the same; sums run along a block while lanes are blocks, so they also do not depend on how
many lanes there are. What is tried (starts, refinements, rounds) comes with the record.

Lanes lie side by side in scratch memory: weight j of all blocks is one vector. Once the search is over its place takes
the code of the weight, and `quantize_pack` puts the codes and scales of one lane into the bytes of its block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from qrun.engine import records as R
from qrun.engine.kernels.quantize_fit import HEAD_VECTORS, STATS, build_fit_with_minimum, build_fit_without_minimum
from qrun.engine.kernels.quantize_mxfp4 import build_fit_exponent
from qrun.engine.kernels.quantize_pack import PACKERS
from qrun.engine.simd import operations as v
from qrun.engine.simd.operations import operation
from qrun.engine.simd.vector import Emitter, Vector
from qrun.formats.blocks import BLOCK_SIZES, SEARCHES, TensorType
from qrun.formats.blocks.fitting import Levels, Steps

Kernel = Callable[[int, int, int], None]



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


@operation(lambda *_: v.types.void)
def fill(e: Emitter, address: ir.Value, value: ir.Value) -> None:
    e.store(e.splat(value).value, address)


def quantize(type_name: str) -> Kernel:
    search = SEARCHES[TensorType[type_name]]
    block_size, block_bytes = BLOCK_SIZES[TensorType[type_name]]
    nearest, code = build_nearest(search.levels)
    build = build_fit_with_minimum if search.has_minimum else build_fit_without_minimum
    build = build_fit_exponent if type_name == "MXFP4" else build
    fit = build(search, nearest, code)
    pack = PACKERS[type_name]
    lanes = v.target().lanes
    vector = 4 * lanes
    weight_bytes = block_size * vector
    head_bytes = HEAD_VECTORS * vector
    stats_bytes = STATS * vector

    def kernel(op, step, thread):  # type: ignore[no-untyped-def]
        x, w = v.scratch(weight_bytes), v.scratch(weight_bytes)
        head, stats, codes = v.scratch(head_bytes), v.scratch(stats_bytes), v.scratch(block_size)
        source, out = v.load_i64(op + R.Q_SOURCE), v.load_i64(op + R.Q_OUT)
        importance = v.load_i64(op + R.Q_IMPORTANCE)
        n_blocks = v.load_i64(op + R.Q_BLOCKS)
        if importance == 0:
            for j in range(block_size):
                fill(w + j * vector, 1.0)
        for first in range(0, n_blocks, lanes):
            count = min(lanes, n_blocks - first)
            for lane in range(lanes):
                # Lanes to spare repeat the last block.
                block = first + min(lane, count - 1)
                place = source + block * block_size * 4
                for j in range(block_size):
                    v.store_f32(x + j * vector + 4 * lane, v.load_f32(place + 4 * j))
                if importance != 0:
                    within = (v.load_i64(op + R.Q_FIRST_BLOCK) + block) % v.load_i64(op + R.Q_ROW_BLOCKS)
                    place = importance + within * block_size * 4
                    for j in range(block_size):
                        v.store_f32(w + j * vector + 4 * lane, v.load_f32(place + 4 * j))
            for i in range(STATS):
                fill(stats + i * vector, 0.0)
            fit(op, x, w, head, stats)
            for lane in range(count):
                for j in range(block_size):
                    v.store_u8(codes + j, v.load_i32(x + j * vector + 4 * lane))
                pack(codes, head + 4 * lane, vector, out + (first + lane) * block_bytes)
                for i in range(STATS):
                    place = v.load_i64(op + R.Q_SUMS) + 4 * (i * n_blocks + first + lane)
                    v.store_f32(place, v.load_f32(stats + i * vector + 4 * lane))

    return kernel
