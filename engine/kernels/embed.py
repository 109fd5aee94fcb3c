"""Token ids to rows of float32, from an embedding matrix of any type; and the last tokens to rows that hashes give.

For the latter, a block of state (`program.state_blocks`) has the tokens before its chunk, as many as hashes look back,
and then those of the chunk; each with 1 added, so that 0 is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from qrun.engine.kernels import records as R
from qrun.engine.kernels.columns import first_row
from qrun.engine.kernels.unpack import TYPES, Group, Quantised, Rows
from qrun.engine.simd import operations as v
from qrun.engine.simd.operations import operation
from qrun.engine.simd.vector import I8, I32, I64, Emitter


def _store_row(type_name: str) -> Any:
    """store_row(place, blocks, tail, out, factor): a row of a matrix, unpacked as a group of rows that are all the same
    one."""
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

    @v.helper
    def store_row(place, blocks, tail, out, factor):  # type: ignore[no-untyped-def]
        for _ in range(blocks):
            store_block(place, out, factor)
            place += block_bytes
            out += out_bytes
        if not quantised:
            for _ in range(tail):
                store_one(place, out, factor)
                place += tail_bytes
                out += 4

    return store_row


def embed(type_name: str) -> Callable[[int, int, int], None]:
    """out[row] = weights[token or position] * scale."""
    store_row = _store_row(type_name)

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        count = v.load_i64(step + R.N_ROWS)
        parts = v.load_i64(step + R.STEP_PARTS)
        factor = v.load_f32(op + R.EMBED_SCALE)
        numbers = v.load_i64(step + (R.POSITIONS if v.load_i64(op + R.EMBED_BY_POSITION) != 0 else R.TOKENS))
        for row in range(first_row(count, part, parts), first_row(count, part + 1, parts)):
            number = v.load_i64(numbers + 8 * row)
            place = v.load_i64(op + R.EMBED_WEIGHTS) + number * v.load_i64(op + R.EMBED_ROW_BYTES)
            out = v.load_i64(op + R.EMBED_OUT) + row * v.load_i64(op + R.EMBED_OUT_STRIDE)
            store_row(place, v.load_i64(op + R.EMBED_BLOCKS), v.load_i64(op + R.EMBED_TAIL), out, factor)

    return kernel


def embed_hashes(type_name: str) -> Callable[[int, int, int], None]:
    """out[row] = weights[number] for each number that hashes of the last tokens give (see `graph.Hashes`)."""
    store_row = _store_row(type_name)

    @v.helper
    def token_of(op, step, segment, i):  # type: ignore[no-untyped-def]
        """1 + the token of row i of a segment, or 0; those before 0 are in its block."""
        if i >= 0:
            row = v.load_i64(segment + R.SEG_FIRST_ROW) + i
            return v.load_i64(v.load_i64(step + R.TOKENS) + 8 * row) + 1
        before = v.load_i64(op + R.HASH_LENGTH) - 1 + v.load_i64(segment + R.SEG_LOGGED) + i
        return v.load_i64(v.load_i64(segment + R.SEG_IN) + v.load_i64(op + R.HASH_STATE) + 8 * before)

    @v.helper
    def compute(op, step, segment, i):  # type: ignore[no-untyped-def]
        """One row."""
        per_length, size = v.load_i64(op + R.HASH_PER_LENGTH), v.load_i64(op + R.HASH_ROW_SIZE)
        blocks, tail = v.load_i64(op + R.EMBED_BLOCKS), v.load_i64(op + R.EMBED_TAIL)
        multipliers = v.load_i64(op + R.HASH_MULTIPLIERS)
        end = v.load_i64(op + R.HASH_END)
        row = v.load_i64(segment + R.SEG_FIRST_ROW) + i
        out = v.load_i64(op + R.EMBED_OUT) + row * v.load_i64(op + R.EMBED_OUT_STRIDE)
        mixed = (token_of(op, step, segment, i) - 1) * v.load_i64(multipliers)
        ended = False
        number = 0
        for back in range(1, v.load_i64(op + R.HASH_LENGTH)):
            token = end
            if not ended:
                token = token_of(op, step, segment, i - back) - 1
                if token < 0:
                    token = end
                ended = token == end
            mixed = mixed ^ (token * v.load_i64(multipliers + 8 * back))
            for _ in range(per_length):
                # The remainder of a number without a sign: sizes are below 2^31, so that nothing here reaches 2^63.
                modulus = v.load_i64(v.load_i64(op + R.HASH_SIZES) + 8 * number)
                half = (mixed >> 1) & 0x7FFFFFFFFFFFFFFF
                place = (half % modulus * 2 + (mixed & 1)) % modulus
                place += v.load_i64(v.load_i64(op + R.HASH_OFFSETS) + 8 * number)
                address = v.load_i64(op + R.EMBED_WEIGHTS) + place * v.load_i64(op + R.EMBED_ROW_BYTES)
                store_row(address, blocks, tail, out, v.float32(1.0))
                out += 4 * size
                number += 1

    @v.helper
    def keep(op, step, segment):  # type: ignore[no-untyped-def]
        """Write the tokens into the block, and where the step ends in another one, into that."""
        before = v.load_i64(op + R.HASH_LENGTH) - 1
        n_rows, logged = v.load_i64(segment + R.SEG_ROWS), v.load_i64(segment + R.SEG_LOGGED)
        state = v.load_i64(op + R.HASH_STATE)
        place = v.load_i64(segment + R.SEG_IN) + state
        for i in range(min(n_rows, R.STATE_ROWS - logged)):
            v.store_i64(place + 8 * (before + logged + i), token_of(op, step, segment, i))
        if logged + n_rows <= R.STATE_ROWS:
            return
        place = v.load_i64(segment + R.SEG_OUT) + state
        here = (logged + n_rows - 1) % R.STATE_ROWS + 1  # rows in the last chunk
        for i in range(before + here):
            v.store_i64(place + 8 * i, token_of(op, step, segment, n_rows - here - before + i))

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        parts = v.load_i64(step + R.STEP_PARTS)
        for number in range(v.load_i64(step + R.N_SEGMENTS)):
            segment = v.load_i64(step + R.SEGMENTS) + number * R.SEG_BYTES
            count = v.load_i64(segment + R.SEG_ROWS)
            for i in range(count * part // parts, count * (part + 1) // parts):
                compute(op, step, segment, i)
            if part == 0:  # the others read what was there before
                keep(op, step, segment)

    return kernel
