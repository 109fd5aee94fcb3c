"""What all kernels that use AMX's tiles share: sums of two by two of them, on their way to memory and back."""

from __future__ import annotations

from qrun.engine.simd import operations as v

TILE_BYTES = 1024


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
