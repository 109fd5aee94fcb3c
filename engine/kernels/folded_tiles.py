"""Quantised matrices times columns by AMX: tiles of 16 columns or rows by 32 weights, all in bfloat16.

Weights are unpacked to pairs of bfloat16 with scale and minimum folded in: a lane is a row, as everywhere, and 16
vectors of pairs are one tile. Activations are rounded to bfloat16 (`kernels.columns`). Nothing is scaled between
products, so that sums stay in tiles. What both roundings lose is less than what int8 activations do.

Every output is computed by the same operations in the same order, with any number of columns: a column alone goes
through the same instruction as a tile of one row. AMX adds products of the first and of the second weights of pairs
apart, 16 of each, and then both sums to the total.

So 16 by 16 by 32 take 41 cycles, where tiles of whole numbers (`kernels.whole_tiles`) need 72 and vpdpbusd 118 (Q4_K,
2,048 wide, many columns, Emerald Rapids). But a column alone takes two to three times as long as with vpdpbusd, so that
this is for models that read whole texts and write none, and for who asks for it.

Fixed point was tried, too: the scales of 256 weights as whole numbers of one unit, weights of 16 bits and activations
of 15, each as two bytes. Sums are exact in any order, so that a column alone can go through vpdpbusd, to the same bits
and at a tenth of the error (1e-4 of a product with Q4_0). 16 by 16 by 32 took 60 cycles, but a column alone 1.4 to 1.6
times as long as with int8: generation was 6 to 25 % slower, where memory did not hide that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types

from qrun.engine.kernels import records as R
from qrun.engine.kernels.products import (
    AHEAD_BYTES,
    ManyColumns,
    few_columns_of,
    groups_of,
    kernel_of,
    lines_of_runs,
    neighbouring_lines,
    turns_of,
    writers,
)
from qrun.engine.kernels.row_groups import blocks_unpacker, slice_unpacker, totals_writer
from qrun.engine.kernels.tiles import (
    TILE_BYTES,
    add_products,
    begin_sums,
    store_sums,
)
from qrun.engine.kernels.unpack import Group, Quantised
from qrun.engine.simd import operations as v
from qrun.engine.simd.operations import operation
from qrun.engine.simd.vector import F16, F32, I16, I32, Emitter, Vector

# So many groups of 32 weights of so many row groups are unpacked at a time, into the second-level cache: 128 KB. Sums
# are loaded into tiles and stored again once for each such slice.
SLICE_GROUPS, ROW_GROUPS = 32, 4
# A column alone needs them once only.
GROUPS_OF_FEW = 8
# Of columns, too, there should be no more at a time than the second level has room for: else half as many.
PASS_COLUMNS, PASS_BYTES = 512, 1 << 20


def fold(e: Emitter, spec: Quantised, group: Group) -> list[Vector]:
    """A group's weights as pairs of bfloat16: of each four, the first and the third one, then the others.

    A byte of weights is a float16 as it stands: of the least exponent, so many times 2^-24. One product in float16
    folds in scale and minimum, as large as it allows and rounded to its 11 bits, and a shift by 3 rounds these to 8.
    Then the exponent is put right: it has the same bits in both formats, where float16 has not run out of them; what is
    smaller than 2^-14 of the largest weight comes out as a 2^-15th of it or less.
    """
    bits, zero = (8, 128) if spec.limit is None else (spec.limit.bit_length(), spec.zero)
    largest = max((255 if spec.limit is None else spec.limit) - zero, zero)
    left = 10 - bits  # bits by which a weight is moved up, so that ten are used
    up = left - 11 + largest.bit_length()  # the largest weight becomes less than 2^(up + 1)
    folded = []
    for i, scale in enumerate(group.scales):
        top = scale.intrinsic("llvm.fabs") * largest
        if group.minimums:
            top = top + group.minimums[i].intrinsic("llvm.fabs")
        exponent = top.bits_as(I32) & 0x7F800000
        inverse = (exponent.constant(0x7F000000) - exponent).bits_as(F32)  # a power of two
        offset = scale * zero + group.minimums[i] if group.minimums else scale * zero
        factors = _in_pairs(scale * inverse * 2.0 ** (24 - left + up))
        offsets = _in_pairs(offset * inverse * -(2.0**up))
        moved = (exponent >> 16) - ((15 + up) << 7)
        moved = moved.maximum(0)
        folded.append((factors, offsets, (moved | (moved << 16)).bits_as(I16)))
    pairs = []
    mask = ((1 << bits) - 1) << left
    mask |= mask << 16
    for i, word in enumerate(group.weights):
        factors, offsets, exponents = folded[i * len(folded) // 8]
        for quants in (word << left & mask, word >> (8 - left) & mask):
            weights = quants.bits_as(F16).fma(factors, offsets)
            rounded = e.multiply_high(weights.bits_as(I16), 1 << 12)  # the sign fills four bits
            pairs.append(((rounded & -0x7001) + exponents).bits_as(I32))
    return pairs


def _in_pairs(values: Vector) -> Vector:
    """float32 values as float16, each twice."""
    halves = values.to_half().bits_as(I16).widen_unsigned(I32)
    return (halves | (halves << 16)).bits_as(F16)


def tile_operations(spec: Quantised) -> tuple[Any, Any]:
    """Unpack a block of 16 neighbouring rows into tiles in memory; unpack one of rows that lie apart, and meanwhile add
    what has been unpacked before to tile 0: a tile at `before` times columns at `x_before`, then those of this block
    but the last one. The columns' tiles begin at `x` and are `step` bytes long. Both ask for memory from `ahead` on.

    A tile that has just been stored cannot be loaded at once: with another one between, a tile takes 13 nanoseconds in
    the place of 26 (Emerald Rapids)."""

    def unpack(e: Emitter, group: Group, out: ir.Value) -> None:
        for i, pairs in enumerate(fold(e, spec, group)):
            e.store(pairs.value, out, 64 * i)

    @operation(lambda *_: types.void)
    def unpack_block(e: Emitter, address: ir.Value, stride: ir.Value, out: ir.Value, ahead: ir.Value) -> None:
        lines = neighbouring_lines(e, ahead, spec.block_bytes)
        for index, group in enumerate(groups_of(e, spec, address, stride, lines)):
            unpack(e, group, e.offset(out, TILE_BYTES * index))

    @operation(lambda *_: types.void)
    def add_block(
        e: Emitter, address: ir.Value, stride: ir.Value, unpacked: ir.Value, before: ir.Value, x: ir.Value,
        x_before: ir.Value, step: ir.Value, ahead: ir.Value,
    ) -> None:  # fmt: skip
        lines = lines_of_runs(e, ahead, stride, spec.block_bytes)
        for index, group in enumerate(groups_of(e, spec, address, stride, lines)):
            place = e.offset(unpacked, TILE_BYTES * index)
            unpack(e, group, place)
            e.load_matrix(4 + index % 2, x_before, 64)
            e.load_matrix(6 + index % 2, before, 64)
            e.multiply_matrices(0, 4 + index % 2, 6 + index % 2)
            x, x_before, before = e.builder.add(x, step), x, place

    return unpack_block, add_block


def folded_tile_matmul(spec: Quantised) -> Callable[[int, int, int], None]:
    """The kernel for weights of one quantised type."""
    lanes, columns = v.target().lanes, v.target().columns
    unpack_block, add_block = tile_operations(spec)
    block_bytes, groups = spec.block_bytes, spec.block_size // 32
    slice_blocks, few_blocks = SLICE_GROUPS // groups, GROUPS_OF_FEW // groups
    block_out, slice_bytes, few_bytes = groups * TILE_BYTES, SLICE_GROUPS * TILE_BYTES, GROUPS_OF_FEW * TILE_BYTES
    unpacked_bytes, totals_bytes = ROW_GROUPS * slice_bytes, ROW_GROUPS * 4 * lanes * PASS_COLUMNS
    turns = turns_of(block_bytes)
    unpack_slice = slice_unpacker(blocks_unpacker(unpack_block, block_bytes, block_out), slice_bytes)
    write_totals = totals_writer(columns, ROW_GROUPS)
    write_apart, _ = writers()

    @v.helper
    def configure(all_columns):  # type: ignore[no-untyped-def]
        if all_columns == 1:
            v.configure_tiles(1, 64)
        else:
            v.configure_tiles(columns, 64)

    @v.helper
    def release(_):  # type: ignore[no-untyped-def]
        v.release_tiles()

    @v.helper
    def dot_few(weights, stride, n_blocks, tail, x, run_end, jump, totals, n_columns, narrow):  # type: ignore[no-untyped-def]
        unpacked = v.scratch(few_bytes)
        step = 64 if narrow else TILE_BYTES
        v.zero_matrix(0)
        # Before the first tile, one of zeros.
        before, x_before = unpacked + few_bytes - TILE_BYTES, x
        for row in range(16):
            v.store(before + 64 * row, v.splat(0.0))
        for block in range(n_blocks):
            asked = weights + AHEAD_BYTES
            asked = asked if asked < run_end else asked + jump
            asked += block % turns * (lanes // turns) * stride
            place = unpacked + block % few_blocks * block_out
            add_block(weights, stride, place, before, x, x_before, step, asked)
            before, x_before = place + block_out - TILE_BYTES, x + step * (groups - 1)
            weights += block_bytes
            x += step * groups
        v.load_matrix(4, x_before, 64)
        v.load_matrix(6, before, 64)
        v.multiply_matrices(0, 4, 6)
        v.store_matrix(0, totals, 64)

    @v.helper
    def many_columns(op, matrix, begin, end, first_column, n_columns, after, unpacked, totals):  # type: ignore[no-untyped-def]
        """Some row groups (or rows `begin` to `end`, if the matrix has fewer rows than one) times many columns. What
        lies from `after` on is asked for meanwhile."""
        row_bytes = v.load_i64(op + R.MM_ROW_BYTES)
        n_rows = v.load_i64(op + R.MM_ROWS)
        n_blocks = v.load_i64(op + R.MM_BLOCKS)
        column_bytes = v.load_i64(op + R.MM_COLUMN_BYTES)
        whole = n_rows >= lanes
        stride = row_bytes if whole else 0
        for wanted in range(begin, end, ROW_GROUPS * lanes if whole else 1):
            # They are taken in pairs. The last ones are moved back over rows that are done: computed again, to the same
            # bits.
            row_groups = (min(ROW_GROUPS * lanes, end - wanted) + 2 * lanes - 1) // (2 * lanes) * 2 if whole else 2
            last = n_rows - lanes if whole else wanted
            ahead = after
            panels = (n_columns + columns - 1) // columns
            x0 = v.load_i64(op + R.MM_INPUT) + first_column * column_bytes
            for first in range(0, n_blocks, slice_blocks):
                blocks = min(slice_blocks, n_blocks - first)
                part = matrix + first * block_bytes
                ahead = unpack_slice(part, wanted, last, row_bytes, row_groups, blocks, stride, unpacked, ahead)
                for panel in range(0, panels, 2):
                    # Without another panel, the last one is taken twice.
                    other = min(panel + 1, panels - 1)
                    apart = (other - panel) * columns * column_bytes
                    for g in range(0, row_groups, 2):
                        place = totals + (panel * ROW_GROUPS + g) * TILE_BYTES
                        other_place = totals + (other * ROW_GROUPS + g) * TILE_BYTES
                        begin_sums(place, other_place, first > 0)
                        x = x0 + panel * columns * column_bytes + first * groups * TILE_BYTES
                        group = unpacked + g * slice_bytes
                        for _ in range(blocks * groups):
                            add_products(x, x + apart, group, group + slice_bytes)
                            group += TILE_BYTES
                            x += TILE_BYTES
                        store_sums(place, other_place)
            write_totals(op, totals, first_column, n_columns, wanted, last, row_groups, whole)

    many = ManyColumns(
        many_columns, unpacked_bytes, totals_bytes, ROW_GROUPS * lanes, PASS_COLUMNS, PASS_BYTES,
        begin=configure, end=release,
    )  # fmt: skip
    return kernel_of(few_columns_of(dot_few, write_apart), many)
