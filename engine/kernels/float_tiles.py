"""Matrices of float16 and bfloat16 times columns by AMX: tiles of 16 rows or 8 columns by 32 weights, all in bfloat16.

A float16 is the sum of two bfloat16, exactly: its first eight bits, and what is left. An activation is, too, to 16 bits
of its 24. So a tile of activations has two numbers for each of 8 columns, and its products have two sums, which are
added at the end: all that is lost is what rounding loses in the last bits of float32. A bfloat16 matrix is loaded into
tiles as it lies in the file.

Every output is computed by the same operations in the same order, with any number of columns: 32 weights at a time are
added to one sum. A column alone goes through the same instruction as a tile of two numbers a row.

Rows have to be whole tiles long. Others are multiplied in float32 (`kernels.matmul`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types

from qrun.engine.kernels import records as R
from qrun.engine.kernels.columns import SPLIT_COLUMNS
from qrun.engine.kernels.products import (
    AHEAD_BYTES,
    ManyColumns,
    few_columns_of,
    kernel_of,
    lines_of_runs,
    neighbouring_lines,
    writers,
)
from qrun.engine.kernels.row_groups import blocks_unpacker, slice_unpacker
from qrun.engine.kernels.tiles import TILE_BYTES, begin_sums, store_sums
from qrun.engine.kernels.unpack import Rows
from qrun.engine.simd import operations as v
from qrun.engine.simd.operations import operation
from qrun.engine.simd.vector import F16, F32, I32, Emitter

# A row's weights in one tile, and what they take in the file: a cache line.
STEP, LINE_BYTES = 32, 64
# So many tiles of each of four row groups are unpacked at a time, for two thirds of the first-level cache. (Two row
# groups by two panels take as long with a bfloat16 matrix of 576 by 576, and a tenth longer with one of 512 by 2,048.)
SLICE_TILES, ROW_GROUPS = 8, 4
# Of columns there should be no more at a time than the second level has room for.
PASS_COLUMNS, LEAST_COLUMNS, PASS_BYTES = 512, 64, 1 << 20


def unpack_operations(type_name: str) -> tuple[int, Any, Any]:
    """How many tiles 32 weights of 16 rows take, and unpack(address, stride, out, ahead) of neighbouring rows and of
    those of runs."""
    tiles = 2 if type_name == "F16" else 1

    def unpack(e: Emitter, address: ir.Value, stride: ir.Value, out: ir.Value) -> None:
        for i, row in enumerate(Rows(e, address, stride).addresses):
            if type_name == "BF16":
                e.store(e.load(row, 0, I32, 16).value, out, LINE_BYTES * i)
                continue
            halves = [e.load(row, 32 * half, F16, 16).to_float() for half in range(2)]
            first = [values.bits_as(I32) & -0x10000 for values in halves]
            rest = [
                (values - top.bits_as(F32)).bits_as(I32) for values, top in zip(halves, first, strict=True)
            ]
            for tile, (low, high) in enumerate((first, rest)):
                e.store(((low >> 16) | high).value, out, TILE_BYTES * tile + LINE_BYTES * i)

    @operation(lambda *_: types.void)
    def unpack_neighbours(
        e: Emitter, address: ir.Value, stride: ir.Value, out: ir.Value, ahead: ir.Value
    ) -> None:
        for line in neighbouring_lines(e, ahead, LINE_BYTES):
            e.prefetch(line)
        unpack(e, address, stride, out)

    @operation(lambda *_: types.void)
    def unpack_run(e: Emitter, address: ir.Value, stride: ir.Value, out: ir.Value, ahead: ir.Value) -> None:
        for line in lines_of_runs(e, ahead, stride, LINE_BYTES):
            e.prefetch(line)
        unpack(e, address, stride, out)

    return tiles, unpack_neighbours, unpack_run


@operation(lambda *_: types.void)
def ask(e: Emitter, ahead: ir.Value, stride: ir.Value) -> None:
    """For a line of each lane's row."""
    for line in lines_of_runs(e, ahead, stride, LINE_BYTES):
        e.prefetch(line)


@operation(lambda *_: types.void)
def join(e: Emitter, sums: ir.Value, totals: ir.Value) -> None:
    """From a tile of sums [16 rows, 2 x 8 columns] to vectors of rows, one for each column."""
    words = Rows(e, sums, ir.Constant(ir.IntType(64), LINE_BYTES)).line()
    for column in range(SPLIT_COLUMNS):
        both = words[column].bits_as(F32) + words[SPLIT_COLUMNS + column].bits_as(F32)
        e.store(both.value, totals, 64 * column)


def float_tile_matmul(type_name: str) -> Callable[[int, int, int], None]:
    """The kernel for weights of F16 or BF16."""
    lanes = v.target().lanes
    tiles, unpack_neighbours, unpack_run = unpack_operations(type_name)
    direct = type_name == "BF16"
    step_bytes = tiles * TILE_BYTES
    slice_steps = SLICE_TILES // tiles
    slice_bytes = SLICE_TILES * TILE_BYTES
    unpacked_bytes = ROW_GROUPS * slice_bytes
    totals_bytes = ROW_GROUPS * TILE_BYTES * (PASS_COLUMNS // SPLIT_COLUMNS)
    panel_step = TILE_BYTES  # of activations
    joined_bytes = 64 * SPLIT_COLUMNS
    unpack_slice = slice_unpacker(blocks_unpacker(unpack_neighbours, LINE_BYTES, step_bytes), slice_bytes)
    write_apart, write_neighbours = writers()

    def through_tiles(narrow: bool) -> Any:
        """A row of each lane's run, `stride` bytes apart, times a panel, or a column that is packed for itself."""
        x_step, x_stride = (128, 8) if narrow else (panel_step, LINE_BYTES)

        @v.helper
        def add(place, stride, x):  # type: ignore[no-untyped-def]
            v.load_matrix(6, x, x_stride)
            v.load_matrix(4, place, stride)
            v.multiply_matrices(0, 4, 6)
            if not direct:
                v.load_matrix(5, place + TILE_BYTES, stride)
                v.multiply_matrices(0, 5, 6)

        @v.helper
        def dot(weights, stride, n_steps, x, run_end, jump, totals):  # type: ignore[no-untyped-def]
            sums = v.scratch(TILE_BYTES)
            unpacked = v.scratch(slice_bytes)
            v.zero_matrix(0)
            for step in range(n_steps):
                asked = weights + AHEAD_BYTES
                asked = asked if asked < run_end else asked + jump
                if direct:
                    ask(asked, stride)
                    add(weights, stride, x)
                    x += x_step
                else:
                    # What has just been stored cannot be loaded at once: that comes a turn later.
                    unpack_run(weights, stride, unpacked + step % slice_steps * step_bytes, asked)
                    if step > 0:
                        add(unpacked + (step - 1) % slice_steps * step_bytes, LINE_BYTES, x)
                        x += x_step
                weights += LINE_BYTES
            if not direct:
                add(unpacked + (n_steps - 1) % slice_steps * step_bytes, LINE_BYTES, x)
            v.store_matrix(0, sums, LINE_BYTES)
            if narrow:
                v.store(totals, v.load_apart(sums, LINE_BYTES) + v.load_apart(sums + 4, LINE_BYTES))
            else:
                join(sums, totals)

        return dot

    dot_one_column, dot_one_panel = through_tiles(True), through_tiles(False)

    @v.helper
    def dot_few(weights, stride, n_blocks, tail, x, run_end, jump, totals, n_columns, narrow):  # type: ignore[no-untyped-def]
        n_steps = n_blocks // 4  # blocks are 16 bytes
        if narrow:
            dot_one_column(weights, stride, n_steps, x, run_end, jump, totals)
        else:
            for panel in range((n_columns + SPLIT_COLUMNS - 1) // SPLIT_COLUMNS):
                place = totals + panel * (64 * SPLIT_COLUMNS)
                dot_one_panel(weights, stride, n_steps, x + panel * n_steps * panel_step, run_end, jump, place)

    @v.helper
    def add_tile(weights):  # type: ignore[no-untyped-def]
        """The next tile of each row group times tile 6."""
        v.load_matrix(4, weights, LINE_BYTES)
        v.multiply_matrices(0, 4, 6)
        v.load_matrix(5, weights + slice_bytes, LINE_BYTES)
        v.multiply_matrices(1, 5, 6)
        v.load_matrix(4, weights + 2 * slice_bytes, LINE_BYTES)
        v.multiply_matrices(2, 4, 6)
        v.load_matrix(5, weights + 3 * slice_bytes, LINE_BYTES)
        v.multiply_matrices(3, 5, 6)

    @v.helper
    def many_columns(op, matrix, begin, end, first_column, n_columns, after, unpacked, totals):  # type: ignore[no-untyped-def]
        """Four row groups (or rows `begin` to `end`, if the matrix has fewer rows than one) times many columns. What
        lies from `after` on is asked for meanwhile."""
        row_bytes = v.load_i64(op + R.MM_ROW_BYTES)
        n_rows = v.load_i64(op + R.MM_ROWS)
        n_steps = v.load_i64(op + R.MM_BLOCKS) // 4
        column_bytes = v.load_i64(op + R.MM_COLUMN_BYTES)
        whole = n_rows >= lanes
        stride = row_bytes if whole else 0
        joined = v.scratch(joined_bytes)
        for wanted in range(begin, end, ROW_GROUPS * lanes if whole else 1):
            # All row groups are always taken. The last ones are moved back over rows that are done: computed again, to
            # the same bits.
            last = n_rows - lanes if whole else wanted
            ahead = after
            panels = (n_columns + SPLIT_COLUMNS - 1) // SPLIT_COLUMNS
            x0 = v.load_i64(op + R.MM_INPUT) + first_column * column_bytes
            for first in range(0, n_steps, slice_steps):
                steps = min(slice_steps, n_steps - first)
                part = matrix + first * LINE_BYTES
                ahead = unpack_slice(part, wanted, last, row_bytes, ROW_GROUPS, steps, stride, unpacked, ahead)
                for panel in range(panels):
                    place = totals + panel * (ROW_GROUPS * TILE_BYTES)
                    begin_sums(place, place + 2 * TILE_BYTES, first > 0)
                    x = x0 + (panel * n_steps + first) * panel_step
                    group = unpacked
                    for _ in range(steps):
                        v.load_matrix(6, x, LINE_BYTES)
                        for tile in range(tiles):
                            add_tile(group + tile * TILE_BYTES)
                        group += step_bytes
                        x += panel_step
                    store_sums(place, place + 2 * TILE_BYTES)
            for panel in range(panels):
                for g in range(ROW_GROUPS):
                    join(totals + (panel * ROW_GROUPS + g) * TILE_BYTES, joined)
                    columns = min(SPLIT_COLUMNS, n_columns - panel * SPLIT_COLUMNS)
                    for column in range(columns):
                        out_column = first_column + panel * SPLIT_COLUMNS + column
                        if whole:
                            row = min(wanted + g * lanes, last)
                            write_neighbours(op, joined + column * 64, out_column, row, 1)
                        elif g == 0:
                            write_apart(op, joined + column * 64, out_column, wanted, 0)

    @v.helper
    def configure(all_columns):  # type: ignore[no-untyped-def]
        if all_columns == 1:
            v.configure_tiles(16, 8)
        else:
            v.configure_tiles(16, 64)

    @v.helper
    def release(_):  # type: ignore[no-untyped-def]
        v.release_tiles()

    many = ManyColumns(
        many_columns, unpacked_bytes, totals_bytes, ROW_GROUPS * lanes, PASS_COLUMNS, PASS_BYTES, LEAST_COLUMNS,
        configure, release,
    )  # fmt: skip
    return kernel_of(few_columns_of(dot_few, write_apart), many)
