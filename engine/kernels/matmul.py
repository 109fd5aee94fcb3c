"""Matrix times columns, straight from the blocks of a file: out[c, r] = sum over k of weights[r, k] * x[c, k].

Rows are taken in groups of as many as a vector has lanes. Weights of a group are unpacked so that a lane is a row
(`unpack`), and activations are broadcast against them. So sums stay in their lanes, and nothing is added across lanes.
A group's rows are neighbours where there are many columns (`kernels.row_groups`). With few, memory decides the speed:
there each lane has a run of neighbouring rows to itself, which hardware foresees.

Every output is computed by the same float operations in the same order, however many columns there are: exact integer
sums of 16 products, times the column's scale, times the row's scale, less the minimum, added up group by group.
That is why a prompt gives the same bits in any batch, on any number of threads.

Columns come packed into panels (`kernels.columns`). With one panel, weights go from the file through registers, for two
columns, half a panel or all of it. With more, a slice of some row groups is unpacked into the first-level cache and
used for all panels, of the last one perhaps for half of it.

Where there is AMX, matrices of float16 and bfloat16 go through `float_tiles`, and quantised ones times many columns
through `whole_tiles`, to the bits that few columns get here; `folded_tiles` are for models that read whole texts only.

Ranges say which columns belong to which matrix: [count, (matrix, first column, columns) ...]. A dense matrix has one
range; experts have one each. A range begins on a panel's first column.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, overload

from llvmlite import ir
from numba.core import types

from qrun.engine.kernels import records as R
from qrun.engine.kernels.columns import dot_quantised
from qrun.engine.kernels.float_tiles import float_tile_matmul
from qrun.engine.kernels.folded_tiles import folded_tile_matmul
from qrun.engine.kernels.products import (
    AHEAD_BYTES,
    few_columns_of,
    groups_of,
    kernel_of,
    lines_of_runs,
    neighbouring_lines,
    turns_of,
    writers,
)
from qrun.engine.kernels.row_groups import blocks_unpacker, many_columns_of
from qrun.engine.kernels.unpack import LINE_WORDS, TYPES, Float, Group, Quantised, Rows
from qrun.engine.kernels.whole_tiles import whole_tile_columns
from qrun.engine.simd import operations as v
from qrun.engine.simd.operations import operation
from qrun.engine.simd.vector import F32, I32, Emitter, Vector


def _group_vectors(spec: Quantised) -> int:
    return 8 + spec.n_scales * (2 if spec.has_minimum else 1)


class _Loads(Sequence[Vector]):
    """Neighbouring vectors in memory, each of which is loaded where it is asked for."""

    def __init__(self, e: Emitter, address: ir.Value, first: int, count: int, element: ir.Type) -> None:
        self._e, self._address, self._places, self._element = e, address, range(first, first + count), element

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Vector: ...
    @overload
    def __getitem__(self, index: slice) -> list[Vector]: ...
    def __getitem__(self, index: int | slice) -> Vector | list[Vector]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        lanes = self._e.lanes
        return self._e.load(self._address, 4 * lanes * self._places[index], self._element, lanes)


def _load_group(e: Emitter, spec: Quantised, address: ir.Value) -> Group:
    n = spec.n_scales
    minimums = _Loads(e, address, 8 + n, n if spec.has_minimum else 0, F32)
    return Group(_Loads(e, address, 0, 8, I32), _Loads(e, address, 8, n, F32), minimums)


def _tile_of(tile: types.Type, *_: Any) -> types.Type:
    return tile


def quantised_operations(
    spec: Quantised, panel: int, even: bool = False, together: int = 1, apart: int = 0
) -> tuple[Any, Any, Any]:
    """For one type, and columns in panels of that width: unpack a block into memory; add a group of `together` row
    groups from memory, which lie `apart`; add a block straight from the file. Both that read the file ask for memory
    from `ahead` on, as much as they read: of neighbouring rows, or of runs. even: columns are packed for tiles of whole
    numbers."""

    @operation(lambda *_: types.void)
    def unpack_block(e: Emitter, address: ir.Value, stride: ir.Value, out: ir.Value, ahead: ir.Value) -> None:
        lines = neighbouring_lines(e, ahead, spec.block_bytes)
        for index, group in enumerate(groups_of(e, spec, address, stride, lines)):
            for i, vector in enumerate([*group.weights, *group.scales, *group.minimums]):
                e.store(vector.value, out, 4 * e.lanes * (index * _group_vectors(spec) + i))

    @operation(_tile_of)
    def dot_group(e: Emitter, total: list[Vector], unpacked: ir.Value, block: ir.Value) -> list[Vector]:
        groups = [_load_group(e, spec, e.offset(unpacked, apart * i)) for i in range(together)]
        return dot_quantised(e, spec, panel, groups, total, block, even)

    @operation(_tile_of)
    def dot_block(
        e: Emitter, total: list[Vector], address: ir.Value, stride: ir.Value, block: ir.Value, ahead: ir.Value
    ) -> list[Vector]:
        lines = lines_of_runs(e, ahead, stride, spec.block_bytes)
        for index, group in enumerate(groups_of(e, spec, address, stride, lines)):
            place = e.offset(block, R.PACKED_BYTES * panel * index)
            total = dot_quantised(e, spec, panel, [group], total, place, even)
        return total

    return unpack_block, dot_group, dot_block


def float_operations(
    spec: Float, panel: int, words: int = 4, together: int = 1, apart: int = 0
) -> tuple[Any, Any, Any]:
    """The same for a float type, whose blocks are four words of a row, or more; columns are packed as float32."""
    block_bytes, per_block = 4 * words, 4 * words // spec.weight_bytes

    def add(e: Emitter, total: list[Vector], weights: Sequence[Vector], x: ir.Value, index: int) -> list[Vector]:
        """One weight of each row of some row groups, whose totals are one behind the other."""
        n = len(total) // len(weights)
        values = [e.broadcast_word(x, index * panel + c, per_block * panel, F32) for c in range(n)]
        return [weights[i // n].fma(values[i % n], t) for i, t in enumerate(total)]

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
            weights = [e.load(unpacked, apart * g + 4 * e.lanes * i, F32, e.lanes) for g in range(together)]
            total = add(e, total, weights, x, i)
        return total

    @operation(_tile_of)
    def dot_block(
        e: Emitter, total: list[Vector], address: ir.Value, stride: ir.Value, x: ir.Value, ahead: ir.Value
    ) -> list[Vector]:
        for i, weight in enumerate(weights(e, address, stride, lines_of_runs(e, ahead, stride, block_bytes))):
            total = add(e, total, [weight], x, i)
        return total

    return unpack_block, dot_group, dot_block


def _tail_operation(spec: Float) -> Any:
    """Add one weight of a float row whose length is no multiple of a block."""

    @operation(_tile_of)
    def dot_one(e: Emitter, total: list[Vector], address: ir.Value, stride: ir.Value, x: ir.Value) -> list[Vector]:
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
    # Floats are taken a cache line of each row at a time where as many rows are taken, and by blocks from there on.
    by_lines, line_blocks = False, 1

    def line_operations(_: int) -> tuple[Any, Any, Any]:
        return None, None, None

    if isinstance(spec, Float) and lanes == LINE_WORDS:
        by_lines, line_blocks = True, 4
        line_operations = functools.partial(float_operations, spec, words=LINE_WORDS)
    # A slice of 256 weights of each row is unpacked at a time: 5 KB of the first-level cache with 16 lanes.
    slice_blocks = 8 // groups if isinstance(spec, Quantised) else 16 * spec.weight_bytes
    block_out, slice_bytes = groups * group_bytes, slice_blocks * groups * group_bytes
    # With 16 registers, two row groups share the activations of a panel that are loaded: three vectors are then loaded
    # for four products, in the place of five, and loads are what AVX2 machines have too few of. (Zen 3, 512 columns:
    # quantised matrices take 0.5 to 0.8 of the time, float16 half of it.)
    together = 2 if v.target().is_x86 and lanes == 8 else 1
    unpack_block, dot_group, _ = operations(columns, together=together, apart=slice_bytes)
    unpack_line, *_ = line_operations(columns)
    has_tail, dot_one = isinstance(spec, Float), _tail_operation(spec) if isinstance(spec, Float) else None
    turns = turns_of(block_bytes)
    wide_x = x_bytes * columns

    def through_registers(width: int, panel: int) -> Any:
        """A row of each lane's run, `stride` bytes apart, times the first `width` columns of one panel. Totals go to
        memory. What is to be asked for behind the first lane's `run_end` is `jump` bytes further on."""
        dot_block, dot_line = operations(panel)[2], line_operations(panel)[2]

        @v.helper
        def dot(weights, stride, n_blocks, tail, x, run_end, jump, totals):  # type: ignore[no-untyped-def]
            total = v.zero_tile(width)
            done = 0
            if by_lines:
                done = n_blocks // line_blocks * line_blocks
                for _ in range(0, done, line_blocks):
                    asked = weights + AHEAD_BYTES
                    total = dot_line(total, weights, stride, x, asked if asked < run_end else asked + jump)
                    weights += line_blocks * block_bytes
                    x += x_bytes * line_blocks * panel
            for block in range(done, n_blocks):
                asked = weights + AHEAD_BYTES
                asked = asked if asked < run_end else asked + jump
                asked += block % turns * (lanes // turns) * stride
                total = dot_block(total, weights, stride, x, asked)
                weights += block_bytes
                x += x_bytes * groups * panel
            if has_tail:
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
        vectors, tile_bytes = width * together, 4 * lanes * columns

        @v.helper
        def dot(unpacked, count, x, adding, totals):  # type: ignore[no-untyped-def]
            total = v.zero_tile(vectors)
            if adding:
                total = v.load_rows(vectors, width, totals, tile_bytes)
            for _ in range(count):
                total = dot_group(total, unpacked, x)
                unpacked += group_bytes
                x += wide_x
            v.store_rows(total, width, totals, tile_bytes)

        return dot

    @v.helper
    def unpack_lines(weights, blocks, stride, unpacked, ahead):  # type: ignore[no-untyped-def]
        lines = blocks // line_blocks
        for i in range(0, lines * line_blocks, line_blocks):
            unpack_line(weights + i * block_bytes, stride, unpacked + i * block_out, ahead)
            ahead += lanes * block_bytes * line_blocks
        done = lines * line_blocks
        return unpack_blocks(
            weights + done * block_bytes, blocks - done, stride, unpacked + done * block_out, ahead
        )

    @v.helper
    def add_tail(op, weights, x, totals):  # type: ignore[no-untyped-def]
        whole, tail = v.load_i64(op + R.MM_ROWS) >= lanes, v.load_i64(op + R.MM_TAIL)
        stride = v.load_i64(op + R.MM_ROW_BYTES) if whole else 0
        total = v.zero_tile(columns)
        if v.load_i64(op + R.MM_BLOCKS) > 0:
            total = v.load_tile(columns, totals, 4 * lanes)
        for i in range(tail):
            total = dot_one(total, weights + i * tail_bytes, stride, x)
            x += 4 * columns
        v.store_tile(total, totals, 4 * lanes)

    unpack_blocks = blocks_unpacker(unpack_block, block_bytes, block_out)
    many = many_columns_of(
        unpack_lines if by_lines else unpack_blocks, through_memory(columns), through_memory(columns // 2),
        add_tail if has_tail else None, together, groups, block_bytes, slice_blocks, group_bytes, x_bytes,
    )  # fmt: skip
    few_columns = few_columns_of(dot_few, writers()[0])
    in_tiles = whole_tile_columns(spec) if tiles and isinstance(spec, Quantised) else None
    return kernel_of(few_columns, many, in_tiles)
