"""Sums of products of all pairs of columns, by AMX: "moments-pack" and "moments-add". See `quantize.moments`.

Rows of float32 are rounded to bfloat16, two neighbouring rows to a pair. A tile has 16 pairs of 16 columns: as it is
the right factor of a product, and turned the left one, of which a row has the 32 numbers of a column. Tiles of the same
columns lie one behind the other.

Sums are blocks of 32 by 32 columns, four tiles each, and of those only the ones up to the diagonal, row by row. Each is
added to by the same operations in the same order, whoever does it.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from qrun.engine.kernels import records as R
from qrun.engine.kernels.columns import rounded
from qrun.engine.kernels.tiles import TILE_BYTES, add_products, begin_sums, store_sums
from qrun.engine.kernels.unpack import Rows
from qrun.engine.simd import operations as v
from qrun.engine.simd.operations import operation
from qrun.engine.simd.vector import F32, I64, Emitter

Kernel = Callable[[int, int, int], None]

COLUMNS = R.MOM_BLOCK // 2  # of a tile
BLOCK_BYTES = 4 * TILE_BYTES


@operation(lambda *_: v.types.void)
def pack_tile(e: Emitter, x: ir.Value, stride: ir.Value, out: ir.Value, turned: ir.Value) -> None:
    """32 rows of 16 floats from `x` on, `stride` bytes apart: a tile of pairs, and the same one turned."""
    for pair in range(R.MOM_ROWS // 2):
        places = (e.builder.add(x, e.builder.mul(stride, ir.Constant(I64, 2 * pair + i))) for i in range(2))
        first, second = (rounded(e.load(place, 0, F32, COLUMNS)) for place in places)
        e.store((first | (second << 16)).value, out, 64 * pair)
    for column, words in enumerate(Rows(e, out, ir.Constant(I64, 64)).line()):
        e.store(words.value, turned, 64 * column)


def moments(variant: str) -> Kernel:
    """Columns FIRST to LAST, in blocks of 32. "pack": STEPS times 32 rows at X into tiles at PACKED and TURNED. "add":
    their products into blocks at SUMS."""

    def pack(op, step, part):  # type: ignore[no-untyped-def]
        stride = v.load_i64(op + R.MOM_X_STRIDE)
        steps = v.load_i64(op + R.MOM_STEPS)
        first, last = v.load_i64(op + R.MOM_FIRST), v.load_i64(op + R.MOM_LAST)
        for i in range(steps):
            x = v.load_i64(op + R.MOM_X) + i * R.MOM_ROWS * stride
            for group in range(2 * first, 2 * last):
                place = (group * steps + i) * TILE_BYTES
                packed, turned = v.load_i64(op + R.MOM_PACKED) + place, v.load_i64(op + R.MOM_TURNED) + place
                pack_tile(x + group * (4 * COLUMNS), stride, packed, turned)

    def add(op, step, part):  # type: ignore[no-untyped-def]
        run = v.load_i64(op + R.MOM_STEPS) * TILE_BYTES  # of 16 columns
        first, last = v.load_i64(op + R.MOM_FIRST), v.load_i64(op + R.MOM_LAST)
        packed, turned = v.load_i64(op + R.MOM_PACKED), v.load_i64(op + R.MOM_TURNED)
        sums = v.load_i64(op + R.MOM_SUMS)
        v.configure_tiles(16, 64)
        # What is turned of columns FIRST to LAST stays in the second-level cache meanwhile.
        for j in range(last):
            for i in range(max(first, j), last):
                place = sums + (i * (i + 1) // 2 + j) * BLOCK_BYTES
                begin_sums(place, place + 2 * TILE_BYTES, 1)
                left, right = turned + 2 * i * run, packed + 2 * j * run
                for t in range(0, run, TILE_BYTES):
                    add_products(left + t, left + run + t, right + t, right + run + t)
                store_sums(place, place + 2 * TILE_BYTES)
        v.release_tiles()

    return pack if variant == "pack" else add
