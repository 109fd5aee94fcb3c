"""Changes of a matrix by adapters, of the rows that have some: y += scale * B (A x), in float32.

Which rows have which adapters differs from step to step: STARTS has for each row of the step where its entries begin
(and behind the last row, where they end), ENTRIES for each the number of an adapter and a scale. ADAPTERS has for each
adapter what it has for this matrix: A [rank, width], B transposed [rank, out width], its rank (0: nothing), where its
numbers lie among the inner ones of a row, and a factor. A row's sums have one order, whatever else is in the step.
"""

from __future__ import annotations

from collections.abc import Callable

from qrun.engine.kernels import records as R
from qrun.engine.simd import operations as v

Kernel = Callable[[int, int, int], None]

_CHUNK = 256  # columns of the result that are computed together


@v.helper
def _entries(op, step, row):  # type: ignore[no-untyped-def]
    """Where the entries of a row begin. The head's rows are numbers of the step's."""
    if v.load_i64(op + R.LORA_IN_HEAD) != 0:
        row = v.load_i64(v.load_i64(step + R.SELECTED) + 8 * row)
    return v.load_i64(op + R.LORA_STARTS) + 8 * row


def lora_down(_: str) -> Kernel:
    """The inner numbers: A x."""
    lanes = v.target().lanes

    @v.helper
    def dot(a, x, width):  # type: ignore[no-untyped-def]
        whole = width // (4 * lanes) * (4 * lanes)
        first, second, third, fourth = v.splat(0.0), v.splat(0.0), v.splat(0.0), v.splat(0.0)
        for i in range(0, whole, 4 * lanes):
            first = v.fma(v.load(a + 4 * i), v.load(x + 4 * i), first)
            second = v.fma(v.load(a + 4 * (i + lanes)), v.load(x + 4 * (i + lanes)), second)
            third = v.fma(v.load(a + 4 * (i + 2 * lanes)), v.load(x + 4 * (i + 2 * lanes)), third)
            fourth = v.fma(v.load(a + 4 * (i + 3 * lanes)), v.load(x + 4 * (i + 3 * lanes)), fourth)
        total = v.sum_lanes((first + second) + (third + fourth))
        for i in range(whole, width):
            total += v.load_f32(a + 4 * i) * v.load_f32(x + 4 * i)
        return total

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        parts = v.load_i64(step + R.STEP_PARTS)
        width = v.load_i64(op + R.LORA_WIDTH)
        ranks = v.load_i64(op + R.LORA_RANKS)
        units = v.load_i64(step + R.N_ROWS) * ranks
        for unit in range(units * part // parts, units * (part + 1) // parts):
            row = unit // ranks
            inner = unit % ranks
            place = _entries(op, step, row)
            x = v.load_i64(op + R.LORA_X) + row * v.load_i64(op + R.LORA_X_STRIDE)
            for i in range(v.load_i64(place), v.load_i64(place + 8)):
                entry = v.load_i64(op + R.LORA_ENTRIES) + 16 * i
                adapter = v.load_i64(op + R.LORA_ADAPTERS) + R.LORA_ADAPTER_BYTES * v.load_i64(entry)
                number = inner - v.load_i64(adapter + R.LORA_OFFSET)
                if 0 <= number < v.load_i64(adapter + R.LORA_RANK):
                    y = v.load_i64(op + R.LORA_INNER) + row * v.load_i64(op + R.LORA_INNER_STRIDE) + 4 * inner
                    v.store_f32(y, dot(v.load_i64(adapter + R.LORA_A) + 4 * number * width, x, width))

    return kernel


def lora_up(_: str) -> Kernel:
    """y += scale * factor * B inner."""
    lanes = v.target().lanes

    @v.helper
    def add(inner, b, rank, scale, y, width, first, last):  # type: ignore[no-untyped-def]
        """Columns `first` to `last`."""
        whole = first + (last - first) // (4 * lanes) * (4 * lanes)
        for c in range(first, whole, 4 * lanes):
            one, two, three, four = v.splat(0.0), v.splat(0.0), v.splat(0.0), v.splat(0.0)
            for r in range(rank):
                factor = v.splat(v.load_f32(inner + 4 * r))
                row = b + 4 * (r * width + c)
                one = v.fma(factor, v.load(row), one)
                two = v.fma(factor, v.load(row + 4 * lanes), two)
                three = v.fma(factor, v.load(row + 8 * lanes), three)
                four = v.fma(factor, v.load(row + 12 * lanes), four)
            out = y + 4 * c
            v.store(out, v.fma(one, v.splat(scale), v.load(out)))
            v.store(out + 4 * lanes, v.fma(two, v.splat(scale), v.load(out + 4 * lanes)))
            v.store(out + 8 * lanes, v.fma(three, v.splat(scale), v.load(out + 8 * lanes)))
            v.store(out + 12 * lanes, v.fma(four, v.splat(scale), v.load(out + 12 * lanes)))
        for c in range(whole, last):
            total = v.float32(0.0)
            for r in range(rank):
                total += v.load_f32(inner + 4 * r) * v.load_f32(b + 4 * (r * width + c))
            v.store_f32(y + 4 * c, v.load_f32(y + 4 * c) + scale * total)

    def kernel(op, step, part):  # type: ignore[no-untyped-def]
        parts = v.load_i64(step + R.STEP_PARTS)
        width = v.load_i64(op + R.LORA_OUT_WIDTH)
        chunks = (width + _CHUNK - 1) // _CHUNK
        units = v.load_i64(step + R.N_ROWS) * chunks
        for unit in range(units * part // parts, units * (part + 1) // parts):
            row = unit // chunks
            first = unit % chunks * _CHUNK
            place = _entries(op, step, row)
            y = v.load_i64(op + R.LORA_OUT) + row * v.load_i64(op + R.LORA_OUT_STRIDE)
            for i in range(v.load_i64(place), v.load_i64(place + 8)):
                entry = v.load_i64(op + R.LORA_ENTRIES) + 16 * i
                adapter = v.load_i64(op + R.LORA_ADAPTERS) + R.LORA_ADAPTER_BYTES * v.load_i64(entry)
                rank = v.load_i64(adapter + R.LORA_RANK)
                if rank > 0:
                    inner = v.load_i64(op + R.LORA_INNER) + row * v.load_i64(op + R.LORA_INNER_STRIDE)
                    scale = v.load_f32(entry + 8) * v.load_f32(adapter + R.LORA_FACTOR)
                    add(inner + 4 * v.load_i64(adapter + R.LORA_OFFSET), v.load_i64(adapter + R.LORA_B), rank, scale,
                        y, width, first, min(first + _CHUNK, width))  # fmt: skip

    return kernel
