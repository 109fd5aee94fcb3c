"""Quantised matrices times many columns by AMX: tiles of 16 rows by 16 columns, 32 weights at a time, in bfloat16.

Weights less their zero and activations in units of their scale are whole numbers that bfloat16 holds exactly, and so
are their sums in float32 (see `kernels.columns`). So a tile gives the very numbers that other instructions give, in
whatever order it adds; scales and minimums come after it, in the same operations as everywhere. Up to 24 columns go
through vpdpbusd (`kernels.matmul`), to the same bits.

Each tile of sums goes through memory on its way to the vector registers, where it is scaled and added to the totals:
two or three instructions for each of its 16 vectors, and these get one port while tiles are in use. Meanwhile the tiles
of two groups further on are multiplied, those of the next 16 columns behind the last ones of these. With Q4_K 16 by 16
by 32 take 61 cycles with that, and unpacking 32 weights of 16 rows 72, where vpdpbusd takes 118 in all (Emerald Rapids,
512 rows, 2,048 wide); multiplying alone takes 16, and storing the sums 16 more. With a scale for each 16 weights there
are two tiles.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from qrun.engine.kernels import records as R
from qrun.engine.kernels.columns import TILE_MINIMUM_FACTOR, TILE_MINIMUM_FACTORS, TILE_SCALE
from qrun.engine.kernels.products import ManyColumns, groups_of
from qrun.engine.kernels.row_groups import blocks_unpacker, slice_unpacker, totals_writer
from qrun.engine.kernels.tiles import TILE_BYTES
from qrun.engine.kernels.unpack import Quantised
from qrun.engine.simd import operations as v
from qrun.engine.simd.operations import operation
from qrun.engine.simd.vector import F32, I16, I32, Emitter, Vector

# So many groups of 32 weights of two row groups are unpacked at a time: with as many activations of 16 columns that is
# 29 KB of the first-level cache. (Twice as many groups or rows take a tenth longer.)
SLICE_GROUPS, ROW_GROUPS = 8, 2
# Of columns there should be no more at a time than the second level has room for. Long ones are cut: so many groups of
# several row groups are multiplied, then the next ones.
PASS_COLUMNS, LEAST_COLUMNS, PASS_BYTES = 512, 256, 3 << 19
LONG_GROUPS, ROWS_OF_LONG = 64, 128


def _pairs(e: Emitter, spec: Quantised, word: Vector) -> list[Vector]:
    """Four weights of each row, without their zero, as pairs of bfloat16: the first and the third, then the others."""
    if spec.limit is not None and spec.limit < 32:
        values = [_bfloat16(i - spec.zero) for i in range(32)]
        return [e.lookup32(values, indices.bits_as(I16)).bits_as(I32) for indices in (word, word >> 8)]
    if spec.limit is None:
        word = e.bias_signed(word)  # which takes the bias off again
        numbers = [(word << (24 - 8 * i)).shift_right_signed(24) for i in range(4)]
    else:
        numbers = [(word >> (8 * i) & 0xFF) - spec.zero for i in range(4)]
    floats = [number.to_float().bits_as(I32) for number in numbers]
    return [floats[i] >> 16 | floats[i + 2] & -0x10000 for i in range(2)]


def _bfloat16(number: int) -> int:
    """The bits of a whole number of at most eight bits."""
    if number == 0:
        return 0
    exponent = abs(number).bit_length() - 1
    return (0x8000 if number < 0 else 0) | (127 + exponent) << 7 | (abs(number) << 7 >> exponent) & 0x7F


def _group_bytes(spec: Quantised) -> int:
    """What a group takes, unpacked: its tiles, its scales, its minimums."""
    return TILE_BYTES + 64 * spec.n_scales * (2 if spec.has_minimum else 1)


def _operations(spec: Quantised) -> tuple[Any, Any, Any, Any]:
    """Unpack a block of 16 neighbouring rows; multiply a group by 16 columns (`place` is 0 or 1, and says which tiles
    are used for it); store these sums; scale them, and add them to the totals of 16 columns."""
    two = spec.n_scales == 2
    group_bytes, sums_bytes = _group_bytes(spec), TILE_BYTES * spec.n_scales

    @operation(lambda *_: types.void)
    def unpack_block(e: Emitter, address: ir.Value, stride: ir.Value, out: ir.Value, ahead: ir.Value) -> None:
        e.unsigned_limit = 127  # no weights that are sixteen times as large
        # What follows is asked for later, see `add_slice`: nothing from `ahead` on here.
        for index, group in enumerate(groups_of(e, spec, address, stride, [])):
            place = e.offset(out, group_bytes * index)
            weights = [pair for word in group.weights for pair in _pairs(e, spec, word)]
            for i, vector in enumerate([*weights, *group.scales, *group.minimums]):
                e.store(vector.value, place, 64 * i)

    def tiles_of(place: int) -> list[tuple[int, int, int]]:
        """Those for sums, activations and weights, of each half or of both together."""
        return [(2 * place + half, 4 + half, 6 + half) for half in range(2)] if two else [(place, 4 + place, 6 + place)]

    @operation(lambda *_: types.void)
    def multiply(e: Emitter, place: int, group: ir.Value, x: ir.Value) -> None:
        for half, (total, activations, weights) in enumerate(tiles_of(place)):
            e.zero_matrix(total)
            e.load_matrix(activations, e.offset(x, 32 * half), 64)
            e.load_matrix(weights, e.offset(group, TILE_BYTES // 2 * half), 64)
            e.multiply_matrices(total, activations, weights)

    @operation(lambda *_: types.void)
    def store(e: Emitter, place: int, sums: ir.Value) -> None:
        for half, (total, *_) in enumerate(tiles_of(place)):
            e.store_matrix(total, e.offset(sums, sums_bytes * place + TILE_BYTES * half), 64)

    @operation(lambda total, *_: total)
    def scale(
        e: Emitter, total: list[Vector], place: int, group: ir.Value, x: ir.Value, sums: ir.Value
    ) -> list[Vector]:
        def of_rows(index: int) -> Vector:
            return e.load(group, TILE_BYTES + 64 * index, F32, 16)

        scales = [of_rows(i) for i in range(spec.n_scales)]
        minimums = [of_rows(spec.n_scales + i) for i in range(spec.n_scales if spec.has_minimum else 0)]
        result = []
        for column, value in enumerate(total):

            def field(index: int, column: int = column) -> Vector:
                return e.broadcast(x, TILE_BYTES + 64 * index + 4 * column, F32)

            products = [
                e.load(sums, sums_bytes * place + TILE_BYTES * half + 64 * column, F32, 16)
                for half in range(spec.n_scales)
            ]
            scaled = products[0] * scales[0]
            if two:
                scaled = products[1].fma(scales[1], scaled)
            value = scaled.fma(field(TILE_SCALE), value)
            if len(minimums) == 1:
                value = minimums[0].fma(field(TILE_MINIMUM_FACTOR), value)
            for half, minimum in enumerate(minimums if two else []):
                value = minimum.fma(field(TILE_MINIMUM_FACTORS + half), value)
            result.append(value)
        return result

    return unpack_block, multiply, store, scale


def whole_tile_columns(spec: Quantised) -> ManyColumns:
    """For weights of one quantised type."""
    lanes, columns = v.target().lanes, R.TILE_COLUMNS
    unpack_block, multiply, store, scale = _operations(spec)
    block_bytes, groups, depth = spec.block_bytes, spec.block_size // 32, 16 // spec.n_scales
    slice_blocks = SLICE_GROUPS // groups
    group_bytes, x_bytes = _group_bytes(spec), R.TILE_PACKED_BYTES * columns
    block_out, slice_bytes = groups * group_bytes, SLICE_GROUPS * group_bytes
    sums_bytes = 2 * TILE_BYTES * spec.n_scales
    ahead_bytes = slice_blocks * block_bytes
    # For all columns of a row group, or for fewer of several.
    totals_apart = ROW_GROUPS * 4 * lanes * LEAST_COLUMNS
    totals_bytes = max(ROW_GROUPS * 4 * lanes * PASS_COLUMNS, totals_apart * (ROWS_OF_LONG // (ROW_GROUPS * lanes)))
    unpack_slice = slice_unpacker(blocks_unpacker(unpack_block, block_bytes, block_out), slice_bytes)
    write_totals = totals_writer(columns, ROW_GROUPS)

    @v.helper
    def configure(all_columns):  # type: ignore[no-untyped-def]
        if all_columns > R.MOST_WITHOUT_TILES:
            v.configure_tiles(16, 64, depth)

    @v.helper
    def release(all_columns):  # type: ignore[no-untyped-def]
        if all_columns > R.MOST_WITHOUT_TILES:
            v.release_tiles()

    @v.helper
    def multiply_first(group, x, sums):  # type: ignore[no-untyped-def]
        multiply(0, group, x)
        multiply(1, group + group_bytes, x + x_bytes)
        store(0, sums)

    @v.helper
    def add_pairs(total, group, x, n_groups, next_group, next_x, sums):  # type: ignore[no-untyped-def]
        """Groups, of which the first two are multiplied already; and multiply the first two that follow them."""
        for i in range(0, n_groups, 2):
            following, following_x = group + 2 * group_bytes, x + 2 * x_bytes
            if i + 2 >= n_groups:
                following, following_x = next_group, next_x
            multiply(0, following, following_x)
            store(1, sums)
            total = scale(total, 0, group, x, sums)
            multiply(1, following + group_bytes, following_x + x_bytes)
            store(0, sums)
            total = scale(total, 1, group + group_bytes, x + x_bytes, sums)
            group, x = following, following_x
        return total

    @v.helper
    def add_one(total, group, x, sums):  # type: ignore[no-untyped-def]
        multiply(0, group, x)
        store(0, sums)
        return scale(total, 0, group, x, sums)

    @v.helper
    def add_slice(  # type: ignore[no-untyped-def]
        unpacked, row_groups, n_groups, x, column_bytes, panels, adding, totals, sums, following, row_bytes, asked
    ):  # fmt: skip
        """Some groups of row groups times all panels. Meanwhile `asked` rows at each panel are asked for, from
        `following` on."""
        if n_groups > 1:
            multiply_first(unpacked, x, sums)
        for panel in range(panels):
            for _ in range(asked):
                v.prefetch(following, ahead_bytes)
                following += row_bytes
            next_x = x + columns * column_bytes if panel + 1 < panels else x
            for g in range(row_groups):
                place = totals + (panel * ROW_GROUPS + g) * TILE_BYTES
                group = unpacked + g * slice_bytes
                total = v.zero_tile(columns)
                if adding:
                    total = v.load_tile(columns, place, 4 * lanes)
                if n_groups > 1:
                    another = g + 1 < row_groups
                    next_group = group + slice_bytes if another else unpacked
                    total = add_pairs(total, group, x, n_groups, next_group, x if another else next_x, sums)
                else:
                    total = add_one(total, group, x, sums)
                v.store_tile(total, place, 4 * lanes)
            x = next_x

    @v.helper
    def many_columns(op, matrix, begin, end, first_column, n_columns, after, unpacked, totals):  # type: ignore[no-untyped-def]
        """Some row groups (or rows `begin` to `end`, if the matrix has fewer rows than one) times many columns. What
        lies from `after` on is asked for meanwhile."""
        sums = v.scratch(sums_bytes)
        row_bytes = v.load_i64(op + R.MM_ROW_BYTES)
        n_rows = v.load_i64(op + R.MM_ROWS)
        n_blocks = v.load_i64(op + R.MM_BLOCKS)
        column_bytes = v.load_i64(op + R.MM_COLUMN_BYTES)
        whole = n_rows >= lanes
        stride = row_bytes if whole else 0
        panels = (n_columns + columns - 1) // columns
        x0 = v.load_i64(op + R.MM_INPUT) + first_column * column_bytes
        together = ROW_GROUPS * lanes if whole else 1
        # All rows by so much of the columns that it stays in the second level, then by the next part.
        several = whole and end - begin > together
        cuts = (n_blocks * groups + LONG_GROUPS - 1) // LONG_GROUPS if several else 1
        cut = ((n_blocks + cuts - 1) // cuts + slice_blocks - 1) // slice_blocks * slice_blocks
        asked = (together + panels - 1) // panels  # rows of those that follow, at each panel
        begun = 0
        while begun < n_blocks:
            for wanted in range(begin, end, together):
                # The last group is moved back over rows that are done: computed again, to the same bits.
                row_groups = (min(together, end - wanted) + lanes - 1) // lanes if whole else 1
                last = n_rows - lanes if whole else wanted
                following = matrix + (wanted + together) * row_bytes + begun * block_bytes
                if wanted + together >= end:
                    begins_cut = begun + cut < n_blocks
                    following = matrix + begin * row_bytes + (begun + cut) * block_bytes if begins_cut else after
                place = totals + ((wanted - begin) // together * totals_apart if several else 0)
                first, ends = begun, min(begun + cut, n_blocks)
                while first < ends:
                    blocks = min(slice_blocks, ends - first)
                    n_groups = blocks * groups
                    if n_groups % 2 == 1 and n_groups > 1:  # the last one comes by itself
                        n_groups -= 1
                        blocks -= 1
                    part = matrix + first * block_bytes
                    unpack_slice(part, wanted, last, row_bytes, row_groups, blocks, stride, unpacked, 0)
                    x = x0 + first * groups * x_bytes
                    add_slice(
                        unpacked, row_groups, n_groups, x, column_bytes, panels, first > 0, place, sums, following,
                        row_bytes, asked,
                    )  # fmt: skip
                    following += blocks * block_bytes
                    first += blocks
                if ends == n_blocks:
                    write_totals(op, place, first_column, n_columns, wanted, last, row_groups, whole)
            begun += cut

    return ManyColumns(
        many_columns, ROW_GROUPS * slice_bytes, totals_bytes, ROW_GROUPS * lanes, PASS_COLUMNS, PASS_BYTES,
        LEAST_COLUMNS, configure, release, LONG_GROUPS * R.TILE_PACKED_BYTES, ROWS_OF_LONG,
    )  # fmt: skip
