"""What kernels that use tiles of AMX share: two by two at a time, and sums on their way."""

from __future__ import annotations

from qrun.engine.simd import operations as v

TILE_BYTES = 1024


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
