"""Reading memory and nothing else: what any kernel that needs each weight once could reach at best."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from qrun.engine.kernels import records as R
from qrun.engine.simd import operations as v
from qrun.engine.simd.operations import operation
from qrun.engine.simd.vector import I32, Emitter

# How far ahead memory is asked for: hardware alone keeps too few requests under way (21 GB/s instead of 30 on a Zen 4).
_AHEAD = 4096


@operation(lambda *_: v.types.void)
def add_block(e: Emitter, address: ir.Value, sums: ir.Value) -> None:
    """Add READ_BLOCK bytes, as int32, to four vectors at `sums`."""
    size = 4 * e.lanes
    totals = [e.load(sums, size * i, I32, e.lanes) for i in range(4)]
    for i in range(R.READ_BLOCK // size):
        totals[i % 4] = totals[i % 4] + e.load(address, size * i, I32, e.lanes)
    for i, total in enumerate(totals):
        e.store(total.value, sums, size * i)


@operation(lambda *_: v.types.void)
def store_total(e: Emitter, sums: ir.Value, out: ir.Value) -> None:
    """All four vectors' lanes added, so that none of the reading can be left out."""
    vectors = [e.load(sums, 4 * e.lanes * i, I32, e.lanes) for i in range(4)]
    e.store((vectors[0] + vectors[1] + vectors[2] + vectors[3]).reduce("add"), out)


def read(_: str) -> Callable[[int, int, int], None]:
    """A part is a piece of the memory, from its beginning to its end."""
    sums_bytes, block_bytes = 16 * v.target().lanes, R.READ_BLOCK

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        parts = v.load_i64(step + R.STEP_PARTS)
        n_blocks = v.load_i64(op + R.READ_BLOCKS)
        sums = v.scratch(sums_bytes)
        for i in range(0, sums_bytes, 4):
            v.store_i32(sums + i, 0)
        first, last = n_blocks * part // parts, n_blocks * (part + 1) // parts
        for block in range(first, last):
            place = v.load_i64(op + R.READ_ADDRESS) + block * block_bytes
            v.prefetch(place + _AHEAD, block_bytes)
            add_block(place, sums)
        store_total(sums, v.load_i64(op + R.READ_OUT) + 64 * part)

    return kernel
