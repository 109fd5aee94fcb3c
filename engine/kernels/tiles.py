"""What kernels that use tiles of AMX share: weights on their way there, two by two at a time, sums on the way back."""

from __future__ import annotations

from typing import Any

from qrun.engine.kernels.products import writers
from qrun.engine.simd import operations as v

TILE_BYTES = 1024


def slice_unpacker(unpack: Any, block_bytes: int, block_out: int, slice_bytes: int) -> Any:
    """unpack_slice(part, wanted, last, row_bytes, row_groups, blocks, stride, unpacked, ahead) -> ahead: some blocks of
    row groups from the row `wanted` on, of which none begins behind the row `last`; each group `slice_bytes` behind the
    one before. part: where the matrix's first row has the first block. unpack(address, stride, out, ahead): a block."""
    lanes = v.target().lanes
    ahead_bytes = lanes * block_bytes

    @v.helper
    def unpack_slice(part, wanted, last, row_bytes, row_groups, blocks, stride, unpacked, ahead):  # type: ignore[no-untyped-def]
        for g in range(row_groups):
            weights = part + min(wanted + g * lanes, last) * row_bytes
            for i in range(blocks):
                unpack(weights + i * block_bytes, stride, unpacked + g * slice_bytes + i * block_out, ahead)
                ahead += ahead_bytes
        return ahead

    return unpack_slice


def totals_writer(columns: int, most_groups: int) -> Any:
    """write_totals(op, totals, first_column, n_columns, wanted, last, row_groups, whole): all columns of row groups to
    their places, from tiles [columns, 16 rows]: for each panel `most_groups` of them. whole: or else one row."""
    lanes, panel_bytes = v.target().lanes, most_groups * TILE_BYTES
    write_apart, write_neighbours = writers()

    @v.helper
    def write_totals(op, totals, first_column, n_columns, wanted, last, row_groups, whole):  # type: ignore[no-untyped-def]
        for column in range(n_columns):
            place = totals + column // columns * panel_bytes + column % columns * 64
            if whole:
                for g in range(row_groups):
                    row = min(wanted + g * lanes, last)
                    write_neighbours(op, place + g * TILE_BYTES, first_column + column, row, 1)
            else:
                write_apart(op, place, first_column + column, wanted, 0)

    return write_totals


@v.helper
def add_products(left, other_left, right, other_right):  # type: ignore[no-untyped-def]
    """Tiles 0 to 3: the first left one times both right ones, then the other one times both."""
    v.load_matrix(4, left, 64)
    v.load_matrix(6, right, 64)
    v.multiply_matrices(0, 4, 6)
    v.load_matrix(7, other_right, 64)
    v.multiply_matrices(1, 4, 7)
    v.load_matrix(5, other_left, 64)
    v.multiply_matrices(2, 5, 6)
    v.multiply_matrices(3, 5, 7)


@v.helper
def begin_sums(place, other, adding):  # type: ignore[no-untyped-def]
    """Tiles 0 to 3: two that lie at each place, or zeros."""
    if adding:
        v.load_matrix(0, place, 64)
        v.load_matrix(1, place + TILE_BYTES, 64)
        v.load_matrix(2, other, 64)
        v.load_matrix(3, other + TILE_BYTES, 64)
    else:
        v.zero_matrix(0)
        v.zero_matrix(1)
        v.zero_matrix(2)
        v.zero_matrix(3)


@v.helper
def store_sums(place, other):  # type: ignore[no-untyped-def]
    v.store_matrix(0, place, 64)
    v.store_matrix(1, place + TILE_BYTES, 64)
    v.store_matrix(2, other, 64)
    v.store_matrix(3, other + TILE_BYTES, 64)
