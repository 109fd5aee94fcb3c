"""Columns: the activations that a matrix is multiplied by, how they are packed, and their products with weights.

Columns are quantised to int8, 16 values of them with one scale = max |x| / 127, or kept as float32 for float weights.
Where matrices are tiles they are rounded to bfloat16 in the place of int8.
A panel holds as many columns as are computed together.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from qrun.engine.kernels import records as R
from qrun.engine.kernels.unpack import Group, Quantised
from qrun.engine.simd import operations as v
from qrun.engine.simd.operations import operation
from qrun.engine.simd.vector import F32, I8, I16, I32, I64, Emitter, Vector

# How 32 activations of each column lie in a panel of `width` columns: eight int8 of each column, four times; then for
# each column the fields below. 16 activations share a scale: that halves the error that 32 would give (measured as
# KL against float32: 0.0021 with 32 and 0.0011 with 16 on Gemma 3 270M) for one more addition in eleven.
SCALE, NEGATED_SUM, MINIMUM_FACTOR = 0, 2, 4  # float32 for each half, int32 for each half, float32: -sum(scale * q)


@operation(lambda *_: v.types.void)
def quantise_block(e: Emitter, x: ir.Value, block: ir.Value, width: ir.Value | int, column: ir.Value | int) -> None:
    """32 floats at `x` into column `column` of a packed block of `width` columns."""
    b, width, column = e.builder, e.index(width), e.index(column)

    def put(value: ir.Value, size: int, index: int) -> None:
        """The column's value among those of `size` bytes that all columns have there, after `index` such rows."""
        place = b.add(b.mul(width, ir.Constant(I64, index)), column)
        e.store(value, b.add(block, b.mul(place, ir.Constant(I64, size))))

    correction: ir.Value = ir.Constant(F32, 0.0)
    for half in range(2):
        values = e.load(x, 64 * half, F32, 16)
        top = values.intrinsic("llvm.fabs").reduce("maximum")
        scale = b.fmul(top, ir.Constant(F32, 1 / 127))
        # The inverse is finite unless all values are tiny: then they count as zeros.
        usable = b.fcmp_ordered(">", top, ir.Constant(F32, 1e-30))
        inverse = b.select(usable, b.fdiv(ir.Constant(F32, 127.0), top), ir.Constant(F32, 0.0))
        whole = (values * e.splat(inverse, 16)).round().to_int()
        eights = whole.narrow(I8).bits_as(I64)
        for i in range(2):
            put(eights.lane(i), 8, 2 * half + i)
        negated = b.neg(whole.reduce("add"))
        put(scale, 4, 8 + SCALE + half)
        put(negated, 4, 8 + NEGATED_SUM + half)
        correction = b.fadd(correction, b.fmul(scale, b.sitofp(negated, F32)))
    put(correction, 4, 8 + MINIMUM_FACTOR)


@v.helper
def pack_quantised(row, width, packed, place, columns):  # type: ignore[no-untyped-def]
    """A row of `width` floats as column `place % columns` of panel `place // columns`."""
    panel = packed + (place // columns) * (width // 32) * R.PACKED_BYTES * columns
    for block in range(width // 32):
        quantise_block(row + 128 * block, panel + block * R.PACKED_BYTES * columns, columns, place % columns)


@v.helper
def pack_float(row, width, packed, place, columns):  # type: ignore[no-untyped-def]
    panel = packed + (place // columns) * width * 4 * columns + 4 * (place % columns)
    for i in range(width):
        v.store_f32(panel + i * 4 * columns, v.load_f32(row + 4 * i))


# Where matrices of float16 or bfloat16 are tiles, a panel always has so many columns. It lies in tiles of 32
# activations of each column: 16 rows of pairs, of all columns' first eight bits, then of what is left of them.
SPLIT_COLUMNS = 8


def _split_packer(neighbours: bool) -> Any:
    """neighbours: whether these are pairs, and not what is 16 apart."""

    @operation(lambda *_: v.types.void)
    def split(e: Emitter, x: ir.Value, out: ir.Value, rest: ir.Value | int, stride: ir.Value) -> None:
        """32 floats at `x` as the sums of two bfloat16, in rows of pairs `stride` bytes apart, the second ones `rest`
        bytes behind the first ones."""
        first, second = (e.load(x, 64 * half, F32, 16) for half in range(2))
        if neighbours:
            first, second = first.shuffle(second, range(0, 32, 2)), first.shuffle(second, range(1, 32, 2))
        tops = [rounded(x) for x in (first, second)]
        rests = [rounded(x - (top << 16).bits_as(F32)) for x, top in zip((first, second), tops, strict=True)]
        for place, (low, high) in ((out, tops), (e.builder.add(out, e.index(rest)), rests)):
            words = low | (high << 16)
            for row in range(16):
                e.store(words.lane(row), place)
                place = e.builder.add(place, stride)

    @v.helper
    def pack_split(row, width, packed, place, columns):  # type: ignore[no-untyped-def]
        """A row of `width` floats as column `place`: of a panel, or with one column for itself."""
        stride = 8 if columns == 1 else 8 * SPLIT_COLUMNS
        of_panel = 1 if columns == 1 else SPLIT_COLUMNS
        out = packed + place // of_panel * (4 * width * of_panel) + 4 * (place % of_panel)
        for first in range(0, width, 32):
            split(row + 4 * first, out, 4 * of_panel, stride)
            out += 16 * stride

    return pack_split


# The order of four neighbouring activations where matrices are tiles: in pairs, as `tiles.fold` makes pairs of weights.
PAIRED = (0, 2, 1, 3)


@operation(lambda *_: v.types.void)
def round_block(e: Emitter, x: ir.Value, out: ir.Value) -> None:
    """32 floats at `x`, rounded to bfloat16, ties to even."""
    order = [4 * four + i for four in range(4) for i in PAIRED]
    for half in range(2):
        values = e.load(x, 64 * half, F32, 16).permute(order)
        e.store(rounded(values).narrow(I16).value, out, 32 * half)


def rounded(values: Vector) -> Vector:
    """float32 to bfloat16, ties to even: the bits, in int32."""
    bits = values.bits_as(I32)
    result = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
    finite_or_infinite = (bits & 0x7FFFFFFF).less(0x7F800001)
    return finite_or_infinite.choose(result, result.constant(0x7FC0))


@v.helper
def pack_rounded(row, width, packed, place, columns):  # type: ignore[no-untyped-def]
    """As `pack_quantised`, for tiles: 32 activations of a column, then those of the next."""
    panel = packed + (place // columns) * width * 2 * columns + 64 * (place % columns)
    for block in range(width // 32):
        round_block(row + 128 * block, panel + block * 64 * columns)


def packer_of(packing: str) -> Any:
    """How rows are packed for matrices of quantised weights ("q8"), of floats ("f32"), or of those that are multiplied
    by tiles ("f16", "bf16")."""
    if packing in ("f16", "bf16"):
        return _split_packer(neighbours=packing == "bf16")
    if packing == "f32":
        return pack_float
    return pack_rounded if v.target().tiles else pack_quantised


def dot_quantised(
    e: Emitter, spec: Quantised, panel: int, group: Group, total: list[Vector], block: ir.Value
) -> list[Vector]:
    """total + group times the first columns of one packed block, as many as there are totals."""
    zero = e.signed_bias if spec.limit is None else spec.zero
    alone = bool(group.signs) and len(total) == 1
    if alone:  # the column gets the weights' signs, and weights are what is left: their sizes, without a zero
        zero = 0
    result = []
    for column, value in enumerate(total):

        def broadcast(index: int, element: ir.Type) -> Vector:
            return e.broadcast_word(block, index, R.PACKED_BYTES // 4 * panel, element)

        def field(index: int, element: ir.Type, column: int = column) -> Vector:
            return broadcast((8 + index) * panel + column, element)

        products = []
        for half in range(2):
            words = [broadcast(k // 2 * 2 * panel + 2 * column + k % 2, I32) for k in range(4 * half, 4 * half + 4)]
            # The sum begins at -zero * (sum of activations), which takes `zero` off every weight, exactly.
            sums = field(NEGATED_SUM + half, I32) << (zero.bit_length() - 1) if zero else e.constant(0, I32)
            weights = group.weights[4 * half : 4 * half + 4]
            if alone and spec.limit is not None:
                signs = group.signs[4 * half : 4 * half + 4]
                signed = [e.with_signs(word, sign) for word, sign in zip(words, signs, strict=True)]
                magnitudes = group.magnitudes[4 * half : 4 * half + 4]
                sums = e.dot4_unsigned(sums, magnitudes, signed, spec.limit - spec.zero)
            elif spec.limit is None:
                sums = e.dot4_signed(sums, weights, words)
            else:
                sums = e.dot4_unsigned(sums, weights, words, spec.limit)
            products.append(sums.to_float())
        if len(group.scales) == 1:
            scaled = products[1].fma(field(SCALE + 1, F32), products[0] * field(SCALE, F32))
            value = scaled.fma(group.scales[0], value)
        else:
            for half in range(2):
                value = (products[half] * field(SCALE + half, F32)).fma(group.scales[half], value)
        if len(group.minimums) == 1:
            value = group.minimums[0].fma(field(MINIMUM_FACTOR, F32), value)
        for half, minimum in enumerate(group.minimums if len(group.minimums) == 2 else []):
            factor = field(NEGATED_SUM + half, I32).to_float() * field(SCALE + half, F32)
            value = minimum.fma(factor, value)
        result.append(value)
    return result
