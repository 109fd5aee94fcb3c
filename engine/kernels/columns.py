"""Columns: the activations that a matrix is multiplied by, how they are packed, and their products with weights.

Columns are quantised to int8, 16 values of them with one scale = max |x| / 127, or kept as float32 for float weights.
For tiles of whole numbers the scales of two neighbouring halves are a power of two apart, so that the products of 32
weights can be added exactly, in any order, before anything is rounded. For folded tiles columns are rounded to bfloat16
in the place of int8.
A panel holds as many columns as are computed together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from qrun.engine.kernels import records as R
from qrun.engine.kernels.unpack import Group, Quantised
from qrun.engine.simd import operations as v
from qrun.engine.simd.dot import Dot
from qrun.engine.simd.operations import operation
from qrun.engine.simd.vector import F32, I8, I16, I32, I64, Emitter, Vector

# How 32 activations of each column lie in a panel of `width` columns: eight int8 of each column, four times; then for
# each column the fields below. 16 activations share a scale: that halves the error that 32 would give (measured as
# KL against float32: 0.0021 with 32 and 0.0011 with 16 on Gemma 3 270M) for one more addition in eleven.
SCALE, NEGATED_SUM, MINIMUM_FACTOR = 0, 2, 4  # float32 for each half, int32 for each half, float32: -sum(scale * q)

# For tiles of whole numbers the second scale is the first one times a power of two, and that is the second field.
RATIO = 1
# The two are at most 2^5 apart. With that, 16 products of at most 128 * 127 of each half are still whole numbers below
# 2^24 of the smaller unit, which float32 adds exactly.
MOST_HALVINGS = 5
# A panel of a tile's columns: 32 activations of each in bfloat16, in units of SCALE; then for all of them a field each:
# that scale, MINIMUM_FACTOR, and what of it is the first half's and the second half's.
TILE_SCALE, TILE_MINIMUM_FACTOR, TILE_MINIMUM_FACTORS = 0, 1, 2
TILE_BYTES = R.TILE_PACKED_BYTES * R.TILE_COLUMNS


@v.helper
def first_row(count, part, parts):  # type: ignore[no-untyped-def]
    """Where a part of `count` rows begins. With many rows that is where a panel does, or 32 positions of the KV cache:
    threads that write into the same cache lines wait for each other."""
    together = 32 if count >= 8 * parts else 16 if count >= 4 * parts else 1
    return min((count * part // parts + together - 1) // together * together, count)


def _filled(type_: ir.Type, number: float) -> ir.Constant:
    """A number, or a vector of it."""
    return ir.Constant(type_, [number] * type_.count if isinstance(type_, ir.VectorType) else number)


class _Scales:
    """How 32 floats become int8 numbers with a scale for each half: max |x| / 127. tops: the largest |x| of each half;
    of one column, or vectors of as many columns.

    scales: of the halves. factors: what the halves are multiplied by.
    even: the scales are a power of two apart, `ratio`, and as near to those as that allows.
    """

    def __init__(self, b: ir.IRBuilder, tops: list[ir.Value], even: bool) -> None:
        self._b, self._floats = b, tops[0].type
        vector = isinstance(self._floats, ir.VectorType)
        self._words = ir.VectorType(I32, self._floats.count) if vector else I32
        if even:
            self.factors = self._evenly(tops)
        else:
            self.factors = [self._inverse(top) for top in tops]
            self.scales = [b.fmul(top, _filled(self._floats, 1 / 127)) for top in tops]

    def _inverse(self, top: ir.Value) -> ir.Value:
        """127 / top. It is finite unless all values are tiny: then they count as zeros."""
        b = self._b
        usable = b.fcmp_ordered(">", top, _filled(self._floats, 1e-30))
        return b.select(usable, b.fdiv(_filled(self._floats, 127.0), top), _filled(self._floats, 0.0))

    def _evenly(self, tops: list[ir.Value]) -> list[ir.Value]:
        """What the halves are multiplied by."""
        b = self._b

        def word(number: int) -> ir.Constant:
            return _filled(self._words, number)

        def power(exponent: ir.Value) -> ir.Value:
            return b.bitcast(b.shl(b.add(exponent, word(127)), word(23)), self._floats)

        first_larger = b.fcmp_unordered(">", *tops)
        first, second = tops
        large, small = b.select(first_larger, first, second), b.select(first_larger, second, first)
        # How often the one can be halved and is not below the other: the bits of floats are in order.
        times = b.lshr(b.sub(b.bitcast(large, self._words), b.bitcast(small, self._words)), word(23))
        can_more = b.icmp_unsigned("<", times, word(MOST_HALVINGS))
        times = b.select(can_more, times, word(MOST_HALVINGS))
        # It may pay to have a larger scale for the one, by which the other gets a smaller one: squares of both say so.
        raised = b.fmul(small, power(b.add(times, word(1))))
        share = power(b.mul(times, word(-2)))
        one, quarter = _filled(self._floats, 1.0), _filled(self._floats, 0.25)
        errors = b.fmul(b.fmul(large, large), b.fadd(one, share))
        errors_of_more = b.fmul(b.fmul(raised, raised), b.fadd(one, b.fmul(share, quarter)))
        more = b.and_(can_more, b.fcmp_ordered("<", errors_of_more, errors))
        large, times = b.select(more, raised, large), b.add(times, b.zext(more, self._words))
        none = word(0)
        halvings = [b.select(first_larger, none, times), b.select(first_larger, times, none)]
        scale, inverse = b.fmul(large, _filled(self._floats, 1 / 127)), self._inverse(large)
        self.scales = [b.fmul(scale, power(b.neg(times))) for times in halvings]
        self.ratio = power(b.sub(*halvings))
        return [b.fmul(inverse, power(times)) for times in halvings]

    def negated_sums(self, negated: list[ir.Value]) -> list[ir.Value]:
        """-sum(scale * q) of each half, from the halves' -sum(q)."""
        b = self._b
        return [b.fmul(s, b.sitofp(n, self._floats)) for n, s in zip(negated, self.scales, strict=True)]


class _Quantised:
    """32 floats at an address as int8 numbers with a scale for each half."""

    def __init__(self, e: Emitter, x: ir.Value, even: bool) -> None:
        b = e.builder
        halves = [e.load(x, 64 * half, F32, 16) for half in range(2)]
        scales = _Scales(b, [values.intrinsic("llvm.fabs").reduce("maximum") for values in halves], even)
        self.scales, self.ratio = scales.scales, scales.ratio if even else None
        self.numbers = [
            (values * e.splat(factor, 16)).round().to_int()
            for values, factor in zip(halves, scales.factors, strict=True)
        ]
        self.negated = [b.neg(numbers.reduce("add")) for numbers in self.numbers]
        self.factors = scales.negated_sums(self.negated)
        self.factor = b.fadd(*self.factors)


def _reduced(vector_of: Callable[[int], Vector], columns: range, operation: str) -> Vector:
    """A lane for each column: the lanes of its vector combined, in the order in which `Vector.reduce` does. For several
    columns at once that takes a quarter of the instructions."""

    def folded(vectors: list[Vector], parts: int) -> Vector:
        """Vectors of so many parts each: their parts one behind the other, with halves folded on halves."""
        size = vectors[0].lanes // parts
        halves = [
            [part * size + half * (size // 2) + i for part in range(len(vectors) * parts) for i in range(size // 2)]
            for half in range(2)
        ]
        low, high = (vectors[0].shuffle(vectors[-1], lanes) for lanes in halves)
        return low + high if operation == "add" else low.maximum(high)

    def of(columns: range) -> Vector:
        if len(columns) == 1:
            return vector_of(columns[0])
        middle = len(columns) // 2
        return folded([of(columns[:middle]), of(columns[middle:])], middle)

    result = of(columns)
    while result.lanes > len(columns):
        result = folded([result], len(columns))
    return result


def _quantise_panel(
    e: Emitter, x: ir.Value, stride: ir.Value, columns: int, even: bool,
    put: Callable[[int, int, Vector, Vector | None], None],
) -> tuple[list[Vector], _Scales]:  # fmt: skip
    """What `_Quantised` does with a column, for all columns of a panel, which lie `stride` bytes apart. Returns what is
    -sum(q) of each half, and the scales. put(half, column, numbers, ratios): takes the numbers as they come."""
    places, place = [], x
    for _ in range(columns):
        places.append(place)
        place = e.builder.add(place, stride)
    # Where rows are some power of two apart, the first-level cache has no room for a line of each.
    kept = e.scratch(128 * columns)

    def size_of(column: int, half: int) -> Vector:
        values = e.load(places[column], 64 * half, F32, 16)
        e.store(values.value, kept, 128 * column + 64 * half)
        return values.intrinsic("llvm.fabs")

    tops = [_reduced(functools.partial(size_of, half=half), range(columns), "maximum") for half in range(2)]
    scales = _Scales(e.builder, [top.value for top in tops], even)
    ratios = e.vector(scales.ratio) if even else None
    negated = []
    for half in range(2):
        factors = e.vector(scales.factors[half])

        def numbers_of(column: int, half: int = half, factors: Vector = factors) -> Vector:
            values = e.load(kept, 128 * column + 64 * half, F32, 16)
            numbers = (values * e.splat(factors.lane(column), 16)).round().to_int()
            put(half, column, numbers, ratios)
            return numbers

        negated.append(-_reduced(numbers_of, range(columns), "add"))
    return negated, scales


def _quantiser(even: bool) -> Any:
    @operation(lambda *_: v.types.void)
    def quantise_block(e: Emitter, x: ir.Value, block: ir.Value, width: ir.Value | int, column: ir.Value | int) -> None:
        """32 floats at `x` into column `column` of a packed block of `width` columns."""
        b, width, column = e.builder, e.index(width), e.index(column)

        def put(value: ir.Value, size: int, index: int) -> None:
            """The column's value among those of `size` bytes that all columns have there, after `index` such rows."""
            place = b.add(b.mul(width, ir.Constant(I64, index)), column)
            e.store(value, b.add(block, b.mul(place, ir.Constant(I64, size))))

        quantised = _Quantised(e, x, even)
        for half, numbers in enumerate(quantised.numbers):
            eights = numbers.narrow(I8).bits_as(I64)
            for i in range(2):
                put(eights.lane(i), 8, 2 * half + i)
            put(quantised.negated[half], 4, 8 + NEGATED_SUM + half)
            put(quantised.ratio if even and half else quantised.scales[half], 4, 8 + SCALE + half)
        put(quantised.factor, 4, 8 + MINIMUM_FACTOR)

    @v.helper
    def pack(row, width, packed, place, columns):  # type: ignore[no-untyped-def]
        """A row of `width` floats as column `place % columns` of panel `place // columns`."""
        panel = packed + (place // columns) * (width // 32) * R.PACKED_BYTES * columns
        for block in range(width // 32):
            quantise_block(row + 128 * block, panel + block * R.PACKED_BYTES * columns, columns, place % columns)

    return pack


# With the best scale for each half.
pack_quantised = _quantiser(even=False)


def _panel_quantiser(columns: int) -> Any:
    @operation(lambda *_: v.types.void)
    def quantise_panel(e: Emitter, x: ir.Value, stride: ir.Value, block: ir.Value) -> None:
        """32 floats of each column at `x`, `stride` bytes apart, as a packed block of all columns."""

        def put(half: int, column: int, numbers: Vector, ratios: Vector | None) -> None:
            eights = numbers.narrow(I8).bits_as(I64)
            for i in range(2):
                e.store(eights.lane(i), block, 8 * (columns * (2 * half + i) + column))

        negated, scales = _quantise_panel(e, x, stride, columns, False, put)
        for half in range(2):
            e.store(negated[half].value, block, 4 * columns * (8 + NEGATED_SUM + half))
            e.store(scales.scales[half], block, 4 * columns * (8 + SCALE + half))
        factor = e.builder.fadd(*scales.negated_sums([sums.value for sums in negated]))
        e.store(factor, block, 4 * columns * (8 + MINIMUM_FACTOR))

    return quantise_panel


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


# The order of 16 activations where quantised matrices are tiles: of each four pairs, as weights are unpacked to.
PAIRED = [4 * four + i for four in range(4) for i in (0, 2, 1, 3)]


@operation(lambda *_: v.types.void)
def round_block(e: Emitter, x: ir.Value, out: ir.Value) -> None:
    """32 floats at `x`, rounded to bfloat16, ties to even."""
    for half in range(2):
        values = e.load(x, 64 * half, F32, 16).permute(PAIRED)
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


def _in_tile(e: Emitter, numbers: Vector, ratio: ir.Value | None) -> ir.Value:
    """Numbers of a half as a tile of whole numbers has them, the second half's in units of the first half's scale."""
    values = numbers.to_float()
    if ratio is not None:
        values = values * e.splat(ratio, 16)
    # They have eight bits at most, so that nothing is cut off.
    return (values.permute(PAIRED).bits_as(I32) >> 16).narrow(I16).value


@operation(lambda *_: v.types.void)
def quantise_for_tile(e: Emitter, x: ir.Value, block: ir.Value, column: ir.Value) -> None:
    """32 floats at `x` into a column of a tile of whole numbers."""
    b, quantised = e.builder, _Quantised(e, x, even=True)
    place = b.add(block, b.shl(column, ir.Constant(I64, 6)))
    for half, numbers in enumerate(quantised.numbers):
        e.store(_in_tile(e, numbers, quantised.ratio if half else None), place, 32 * half)
    fields = b.add(block, b.shl(column, ir.Constant(I64, 2)))
    for index, value in enumerate((quantised.scales[0], quantised.factor, *quantised.factors)):
        e.store(value, fields, R.TILE_COLUMNS * (64 + 4 * index))


@operation(lambda *_: v.types.void)
def quantise_tile(e: Emitter, x: ir.Value, stride: ir.Value, block: ir.Value) -> None:
    """32 floats of each column at `x`, `stride` bytes apart, as a tile of whole numbers."""

    def put(half: int, column: int, numbers: Vector, ratios: Vector | None) -> None:
        ratio = ratios.lane(column) if half and ratios is not None else None
        e.store(_in_tile(e, numbers, ratio), block, 64 * column + 32 * half)

    negated, scales = _quantise_panel(e, x, stride, R.TILE_COLUMNS, True, put)
    factors = scales.negated_sums([sums.value for sums in negated])
    for index, value in enumerate((scales.scales[0], e.builder.fadd(*factors), *factors)):
        e.store(value, block, R.TILE_COLUMNS * (64 + 4 * index))


def _whole_packer() -> Any:
    """For tiles of whole numbers in panels of their columns, else for other instructions."""
    pack_few = _quantiser(even=True)

    @v.helper
    def pack_whole(row, width, packed, place, columns):  # type: ignore[no-untyped-def]
        if columns == R.TILE_COLUMNS:
            panel = packed + (place // R.TILE_COLUMNS) * (width // 32) * TILE_BYTES
            for block in range(width // 32):
                quantise_for_tile(row + 128 * block, panel + block * TILE_BYTES, place % R.TILE_COLUMNS)
        else:
            pack_few(row, width, packed, place, columns)

    return pack_whole


def packer_of(packing: str) -> Any:
    """How rows are packed for matrices of quantised weights ("q8"), of floats ("f32"), or of those that are multiplied
    by tiles ("f16", "bf16", and "whole" for quantised weights)."""
    if packing in ("f16", "bf16"):
        return _split_packer(neighbours=packing == "bf16")
    if packing == "f32":
        return pack_float
    if packing == "whole":
        return _whole_packer()
    return pack_rounded if v.target().folded else pack_quantised


def panel_packer_of(packing: str) -> Any:
    """pack(x, stride, width, packed, place, columns): as many rows as a panel has columns, `stride` bytes apart, as
    `packer_of` packs each."""
    packer, quantise = packer_of(packing), None
    if packing == "whole":
        quantise, columns, group_bytes = quantise_tile, R.TILE_COLUMNS, TILE_BYTES
    elif packer is pack_quantised:
        columns = v.target().columns
        quantise, group_bytes = _panel_quantiser(columns), R.PACKED_BYTES * columns

    @v.helper
    def by_rows(x, stride, width, packed, place, columns):  # type: ignore[no-untyped-def]
        for row in range(columns):
            packer(x + row * stride, width, packed, place + row, columns)

    if quantise is None:
        return by_rows

    @v.helper
    def pack_panel(x, stride, width, packed, place, n_columns):  # type: ignore[no-untyped-def]
        if n_columns == columns:
            block = packed + place // columns * (width // 32) * group_bytes
            for i in range(0, 4 * width, 128):
                quantise(x + i, stride, block)
                block += group_bytes
        else:
            by_rows(x, stride, width, packed, place, n_columns)

    return pack_panel


def panel_width(packing: str) -> Any:
    """width_of(n_rows): how many columns the panels have in a step of so many rows."""
    columns, whole = v.target().columns, packing == "whole"

    @v.helper
    def width_of(n_rows):  # type: ignore[no-untyped-def]
        if n_rows == 1:
            return 1
        return R.TILE_COLUMNS if whole and n_rows > R.MOST_WITHOUT_TILES else columns

    return width_of


def dot_quantised(
    e: Emitter, spec: Quantised, panel: int, groups: Sequence[Group], total: list[Vector], block: ir.Value,
    even: bool = False,
) -> list[Vector]:  # fmt: skip
    """total + groups of rows times the first columns of one packed block, as many as there are totals of each group.
    even: whether the scales of halves are a power of two apart.

    With several groups, the sums of all of them and of all columns are in registers, and each activation is loaded once
    for all groups.
    """
    zero = e.signed_bias if spec.limit is None else spec.zero
    n_columns, several = len(total) // len(groups), len(groups) > 1
    alone = bool(groups[0].signs) and len(total) == 1
    if alone:  # the column gets the weights' signs, and weights are what is left: their sizes, without a zero
        zero = 0

    def word(index: int, element: ir.Type) -> Vector:
        return e.broadcast_word(block, index, R.PACKED_BYTES // 4 * panel, element)

    def dots_of(columns: Sequence[int], half: int) -> list[list[Vector]]:
        """For each column, each group's sums of a half, as float32."""
        dots = []
        for column in columns:
            # The sum begins at -zero * (sum of activations), which takes `zero` off every weight, exactly.
            start = word((8 + NEGATED_SUM + half) * panel + column, I32) << (zero.bit_length() - 1) if zero else none
            limit = spec.limit - spec.zero if alone and spec.limit is not None else spec.limit
            dots.append([Dot(e, start, limit) for _ in groups])
        for k in range(4 * half, 4 * half + 4):
            weights = [(group.magnitudes if alone else group.weights)[k] for group in groups]
            for column, of_groups in zip(columns, dots, strict=True):
                activations = word(k // 2 * 2 * panel + 2 * column + k % 2, I32)
                if alone:
                    activations = e.with_signs(activations, groups[0].signs[k])
                for weight, dot in zip(weights, of_groups, strict=True):
                    dot.add(weight, activations)
            if several:  # left to itself, LLVM computes column by column, and loads weights for each of them
                Dot.in_registers([dot for of_groups in dots for dot in of_groups])
        return [[dot.value().to_float() for dot in of_groups] for of_groups in dots]

    none = e.constant(0, I32)
    result = list(total)
    for columns in [range(n_columns)] if several else [[column] for column in range(n_columns)]:
        halves = [dots_of(columns, half) for half in range(2)]
        for i, column in enumerate(columns):

            def field(index: int, element: ir.Type = F32, column: int = column) -> Vector:
                return word((8 + index) * panel + column, element)

            for row, group in enumerate(groups):
                place = row * n_columns + column
                products = [half[i][row] for half in halves]
                result[place] = _add_scaled(result[place], group, products, field, even)
    return result


def _add_scaled(
    value: Vector, group: Group, products: list[Vector], field: Callable[..., Vector], even: bool
) -> Vector:
    """A total, and to it the sums of both halves, with scales and minimums. field(index, element): of the column."""
    if even and len(group.scales) == 1:
        both = products[1].fma(field(RATIO), products[0])  # exact
        value = (both * group.scales[0]).fma(field(SCALE), value)
    elif even:
        both = (products[1] * field(RATIO)).fma(group.scales[1], products[0] * group.scales[0])
        value = both.fma(field(SCALE), value)
    elif len(group.scales) == 1:
        scaled = products[1].fma(field(SCALE + 1), products[0] * field(SCALE))
        value = scaled.fma(group.scales[0], value)
    else:
        for half in range(2):
            value = (products[half] * field(SCALE + half)).fma(group.scales[half], value)
    if len(group.minimums) == 1:
        value = group.minimums[0].fma(field(MINIMUM_FACTOR), value)
    for half in range(2 if len(group.minimums) == 2 else 0):
        own = field(SCALE) * field(RATIO) if even and half else field(SCALE + half)
        value = group.minimums[half].fma(field(NEGATED_SUM + half, I32).to_float() * own, value)
    return value
