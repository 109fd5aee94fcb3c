"""Token ids to rows of float32, from an embedding matrix of any type."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from qrun.engine.kernels import records as R
from qrun.engine.kernels.unpack import TYPES, Group, Quantised, Rows
from qrun.engine.simd import operations as v
from qrun.engine.simd.operations import operation
from qrun.engine.simd.vector import I8, I32, I64, Emitter


def embed(type_name: str) -> Callable[[int, int, int], None]:
    """out[row] = weights[token or position] * scale. A row is unpacked as a group of rows that are all the same one."""
    spec = TYPES[type_name]
    quantised = isinstance(spec, Quantised)
    block_bytes = spec.block_bytes if isinstance(spec, Quantised) else 16
    out_bytes = 4 * (spec.block_size if isinstance(spec, Quantised) else 16 // spec.weight_bytes)
    tail_bytes = 0 if isinstance(spec, Quantised) else spec.weight_bytes

    def store_group(e: Emitter, group: Group, out: ir.Value, index: int, factor: ir.Value) -> None:
        zero = (e.signed_bias if spec.limit is None else spec.zero) if isinstance(spec, Quantised) else 0
        for i, words in enumerate(group.weights):
            bytes_ = words.bits_as(I8).permute(range(4))
            signed = isinstance(spec, Quantised) and spec.limit is None and not zero
            whole = bytes_.widen_signed(I32) if signed else bytes_.widen_unsigned(I32) - zero
            half = i * len(group.scales) // 8
            value = whole.to_float() * e.splat(group.scales[half].lane(0), 4)
            if group.minimums:
                value = value - e.splat(group.minimums[half].lane(0), 4)
            e.store((value * e.splat(factor, 4)).value, out, 16 * (8 * index + i))

    @operation(lambda *_: v.types.void)
    def store_block(e: Emitter, address: ir.Value, out: ir.Value, factor: ir.Value) -> None:
        rows = Rows(e, address, ir.Constant(I64, 0))
        if isinstance(spec, Quantised):
            for index, group in enumerate(spec.groups(rows)):
                store_group(e, group, out, index, factor)
        else:
            for i, weight in enumerate(spec.several(rows, 4)):
                e.store(e.builder.fmul(weight.lane(0), factor), out, 4 * i)

    @operation(lambda *_: v.types.void)
    def store_one(e: Emitter, address: ir.Value, out: ir.Value, factor: ir.Value) -> None:
        if not isinstance(spec, Quantised):
            weight = spec.one(Rows(e, address, ir.Constant(I64, 0)), 0)
            e.store(e.builder.fmul(weight.lane(0), factor), out)

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        count = v.load_i64(step + R.N_ROWS)
        parts = v.load_i64(step + R.STEP_PARTS)
        factor = v.load_f32(op + R.EMBED_SCALE)
        numbers = v.load_i64(step + (R.POSITIONS if v.load_i64(op + R.EMBED_BY_POSITION) != 0 else R.TOKENS))
        for row in range(count * part // parts, count * (part + 1) // parts):
            number = v.load_i64(numbers + 8 * row)
            place = v.load_i64(op + R.EMBED_WEIGHTS) + number * v.load_i64(op + R.EMBED_ROW_BYTES)
            out = v.load_i64(op + R.EMBED_OUT) + row * v.load_i64(op + R.EMBED_OUT_STRIDE)
            for _ in range(v.load_i64(op + R.EMBED_BLOCKS)):
                store_block(place, out, factor)
                place += block_bytes
                out += out_bytes
            if not quantised:
                for _ in range(v.load_i64(op + R.EMBED_TAIL)):
                    store_one(place, out, factor)
                    place += tail_bytes
                    out += 4

    return kernel
