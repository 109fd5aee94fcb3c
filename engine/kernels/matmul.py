"""Matrix times columns, straight from the blocks of a file: out[c, r] = sum over k of weights[r, k] * x[c, k].

Rows are taken in groups of as many as a vector has lanes. Weights of a group are unpacked so that a lane is a row
(`unpack`), and activations are broadcast against them. So sums stay in their lanes, and nothing is added across lanes.
A group's rows are neighbours where there are many columns. With few, memory decides the speed: there each lane has a
run of neighbouring rows to itself, which hardware foresees.

Every output is computed by the same float operations in the same order, however many columns there are: exact integer
sums of 16 products, times the column's scale, times the row's scale, less the minimum, added up group by group.
That is why a prompt gives the same bits in any batch, on any number of threads.

Columns come packed into panels (`kernels.columns`). With one panel, weights go from the file through registers, for two
columns, half a panel or all of it. With more, a slice of the row group is unpacked into the first-level cache and used
for all panels, of the last one perhaps for half of it.

Where there is AMX, matrices of float16 and bfloat16 go through `float_tiles`, and quantised ones times many columns
through `whole_tiles`, to the bits that few columns get here; `folded_tiles` are for models that read whole texts only.

Ranges say which columns belong to which matrix: [count, (matrix, first column, columns) ...]. A dense matrix has one
range; experts have one each. A range begins on a panel's first column.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types

from qrun.engine.kernels import records as R
from qrun.engine.kernels.columns import dot_quantised
from qrun.engine.kernels.float_tiles import float_tile_matmul
from qrun.engine.kernels.folded_tiles import folded_tile_matmul
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
from qrun.engine.kernels.unpack import LINE_WORDS, TYPES, Float, Group, Quantised, Rows
from qrun.engine.kernels.whole_tiles import whole_tile_columns
from qrun.engine.simd import operations as v
from qrun.engine.simd.operations import operation
from qrun.engine.simd.vector import F32, I32, Emitter, Vector


def _group_vectors(spec: Quantised) -> int:
    return 8 + spec.n_scales * (2 if spec.has_minimum else 1)


def _load_group(e: Emitter, spec: Quantised, address: ir.Value) -> Group:
    size = 4 * e.lanes
    n = spec.n_scales
    weights = [e.load(address, size * i, I32, e.lanes) for i in range(8)]
    rest = [e.load(address, size * (8 + i), F32, e.lanes) for i in range(_group_vectors(spec) - 8)]
    return Group(weights, rest[:n], rest[n:])


def _tile_of(tile: types.Type, *_: Any) -> types.Type:
    return tile


def quantised_operations(spec: Quantised, panel: int, even: bool = False) -> tuple[Any, Any, Any]:
    """For one type, and columns in panels of that width: unpack a block into memory; add a group from memory; add a
    block straight from the file. Both that read the file ask for memory from `ahead` on, as much as they read: of
    neighbouring rows, or of runs. even: columns are packed for tiles of whole numbers."""

    @operation(lambda *_: types.void)
    def unpack_block(e: Emitter, address: ir.Value, stride: ir.Value, out: ir.Value, ahead: ir.Value) -> None:
        lines = neighbouring_lines(e, ahead, spec.block_bytes)
        for index, group in enumerate(groups_of(e, spec, address, stride, lines)):
            for i, vector in enumerate([*group.weights, *group.scales, *group.minimums]):
                e.store(vector.value, out, 4 * e.lanes * (index * _group_vectors(spec) + i))

    @operation(_tile_of)
    def dot_group(e: Emitter, total: list[Vector], unpacked: ir.Value, block: ir.Value) -> list[Vector]:
        return dot_quantised(e, spec, panel, _load_group(e, spec, unpacked), total, block, even)

    @operation(_tile_of)
    def dot_block(
        e: Emitter, total: list[Vector], address: ir.Value, stride: ir.Value, block: ir.Value, ahead: ir.Value
    ) -> list[Vector]:
        lines = lines_of_runs(e, ahead, stride, spec.block_bytes)
        for index, group in enumerate(groups_of(e, spec, address, stride, lines)):
            place = e.offset(block, R.PACKED_BYTES * panel * index)
            total = dot_quantised(e, spec, panel, group, total, place, even)
        return total

    return unpack_block, dot_group, dot_block


def float_operations(spec: Float, panel: int, words: int = 4) -> tuple[Any, Any, Any]:
    """The same for a float type, whose blocks are four words of a row, or more; columns are packed as float32."""
    block_bytes, per_block = 4 * words, 4 * words // spec.weight_bytes

    def add(e: Emitter, total: list[Vector], weight: Vector, x: ir.Value, index: int) -> list[Vector]:
        return [
            weight.fma(e.broadcast_word(x, index * panel + c, per_block * panel, F32), t) for c, t in enumerate(total)
        ]

    def weights(e: Emitter, address: ir.Value, stride: ir.Value, lines: list[ir.Value]) -> list[Vector]:
        for line in lines:
            e.prefetch(line)
        return spec.several(Rows(e, address, stride), words)

    @operation(lambda *_: types.void)
    def unpack_block(e: Emitter, address: ir.Value, stride: ir.Value, out: ir.Value, ahead: ir.Value) -> None:
        for i, vector in enumerate(weights(e, address, stride, neighbouring_lines(e, ahead, block_bytes))):
            e.store(vector.value, out, 4 * e.lanes * i)

    @operation(_tile_of)
    def dot_group(e: Emitter, total: list[Vector], unpacked: ir.Value, x: ir.Value) -> list[Vector]:
        for i in range(per_block):
            total = add(e, total, e.load(unpacked, 4 * e.lanes * i, F32, e.lanes), x, i)
        return total

    @operation(_tile_of)
    def dot_block(
        e: Emitter, total: list[Vector], address: ir.Value, stride: ir.Value, x: ir.Value, ahead: ir.Value
    ) -> list[Vector]:
        for i, weight in enumerate(weights(e, address, stride, lines_of_runs(e, ahead, stride, block_bytes))):
            total = add(e, total, weight, x, i)
        return total

    return unpack_block, dot_group, dot_block


def _no_lines(panel: int) -> tuple[Any, Any, Any]:
    """In the place of `float_operations` where nothing is taken by cache lines: never called, but compiled."""

    @operation(lambda *_: types.void)
    def unpack(e: Emitter, address: ir.Value, stride: ir.Value, out: ir.Value, ahead: ir.Value) -> None:
        pass

    @operation(_tile_of)
    def dot(
        e: Emitter, total: list[Vector], address: ir.Value, stride: ir.Value, x: ir.Value, ahead: ir.Value
    ) -> list[Vector]:
        return total

    return unpack, None, dot


def _tail_operation(spec: Quantised | Float) -> Any:
    """Add one weight of a float row whose length is no multiple of a block."""

    @operation(_tile_of)
    def dot_one(e: Emitter, total: list[Vector], address: ir.Value, stride: ir.Value, x: ir.Value) -> list[Vector]:
        if isinstance(spec, Quantised):
            return total
        weight = spec.one(Rows(e, address, stride), 0)
        return [weight.fma(e.broadcast(x, 4 * c, F32), t) for c, t in enumerate(total)]

    return dot_one


def matmul(variant: str) -> Callable[[int, int, int], None]:
    """The kernel for weights of one tensor type. The variant: the type, and "tiles" for those that AMX multiplies."""
    type_name, _, tiles = variant.partition("-")
    spec = TYPES[type_name]
    if tiles and isinstance(spec, Float):
        return float_tile_matmul(type_name)
    if v.target().folded and isinstance(spec, Quantised):
        return folded_tile_matmul(spec)
    lanes, columns = v.target().lanes, v.target().columns
    if isinstance(spec, Quantised):
        operations = functools.partial(quantised_operations, spec, even=bool(tiles))
        block_bytes, groups = spec.block_bytes, spec.block_size // 32
        group_bytes, x_bytes, tail_bytes = 4 * lanes * _group_vectors(spec), R.PACKED_BYTES, 0
    else:
        operations = functools.partial(float_operations, spec)
        block_bytes, groups = 16, 1
        group_bytes, x_bytes, tail_bytes = (
            4 * lanes * (16 // spec.weight_bytes),
            64 // spec.weight_bytes,
            spec.weight_bytes,
        )
    unpack_block, dot_group, _ = operations(columns)
    # Floats are taken a cache line of each row at a time where as many rows are taken, and by blocks from there on.
    by_lines, line_operations = False, _no_lines
    if isinstance(spec, Float) and lanes == LINE_WORDS:
        by_lines, line_operations = True, functools.partial(float_operations, spec, words=LINE_WORDS)
    line_blocks = 4 if by_lines else 1
    unpack_line, *_ = line_operations(columns)
    dot_one = _tail_operation(spec)
    # A slice of 256 weights of each row is unpacked at a time: 5 KB of the first-level cache with 16 lanes.
    slice_blocks = 8 // groups if isinstance(spec, Quantised) else 16 * spec.weight_bytes
    block_out, slice_bytes = groups * group_bytes, slice_blocks * groups * group_bytes
    totals_bytes = 4 * lanes * R.MAX_COLUMNS
    turns = turns_of(block_bytes)
    wide_x, wide_block = x_bytes * columns, x_bytes * columns * groups
    tail_x = 4 * columns

    has_tiles = bool(tiles)
    write_apart, write_neighbours = writers()

    def through_registers(width: int, panel: int) -> Any:
        """A row of each lane's run, `stride` bytes apart, times the first `width` columns of one panel. Totals go to
        memory. What is to be asked for behind the first lane's `run_end` is `jump` bytes further on."""
        dot_block, dot_line = operations(panel)[2], line_operations(panel)[2]

        @v.helper
        def dot(weights, stride, n_blocks, tail, x, run_end, jump, totals):  # type: ignore[no-untyped-def]
            total = v.zero_tile(width)
            lines = n_blocks // line_blocks if by_lines else 0
            for _ in range(lines):
                asked = weights + AHEAD_BYTES
                total = dot_line(total, weights, stride, x, asked if asked < run_end else asked + jump)
                weights += line_blocks * block_bytes
                x += x_bytes * line_blocks * panel
            for block in range(lines * line_blocks, n_blocks):
                asked = weights + AHEAD_BYTES
                asked = asked if asked < run_end else asked + jump
                asked += block % turns * (lanes // turns) * stride
                total = dot_block(total, weights, stride, x, asked)
                weights += block_bytes
                x += x_bytes * groups * panel
            for i in range(tail):
                total = dot_one(total, weights + i * tail_bytes, stride, x)
                x += 4 * panel
            v.store_tile(total, totals, 4 * lanes)

        return dot

    dot_one_column = through_registers(1, 1)
    dot_two_columns = through_registers(2, columns)
    dot_half_panel = through_registers(columns // 2, columns)
    dot_one_panel = through_registers(columns, columns)

    @v.helper
    def dot_few(weights, stride, n_blocks, tail, x, run_end, jump, totals, n_columns, narrow):  # type: ignore[no-untyped-def]
        if narrow:
            dot_one_column(weights, stride, n_blocks, tail, x, run_end, jump, totals)
        elif n_columns <= 2:
            dot_two_columns(weights, stride, n_blocks, tail, x, run_end, jump, totals)
        elif n_columns <= columns // 2:
            dot_half_panel(weights, stride, n_blocks, tail, x, run_end, jump, totals)
        else:
            dot_one_panel(weights, stride, n_blocks, tail, x, run_end, jump, totals)

    def through_memory(width: int) -> Any:
        """`count` unpacked groups times the first `width` columns of a panel, into memory, or `adding` to it."""

        @v.helper
        def dot(unpacked, count, x, adding, totals):  # type: ignore[no-untyped-def]
            total = v.zero_tile(width)
            if adding:
                total = v.load_tile(width, totals, 4 * lanes)
            for _ in range(count):
                total = dot_group(total, unpacked, x)
                unpacked += group_bytes
                x += wide_x
            v.store_tile(total, totals, 4 * lanes)

        return dot

    add_panel, add_half_panel = through_memory(columns), through_memory(columns // 2)

    @v.helper
    def many_columns(op, matrix, begin, end, first_column, n_columns, after, unpacked, totals):  # type: ignore[no-untyped-def]
        """A row group (or `begin` to `end`, if the matrix has fewer rows) times many columns. What lies from `after` on
        is asked for meanwhile."""
        row_bytes = v.load_i64(op + R.MM_ROW_BYTES)
        n_rows = v.load_i64(op + R.MM_ROWS)
        n_blocks = v.load_i64(op + R.MM_BLOCKS)
        tail = v.load_i64(op + R.MM_TAIL)
        column_bytes = v.load_i64(op + R.MM_COLUMN_BYTES)
        if has_tiles:  # those are a tile's
            column_bytes = n_blocks * groups * x_bytes
        whole = n_rows >= lanes
        stride = row_bytes if whole else 0
        for wanted in range(begin, end, lanes if whole else 1):
            # The last group is moved back over rows that are done: computed again, to the same bits.
            row = min(wanted, n_rows - lanes) if whole else wanted
            weights = matrix + row * row_bytes
            ahead = after
            panels = (n_columns + columns - 1) // columns
            x0 = v.load_i64(op + R.MM_INPUT) + first_column * column_bytes
            for first in range(0, n_blocks, slice_blocks):
                blocks = min(slice_blocks, n_blocks - first)
                lines = blocks // line_blocks if by_lines else 0
                for i in range(0, lines * line_blocks, line_blocks):
                    address = weights + (first + i) * block_bytes
                    unpack_line(address, stride, unpacked + i * block_out, ahead)
                    ahead += lanes * block_bytes * line_blocks
                for i in range(lines * line_blocks, blocks):
                    address = weights + (first + i) * block_bytes
                    unpack_block(address, stride, unpacked + i * block_out, ahead)
                    ahead += lanes * block_bytes
                for panel in range(panels):
                    place = totals + panel * (4 * lanes * columns)
                    x = x0 + panel * columns * column_bytes + first * wide_block
                    if n_columns - panel * columns > columns // 2:
                        add_panel(unpacked, blocks * groups, x, first > 0, place)
                    else:
                        add_half_panel(unpacked, blocks * groups, x, first > 0, place)
            for panel in range(panels):
                place = totals + panel * (4 * lanes * columns)
                if tail > 0:
                    total = v.zero_tile(columns)
                    if n_blocks > 0:
                        total = v.load_tile(columns, place, 4 * lanes)
                    x = x0 + panel * columns * column_bytes + n_blocks * wide_block
                    for i in range(tail):
                        total = dot_one(total, weights + n_blocks * block_bytes + i * tail_bytes, stride, x)
                        x += tail_x
                    v.store_tile(total, place, 4 * lanes)
            for column in range(n_columns):
                place = totals + column * (4 * lanes)
                if whole:
                    write_neighbours(op, place, first_column + column, row, 1)
                else:
                    write_apart(op, place, first_column + column, row, 0)

    few_columns = few_columns_of(dot_few, write_apart)
    in_tiles = whole_tile_columns(spec) if tiles and isinstance(spec, Quantised) else None
    return kernel_of(few_columns, ManyColumns(many_columns, slice_bytes, totals_bytes, lanes, R.MAX_COLUMNS), in_tiles)
