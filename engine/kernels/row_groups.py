"""Some row groups of a matrix at a time, each of as many rows as a vector has lanes, times many columns.

A slice of each row of them is unpacked and stays in the first-level cache; all panels of columns come by; then the next
slice. The more rows there are, the less often columns come from further away: those of a long prompt are more than the
second level has room for.
"""

from __future__ import annotations

from typing import Any

from qrun.engine.kernels import records as R
from qrun.engine.kernels.products import ManyColumns, nothing, writers
from qrun.engine.simd import operations as v

# Rows that are multiplied together, if each thread gets several times as many; columns, if there are so many.
MOST_ROWS, PASS_COLUMNS = 64, 256


def blocks_unpacker(unpack: Any, block_bytes: int, block_out: int) -> Any:
    """unpack_blocks(weights, blocks, stride, unpacked, ahead) -> ahead: some blocks of a row group. Memory is asked for
    from `ahead` on. unpack(address, stride, out, ahead): a block."""
    ahead_bytes = v.target().lanes * block_bytes

    @v.helper
    def unpack_blocks(weights, blocks, stride, unpacked, ahead):  # type: ignore[no-untyped-def]
        for i in range(blocks):
            unpack(weights + i * block_bytes, stride, unpacked + i * block_out, ahead)
            ahead += ahead_bytes
        return ahead

    return unpack_blocks


def slice_unpacker(unpack_blocks: Any, slice_bytes: int) -> Any:
    """unpack_slice(part, wanted, last, row_bytes, row_groups, blocks, stride, unpacked, ahead) -> ahead: some blocks of
    row groups from the row `wanted` on, of which none begins behind the row `last`; each group `slice_bytes` behind the
    one before. part: where the matrix's first row has the first block. unpack_blocks: see `blocks_unpacker`."""
    lanes = v.target().lanes

    @v.helper
    def unpack_slice(part, wanted, last, row_bytes, row_groups, blocks, stride, unpacked, ahead):  # type: ignore[no-untyped-def]
        for g in range(row_groups):
            weights = part + min(wanted + g * lanes, last) * row_bytes
            ahead = unpack_blocks(weights, blocks, stride, unpacked + g * slice_bytes, ahead)
        return ahead

    return unpack_slice


def totals_writer(columns: int, most_groups: int) -> Any:
    """write_totals(op, totals, first_column, n_columns, wanted, last, row_groups, whole): all columns of row groups to
    their places, from tiles [columns, lanes]: for each panel `most_groups` of them. whole: or else one row."""
    lanes = v.target().lanes
    tile_bytes = columns * 4 * lanes
    write_apart, write_neighbours = writers()

    @v.helper
    def write_totals(op, totals, first_column, n_columns, wanted, last, row_groups, whole):  # type: ignore[no-untyped-def]
        for column in range(n_columns):
            place = totals + column // columns * (most_groups * tile_bytes) + column % columns * (4 * lanes)
            if whole:
                for g in range(row_groups):
                    row = min(wanted + g * lanes, last)
                    write_neighbours(op, place + g * tile_bytes, first_column + column, row, 1)
            else:
                write_apart(op, place, first_column + column, wanted, 0)

    return write_totals


def many_columns_of(
    unpack_blocks: Any, add_panel: Any, add_half_panel: Any, add_tail: Any, together: int, groups: int,
    block_bytes: int, slice_blocks: int, group_bytes: int, x_bytes: int,
) -> ManyColumns:  # fmt: skip
    """For matrices whose blocks are so many groups of weights, of `group_bytes` unpacked, and `x_bytes` of a column.

    add_panel(unpacked, count, x, adding, totals): so many groups of `together` row groups times a panel, into memory or
    adding to what is there; add_half_panel: times the first half of a panel. add_tail(op, weights, x, totals): what
    rows have behind their last block, of one row group; None where they have nothing.
    """
    lanes, columns = v.target().lanes, v.target().columns
    slice_bytes, most_groups = slice_blocks * groups * group_bytes, MOST_ROWS // lanes
    tile_bytes, wide_block = columns * 4 * lanes, x_bytes * columns * groups
    unpack_slice = slice_unpacker(unpack_blocks, slice_bytes)
    write_totals = totals_writer(columns, most_groups)
    has_tail, add_tail = add_tail is not None, add_tail or nothing

    @v.helper
    def many_columns(op, matrix, begin, end, first_column, n_columns, after, unpacked, totals):  # type: ignore[no-untyped-def]
        """Rows `begin` to `end` times many columns. What lies from `after` on is asked for meanwhile."""
        row_bytes = v.load_i64(op + R.MM_ROW_BYTES)
        n_rows = v.load_i64(op + R.MM_ROWS)
        n_blocks = v.load_i64(op + R.MM_BLOCKS)
        tail = v.load_i64(op + R.MM_TAIL)
        column_bytes = n_blocks * groups * x_bytes + 4 * tail
        panel_bytes = columns * column_bytes
        # With fewer rows than lanes, one row is in all lanes.
        whole = n_rows >= lanes
        stride = row_bytes if whole else 0
        panels = (n_columns + columns - 1) // columns
        x0 = v.load_i64(op + R.MM_INPUT) + first_column * column_bytes
        for wanted in range(begin, end, MOST_ROWS if whole else 1):
            # The last ones are moved back over rows that are done: computed again, to the same bits.
            row_groups = together
            if whole:
                row_groups *= (min(MOST_ROWS, end - wanted) + together * lanes - 1) // (together * lanes)
            last = n_rows - lanes if whole else wanted
            ahead = after
            for first in range(0, n_blocks, slice_blocks):
                blocks = min(slice_blocks, n_blocks - first)
                part = matrix + first * block_bytes
                ahead = unpack_slice(part, wanted, last, row_bytes, row_groups, blocks, stride, unpacked, ahead)
                x = x0 + first * wide_block
                for panel in range(panels):
                    for g in range(0, row_groups, together):
                        place = totals + (panel * most_groups + g) * tile_bytes
                        if n_columns - panel * columns > columns // 2:
                            add_panel(unpacked + g * slice_bytes, blocks * groups, x, first > 0, place)
                        else:
                            add_half_panel(unpacked + g * slice_bytes, blocks * groups, x, first > 0, place)
                    x += panel_bytes
            if has_tail and tail > 0:
                for panel in range(panels):
                    x = x0 + panel * panel_bytes + n_blocks * wide_block
                    for g in range(row_groups):
                        weights = matrix + min(wanted + g * lanes, last) * row_bytes + n_blocks * block_bytes
                        add_tail(op, weights, x, totals + (panel * most_groups + g) * tile_bytes)
            write_totals(op, totals, first_column, n_columns, wanted, last, row_groups, whole)

    return ManyColumns(
        many_columns, most_groups * slice_bytes, most_groups * (4 * lanes) * PASS_COLUMNS, together * lanes,
        PASS_COLUMNS, most_rows=MOST_ROWS,
    )  # fmt: skip
