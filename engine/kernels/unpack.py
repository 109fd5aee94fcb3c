"""How each tensor type's blocks become rows of vectors: lane r of a vector belongs to row r of a group of rows.

Quantised types come apart into groups of 32 weights a row: eight int32 vectors whose bytes are four consecutive weights
of each row (ready for four-way int8 products), a scale for each row (two, where 16 weights share one), and perhaps a
minimum. A weight is `scale * (q - zero) - minimum`. Float types come apart into one vector a weight.

The generators run while a kernel is compiled. Layouts are drawn in `formats/blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from llvmlite import ir

from qrun.engine.kernels.grids import Lookup
from qrun.engine.simd.vector import F16, F32, I8, I16, I32, I64, Emitter, Vector

IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Twice the values of a 4-bit float (1 sign, 2 exponent, 1 mantissa bit), so that they are integers.
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
# Bytes of weights with a sign can be 0..127, less `zero`, where they are not large. That takes fewer instructions than
# bytes with a sign do without VNNI.
MXFP4_ZERO = 16
# Of the magnitudes of IQ2 (8, 25, 43), IQ3_XXS (4, 12 to 52, 62) and IQ3_S (1, 3 to 15).
GRID_ZERO, IQ3_S_ZERO = 64, 16

# Words of a cache line, and lanes of the widest vectors.
LINE_WORDS = 16


class Rows:
    """As many rows as a vector has lanes, `stride` bytes apart: reads the same place of each into one vector."""

    def __init__(self, e: Emitter, address: ir.Value, stride: ir.Value) -> None:
        self.e, self.stride = e, stride
        multiples = [ir.Constant(I64, 0), stride, e.builder.shl(stride, ir.Constant(I64, 1))]
        multiples.append(e.builder.add(stride, multiples[2]))
        four = e.builder.shl(stride, ir.Constant(I64, 2))
        self.addresses = []
        for _ in range(e.lanes // 4):
            self.addresses += [e.builder.add(address, multiple) for multiple in multiples]
            address = e.builder.add(address, four)

    def words(self, offset: int, count: int) -> list[Vector]:
        """`count` int32 vectors (a multiple of 4) from byte `offset` on: 16 bytes of four rows, transposed."""
        vectors = []
        for start in range(0, count, 4):
            quarters = []
            for i in range(4):
                parts = [self.e.load(a, offset + 4 * start, I32, 4) for a in self.addresses[i::4]]
                quarters.append(_concatenate(parts))
            vectors += _transpose(quarters)
        return vectors

    def line(self) -> list[Vector]:
        """The words of a cache line of each row: with as many rows, and each row's loaded at once.

        Rows a power of two apart compete for few places in the first-level cache: by the time `words` came to the
        second part of a row's line, it would not be there any more.
        """
        rows = [self.e.load(address, 0, I32, LINE_WORDS) for address in self.addresses]
        fours = [_transpose(rows[i : i + 4]) for i in range(0, LINE_WORDS, 4)]  # each within 128 bits
        vectors: list[list[Vector]] = []
        for four in zip(*fours, strict=True):
            halves = [[_parts_of(a, b, first, first + 1) for a, b in (four[:2], four[2:])] for first in (0, 2)]
            vectors.append([_parts_of(a, b, i, i + 2) for a, b in halves for i in range(2)])
        return [vectors[i % 4][i // 4] for i in range(LINE_WORDS)]

    def word(self, offset: int, element: ir.Type = I32) -> Vector:
        """One element of each row."""
        vector: ir.Value = ir.Constant(ir.VectorType(element, self.e.lanes), ir.Undefined)
        for lane, address in enumerate(self.addresses):
            scalar = self.e.load_scalar(address, offset, element)
            vector = self.e.builder.insert_element(vector, scalar, ir.Constant(I32, lane))
        return self.e.vector(vector)

    def half(self, offset: int) -> Vector:
        """A float16 of each row, as float32."""
        return self.word(offset, I16).bits_as(F16).to_float()


def _concatenate(parts: list[Vector]) -> Vector:
    while len(parts) > 1:
        parts = [a.shuffle(b, range(2 * a.lanes)) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _parts_of(a: Vector, b: Vector, first: int, second: int) -> Vector:
    """Two of the four 128-bit parts of a, and the same two of b."""
    lanes = [4 * part + i for part in (first, second) for i in range(4)]
    return a.shuffle(b, [*lanes, *(16 + lane for lane in lanes)])


def _transpose(rows: list[Vector]) -> list[Vector]:
    """Four vectors, 4x4 transposed within each 128 bits."""

    def interleave(a: Vector, b: Vector, pattern: tuple[int, ...]) -> Vector:
        # `pattern` is of one 128-bit group: 0-3 are a's lanes, 4-7 b's.
        lanes = [base + (i if i < 4 else a.lanes + i - 4) for base in range(0, a.lanes, 4) for i in pattern]
        return a.shuffle(b, lanes)

    low, high, pairs_low, pairs_high = (0, 4, 1, 5), (2, 6, 3, 7), (0, 1, 4, 5), (2, 3, 6, 7)
    a, b = interleave(rows[0], rows[1], low), interleave(rows[2], rows[3], low)
    c, d = interleave(rows[0], rows[1], high), interleave(rows[2], rows[3], high)
    return [
        interleave(a, b, pairs_low), interleave(a, b, pairs_high),
        interleave(c, d, pairs_low), interleave(c, d, pairs_high),
    ]  # fmt: skip


@dataclass
class Group:
    """32 weights of each row. One scale (and minimum) for all, or two: for the first and the second 16.

    magnitudes, signs: the same weights less `zero`, as sizes and bytes of 1 or -1, where the CPU has instructions by
    which that is less work for a single column.
    """

    weights: Sequence[Vector]
    scales: Sequence[Vector]
    minimums: Sequence[Vector]
    magnitudes: Sequence[Vector] = ()
    signs: Sequence[Vector] = ()


@dataclass(frozen=True)
class Quantised:
    """A quantised type. `limit`: weights are 0..limit, less `zero` (0 or a power of two); None: they are signed."""

    block_size: int
    block_bytes: int
    n_scales: int
    has_minimum: bool
    limit: int | None
    zero: int
    groups: Callable[[Rows], Iterator[Group]]


@dataclass(frozen=True)
class Float:
    """A float type. `several(rows, words)` gives vectors for the weights of that many words (four, or a cache line),
    `one` for a single weight."""

    weight_bytes: int
    several: Callable[[Rows, int], list[Vector]]
    one: Callable[[Rows, int], Vector]


def _low(words: list[Vector]) -> list[Vector]:
    return [word & 0x0F0F0F0F for word in words]


def _high(words: list[Vector]) -> list[Vector]:
    return [(word >> 4) & 0x0F0F0F0F for word in words]


def _half_of(word: Vector, high: bool) -> Vector:
    """float32 from the low or high float16 of each int32."""
    return (word >> 16 if high else word).narrow(I16).bits_as(F16).to_float()


def _add_fifth(words: list[Vector], bits: Vector) -> list[Vector]:
    """Bit 4 i + b of `bits`, in each lane, becomes bit 4 of byte b of words[i]."""
    return [_add_where(_one_bit_each(bits, range(4 * i, 4 * i + 4)), 16, word) for i, word in enumerate(words)]


def _one_bit_each(bits: Vector, places: Sequence[int]) -> Vector:
    """In byte b of each lane, no bit but that at places[b] of the lane. Its place in the byte stays."""
    flat = bits.bits_as(I8)
    # The byte that holds the bit, in each byte of the lane; then one bit of it.
    if any(place // 8 != b for b, place in enumerate(places)):
        flat = flat.permute([4 * lane + place // 8 for lane in range(bits.lanes) for place in places])
    return flat.bits_as(I32) & sum(1 << (place % 8 + 8 * b) for b, place in enumerate(places))


def _add_where(bits: Vector, value: int, word: Vector) -> Vector:
    """`value` added to the bytes of `word` in whose place `bits` is not zero."""
    low = word.bits_as(I8)
    return bits.bits_as(I8).is_zero().choose(low, low + value).bits_as(I32)


def _q4_0(rows: Rows) -> Iterator[Group]:
    words = rows.words(2, 4)
    yield Group(_low(words) + _high(words), [rows.half(0)], [])


def _q4_1(rows: Rows) -> Iterator[Group]:
    both = rows.word(0)
    words = rows.words(4, 4)
    yield Group(_low(words) + _high(words), [_half_of(both, False)], [-_half_of(both, True)])


def _q5_0(rows: Rows) -> Iterator[Group]:
    first, second, *_ = rows.words(0, 4)
    words = rows.words(6, 4)
    fifths = (first >> 16) | (second << 16)
    yield Group(_add_fifth(_low(words) + _high(words), fifths), [_half_of(first, False)], [])


def _q5_1(rows: Rows) -> Iterator[Group]:
    both, fifths, *_ = rows.words(0, 4)
    words = rows.words(8, 4)
    quants = _add_fifth(_low(words) + _high(words), fifths)
    yield Group(quants, [_half_of(both, False)], [-_half_of(both, True)])


def _signed(rows: Rows, words: list[Vector]) -> list[Vector]:
    return [rows.e.bias_signed(word) for word in words]


def _q8_0(rows: Rows) -> Iterator[Group]:
    yield Group(_signed(rows, rows.words(2, 8)), [rows.half(0)], [])


def _q8_k(rows: Rows) -> Iterator[Group]:
    scale = rows.word(0).bits_as(F32)
    for g in range(8):
        yield Group(_signed(rows, rows.words(4 + 32 * g, 8)), [scale], [])


def _looked_up(rows: Rows, words: list[Vector], table: tuple[int, ...], zero: int | None = None) -> list[Vector]:
    """The signed values of nibbles, plus `zero` (without one: plus the bias of signed bytes)."""
    bias = rows.e.signed_bias if zero is None else zero
    shifted = [value + bias for value in table]
    return [rows.e.lookup16(shifted, word) for word in _low(words) + _high(words)]


def _iq4_nl(rows: Rows) -> Iterator[Group]:
    yield Group(_looked_up(rows, rows.words(2, 4), IQ4_NL_VALUES), [rows.half(0)], [])


def _iq4_xs(rows: Rows) -> Iterator[Group]:
    first = rows.word(0)
    d, high, low = _half_of(first, False), first >> 16, rows.word(4)
    for g in range(8):
        scale = ((low >> (4 * g)) & 15) | (((high >> (2 * g)) & 3) << 4)
        yield Group(_looked_up(rows, rows.words(8 + 16 * g, 4), IQ4_NL_VALUES), [d * (scale - 32).to_float()], [])


def _mxfp4(rows: Rows) -> Iterator[Group]:
    exponent = rows.word(0, I8).widen_unsigned()
    # 2^(exponent - 128): half of what E8M0 says, since the values are doubled. Below 2 it is a denormal float32.
    normal = ((exponent - 1) << 23).bits_as(F32)
    denormal = (exponent.constant(0x00200000) << exponent.minimum(1)).bits_as(F32)
    scale = exponent.less(2).choose(denormal, normal)
    yield Group(_looked_up(rows, rows.words(1, 4), MXFP4_VALUES, MXFP4_ZERO), [scale], [])


def _byte(words: list[Vector], index: int) -> Vector:
    return (words[index // 4] >> (8 * (index % 4))) & 0xFF


def _signed_byte(words: list[Vector], index: int) -> Vector:
    return (words[index // 4] << (24 - 8 * (index % 4))).shift_right_signed(24)


def _q2_k(rows: Rows) -> Iterator[Group]:
    scales, last = rows.words(0, 4), rows.word(80)
    d, dmin = _half_of(last, False), _half_of(last, True)
    for half in range(2):
        words = rows.words(16 + 32 * half, 8)
        for j in range(4):
            pair = [_byte(scales, 8 * half + 2 * j + i) for i in range(2)]
            yield Group(
                [(word >> (2 * j)) & 0x03030303 for word in words],
                [d * (s & 15).to_float() for s in pair],
                [dmin * (s >> 4).to_float() for s in pair],
            )


def _q3_k(rows: Rows) -> Iterator[Group]:
    high, packed, d = rows.words(0, 8), rows.words(92, 4)[1:], rows.half(108)
    for half in range(2):
        words = rows.words(32 + 32 * half, 8)
        for j in range(4):
            g = 4 * half + j
            scales = []
            for i in (2 * g, 2 * g + 1):
                low = (_byte(packed, i % 8) >> (4 * (i // 8))) & 15
                top = (_byte(packed, 8 + i % 4) >> (2 * (i // 4))) & 3
                scales.append(d * ((low | (top << 4)) - 32).to_float())
            lowest = [(word >> (2 * j)) & 0x03030303 for word in words]
            weights = [_add_where(bit & (0x01010101 << g), 4, w) for w, bit in zip(lowest, high, strict=True)]
            yield Group(weights, scales, [])


def _scale_and_minimum(header: list[Vector], g: int) -> tuple[Vector, Vector]:
    """The 6-bit scale and minimum of group g, from the twelve bytes of header[1:4]."""
    packed = header[1:4]
    if g < 4:
        return _byte(packed, g) & 63, _byte(packed, g + 4) & 63
    scale = (_byte(packed, g + 4) & 15) | ((_byte(packed, g - 4) >> 6) << 4)
    return scale, (_byte(packed, g + 4) >> 4) | ((_byte(packed, g) >> 6) << 4)


def _k_with_minimum(rows: Rows, quants: int, fifth: int | None) -> Iterator[Group]:
    """Q4_K and Q5_K: 32 bytes hold the low four bits of two groups; `fifth` is where bytes of fifth bits begin."""
    header = rows.words(0, 4)
    d, dmin = _half_of(header[0], False), _half_of(header[0], True)
    fifths = rows.words(fifth, 8) if fifth is not None else None
    in_place = fifths is None and rows.e.unsigned_limit >= 0xF0
    for pair in range(4):
        words = rows.words(quants + 32 * pair, 8)
        # High nibbles can stay where they are, as 16 times the weight, where products allow it: exact, and no shift.
        high, d_high = ([word & -0x0F0F0F10 for word in words], d * 0.0625) if in_place else (_high(words), d)
        for g, weights, unit in ((2 * pair, _low(words), d), (2 * pair + 1, high, d_high)):
            if fifths is not None:
                weights = [_add_where(f & (0x01010101 << g), 16, w) for w, f in zip(weights, fifths, strict=True)]
            scale, minimum = _scale_and_minimum(header, g)
            yield Group(weights, [unit * scale.to_float()], [dmin * minimum.to_float()])


def _q6_k(rows: Rows) -> Iterator[Group]:
    scales, d = rows.words(192, 4), rows.half(208)
    for half in range(2):
        low, high = rows.words(64 * half, 16), rows.words(128 + 32 * half, 8)
        for j in range(4):
            part = low[8 * (j % 2) : 8 * (j % 2) + 8]
            nibbles = _low(part) if j < 2 else _high(part)
            weights = [n | (((h >> (2 * j)) & 0x03030303) << 4) for n, h in zip(nibbles, high, strict=True)]
            pair = [_signed_byte(scales, 8 * half + 2 * j + i) for i in range(2)]
            yield Group(weights, [d * s.to_float() for s in pair], [])


def _nvfp4(rows: Rows) -> Iterator[Group]:
    packed = rows.word(0)
    for first in range(0, 4, 2):
        words = rows.words(4 + 8 * first, 4)
        weights = [_looked_up(rows, half, MXFP4_VALUES, MXFP4_ZERO) for half in (words[:2], words[2:])]
        scales = [_half_of_e4m3(_byte([packed], first + i)) for i in range(2)]
        yield Group(weights[0] + weights[1], scales, [])


def _half_of_e4m3(scale: Vector) -> Vector:
    """Half of an unsigned E4M3 number, in int32; its eighth bit is not read. See formats.blocks.nvfp4."""
    code = scale & 0x7F
    # Exponents of float32 are 120 more, and one less for the half.
    normal = ((code + (119 << 3)) << 20).bits_as(F32)
    value = code.less(8).choose(code.to_float() * 2.0**-10, normal)
    return (scale ^ 0x7F).is_zero().choose(value.constant(0.0), value)


def _q1_0(rows: Rows) -> Iterator[Group]:
    d = rows.half(0)
    for bits in rows.words(2, 4):
        zero = bits.constant(0)
        yield Group([_add_where(_one_bit_each(bits, range(4 * i, 4 * i + 4)), 2, zero) for i in range(8)], [d], [])


def _q2_0(rows: Rows) -> Iterator[Group]:
    d, words = rows.half(0), rows.words(2, 4)
    for g in range(2):
        yield Group([_four_of_two_bits(_byte(words, 8 * g + i)) for i in range(8)], [d], [])


def _four_of_two_bits(byte: Vector) -> Vector:
    """Two bits of a byte into each byte of its lane, the lowest first."""
    halves = (byte | (byte << 12)) & 0x000F000F
    return (halves | (halves << 6)) & 0x03030303


def _tq2_0(rows: Rows) -> Iterator[Group]:
    d = rows.half(64)
    for half in range(2):
        words = rows.words(32 * half, 8)
        for j in range(4):
            yield Group([(word >> (2 * j)) & 0x03030303 for word in words], [d], [])


def _tq1_0(rows: Rows) -> Iterator[Group]:
    d = rows.half(52)
    digits = [_ternary_digits(word, 5) for word in rows.words(0, 8)]
    for n in range(5):
        yield Group([of_word[n] for of_word in digits], [d], [])
    digits = [_ternary_digits(word, 5) for word in rows.words(32, 4)]
    for n in (0, 2):
        yield Group([of_word[n + i] for i in range(2) for of_word in digits], [d], [])
    yield Group([of_word[4] for of_word in digits] + _ternary_digits(rows.word(48), 4), [d], [])


def _ternary_digits(word: Vector, count: int) -> list[Vector]:
    """The first digits of four fractions x / 256, in their bytes. Three times a fraction is a digit and the rest."""
    even, odd = word & 0x00FF00FF, (word >> 8) & 0x00FF00FF
    digits = []
    for _ in range(count):
        even, odd = even + (even << 1), odd + (odd << 1)
        digits.append(((even >> 8) & 0x00030003) | (odd & 0x03000300))
        even, odd = even & 0x00FF00FF, odd & 0x00FF00FF
    return digits


# Bits of a lane: eight for each group of eight weights, the first group's lowest.
_SIGNS = tuple(range(32))


def _grid(rows: Rows, name: str, zero: int) -> Lookup:
    """Magnitudes, with `zero` added where `_signed_group` wants them so."""
    return Lookup(rows.e, name, zero=0 if rows.e.multiplies_signs else zero)


def _signed_group(
    rows: Rows, bits: Vector, words: list[Vector], zero: int, scales: list[Vector], places: Sequence[int] = _SIGNS
) -> Group:
    """Weights zero + x of magnitudes x in the bytes of `words`, or zero - x where the weight's bit of `bits` is set."""
    masks = [_one_bit_each(bits, places[4 * i : 4 * i + 4]).bits_as(I8) for i in range(len(words))]
    flat = [word.bits_as(I8) for word in words]
    if not rows.e.multiplies_signs:
        both = zip(masks, flat, strict=True)
        return Group([m.is_zero().choose(x, x.constant(2 * zero) - x).bits_as(I32) for m, x in both], scales, [])
    # -1 and 0: x ^ -1 - -1 is -x. (To choose between two vectors takes three instructions in the place of one.)
    negative = [
        (_pattern(bits, places[4 * i : 4 * i + 4]) ^ mask.bits_as(I32)).bits_as(I8).is_zero().widen_signed(I8)
        for i, mask in enumerate(masks)
    ]
    weights = [(((x ^ n) - n) + zero).bits_as(I32) for x, n in zip(flat, negative, strict=True)]
    return Group(weights, scales, [], words, [(n | 1).bits_as(I32) for n in negative])


def _pattern(bits: Vector, places: Sequence[int]) -> Vector:
    """What `_one_bit_each` gives where all bits are set."""
    return bits.constant(sum(1 << (place % 8 + 8 * b) for b, place in enumerate(places)))


# Of a number of four bits: its highest bit in a byte where an odd number of them is set.
_ODD = tuple(128 * (bin(nibble).count("1") % 2) for nibble in range(16))


def _even(rows: Rows, sevens: Vector) -> Vector:
    """Seven bits in each byte, and an eighth that makes the number of set bits even."""
    y = sevens ^ (sevens >> 4)
    if rows.e.multiplies_signs:
        return sevens | rows.e.lookup16(_ODD, y & 0x0F0F0F0F)
    y = y ^ (y >> 2)
    return sevens | (((y ^ (y >> 1)) & 0x01010101) << 7)


def _four_sevens(word: Vector) -> Vector:
    """The lowest four times seven bits of a lane into its bytes."""
    fields = (word & 0x7F) | ((word << 1) & 0x7F00)
    return fields | ((word << 2) & 0x7F0000) | ((word << 3) & 0x7F000000)


def _clear(bits: Vector, places: Sequence[int]) -> Vector:
    """Single bits for the bytes of lanes: whether the bit at places[b] of the lane is clear."""
    return _one_bit_each(bits, places).bits_as(I8).is_zero()


# Each of the following has two ways to its magnitudes: see `grids`. Where a block is looked up as a whole, what is read
# for that serves its groups, too.

_HALVES = 0x00FF00FF


def _iq2_xxs(rows: Rows) -> Iterator[Group]:
    lookup, d = _grid(rows, "IQ2_XXS", GRID_ZERO), rows.half(0) * 0.125
    words = cache(lambda pair: rows.words(2 + 16 * pair, 4))
    stored = None if lookup.permutes else lookup.load([[words(i // 2)[2 * (i % 2)]] for i in range(8)])
    for i in range(8):
        low, last = words(i // 2)[2 * (i % 2) :][:2]
        magnitudes = stored.words(i) if stored else lookup.permute(low, [])
        scale = d * ((last >> 28) * 2 + 1).to_float()
        yield _signed_group(rows, _even(rows, _four_sevens(last)), magnitudes, GRID_ZERO, [scale])


def _pair_of_scales(d: Vector, words: list[Vector], i: int) -> list[Vector]:
    """IQ2_XS, IQ2_S: d * (2 s + 1) of the two 4-bit scales s in byte i."""
    byte = _byte(words, i)
    return [d * ((s << 1) + 1).to_float() for s in (byte & 15, byte >> 4)]


def _iq2_xs(rows: Rows) -> Iterator[Group]:
    lookup, d, scales = _grid(rows, "IQ2_XS", GRID_ZERO), rows.half(0) * 0.125, rows.words(58, 4)[2:]
    pairs = cache(lambda pair: rows.words(2 + 16 * pair, 4))

    def words(i: int) -> tuple[Vector, Vector]:
        """Groups 0 and 1, groups 2 and 3: nine bits of an index and seven signs each."""
        first, second = pairs(i // 2)[2 * (i % 2) :][:2]
        return first, second

    stored = None
    if not lookup.permutes:
        stored = lookup.load([[word & 0x01FF01FF for word in words(i)] for i in range(8)], (0, 1, 2, 3))
    order = (0, 2, 1, 3)
    for i in range(8):
        first, second = words(i)
        # Of groups 0, 2, 1 and 3, the ninth bit of the index and seven signs.
        high = ((first >> 8) & _HALVES) | (second & -0x00FF0100)
        if stored:
            magnitudes = stored.words(i)
        else:
            low = (first & _HALVES) | ((second & _HALVES) << 8)
            magnitudes = lookup.permute(low, [_clear(high, (0, 8, 16, 24))], order)
        places = [8 * order[g] + j for g in range(4) for j in range(8)]
        signs = _even(rows, (high >> 1) & 0x7F7F7F7F)
        yield _signed_group(rows, signs, magnitudes, GRID_ZERO, _pair_of_scales(d, scales, i), places)


def _indices(low: Vector, high: Vector, shifts: Sequence[int], mask: int) -> list[Vector]:
    """Those of four groups, as `Lookup.load` takes them: eight bits each in the bytes of `low`, and in `high` more of
    them, those of group g from bit shifts[g] on, as many as `mask` has."""

    def moved(g: int, place: int) -> Vector:
        bits = high << (place - shifts[g]) if place >= shifts[g] else high >> (shifts[g] - place)
        return bits & (mask << place)

    return [(low >> (8 * g)) & _HALVES | moved(g, 8) | moved(g + 2, 24) for g in range(2)]


def _iq2_s(rows: Rows) -> Iterator[Group]:
    lookup, d, rest = _grid(rows, "IQ2_S", GRID_ZERO), rows.half(0) * 0.125, rows.words(66, 4)
    lows = cache(lambda half: rows.words(2 + 16 * half, 4))
    signs = cache(lambda half: rows.words(34 + 16 * half, 4))

    def indices(i: int) -> list[Vector]:
        first = 8 * (i % 4)
        return _indices(lows(i // 4)[i % 4], rest[i // 4], (first, first + 2, first + 4, first + 6), 3)

    stored = None if lookup.permutes else lookup.load([indices(i) for i in range(8)])
    for i in range(8):
        half = i // 4
        if stored:
            magnitudes = stored.words(i)
        else:
            first = 8 * (i % 4)
            high = [_clear(rest[half], [first + 2 * g + bit for g in range(4)]) for bit in range(2)]
            magnitudes = lookup.permute(lows(half)[i % 4], high)
        yield _signed_group(rows, signs(half)[i % 4], magnitudes, GRID_ZERO, _pair_of_scales(d, rest[2:], i))


def _eight_lows(rows: Rows) -> Callable[[int], list[Vector]]:
    """IQ3: the two words of low bits of a sub-block's eight indices."""
    pairs = cache(lambda pair: rows.words(2 + 16 * pair, 4))
    return lambda i: pairs(i // 2)[2 * (i % 2) :][:2]


def _iq3_xxs(rows: Rows) -> Iterator[Group]:
    lookup, d, lows = _grid(rows, "IQ3_XXS", GRID_ZERO), rows.half(0) * 0.25, _eight_lows(rows)
    lasts = cache(lambda half: rows.words(66 + 16 * half, 4))
    stored = None if lookup.permutes else lookup.load([lows(i) for i in range(8)])
    for i in range(8):
        last = lasts(i // 4)[i % 4]
        magnitudes = stored.words(i) if stored else [w for low in lows(i) for w in lookup.permute(low, [])]
        scale = d * ((last >> 28) * 2 + 1).to_float()
        yield _signed_group(rows, _even(rows, _four_sevens(last)), magnitudes, GRID_ZERO, [scale])


def _iq3_s(rows: Rows) -> Iterator[Group]:
    lookup, d, lows = _grid(rows, "IQ3_S", IQ3_S_ZERO), rows.half(0), _eight_lows(rows)
    ninths, scales = rows.words(66, 4), rows.word(106)
    signs = cache(lambda half: rows.words(74 + 16 * half, 4))

    def indices(i: int) -> list[Vector]:
        starts = (8 * (i % 4), 8 * (i % 4) + 4)
        both = zip(lows(i), starts, strict=True)
        return [
            vector for low, first in both
            for vector in _indices(low, ninths[i // 4], (first, first + 1, first + 2, first + 3), 1)
        ]  # fmt: skip

    stored = None if lookup.permutes else lookup.load([indices(i) for i in range(8)])
    for i in range(8):
        if stored:
            magnitudes = stored.words(i)
        else:
            magnitudes, first = [], 8 * (i % 4)
            for place, low in zip((first, first + 4), lows(i), strict=True):
                magnitudes += lookup.permute(low, [_clear(ninths[i // 4], range(place, place + 4))])
        scale = d * ((((scales >> (4 * i)) & 15) << 1) + 1).to_float()
        yield _signed_group(rows, signs(i // 4)[i % 4], magnitudes, IQ3_S_ZERO, [scale])


# Eight times a level of IQ1, and `zero`, which leaves room for the shift.
IQ1_ZERO = 16


def _shifted(levels: list[Vector], shifts: Vector) -> list[Vector]:
    """IQ1: eight times a level, 1 less in lanes whose shift is not zero, 1 more in others: eight times the weight."""
    one = shifts.is_zero().choose(shifts.constant(0x01010101), shifts.constant(-0x01010101))
    return [level + one for level in levels]


def _iq1_levels(rows: Rows, highs: list[Vector], lows_at: int, step: int) -> Callable[[int], list[Vector]]:
    """What group i of a block has of the grid: of each index the low byte lies from `lows_at` on, and the three bits
    above it in `highs`, where those of the next index are `step` bits further up."""
    lookup = Lookup(rows.e, "IQ1_S", times=8, zero=IQ1_ZERO)
    lows = cache(lambda half: rows.words(lows_at + 16 * half, 4))

    def places(i: int) -> range:
        return range(16 * (i % 2), 16 * (i % 2) + 4 * step, step)

    if lookup.permutes:
        return lambda i: lookup.permute(
            lows(i // 4)[i % 4], [_clear(highs[i // 2], [place + bit for place in places(i)]) for bit in range(3)]
        )
    return lookup.load([_indices(lows(i // 4)[i % 4], highs[i // 2], places(i), 7) for i in range(8)]).words


def _iq1_s(rows: Rows) -> Iterator[Group]:
    d, highs = rows.half(0) * 0.125, rows.words(34, 4)
    levels = _iq1_levels(rows, highs, 2, step=3)
    for i in range(8):
        high, first = highs[i // 2], 16 * (i % 2)
        scale = d * ((((high >> (first + 12)) & 7) << 1) + 1).to_float()
        yield Group(_shifted(levels(i), (high >> (first + 15)) & 1), [scale], [])


def _iq1_m(rows: Rows) -> Iterator[Group]:
    highs, packed = rows.words(32, 4), rows.words(40, 4)[2:]
    levels = _iq1_levels(rows, highs, 0, step=4)
    # The top four bits of four uint16 are a float16, the first one's the lowest.
    quarters = [((packed[i // 2] >> (12 + 16 * (i % 2))) & 15) << (4 * i) for i in range(4)]
    d = (quarters[0] | quarters[1] | quarters[2] | quarters[3]).narrow(I16).bits_as(F16).to_float() * 0.125
    for i in range(8):
        high, first, words = highs[i // 2], 16 * (i % 2), levels(i)
        weights = []
        for g in range(4):
            weights += _shifted(words[2 * g : 2 * g + 2], (high >> (first + 4 * g + 3)) & 1)
        word = packed[i // 4] >> (16 * (i // 2 % 2) + 6 * (i % 2))
        scales = [d * ((((word >> (3 * k)) & 7) << 1) + 1).to_float() for k in range(2)]
        yield Group(weights, scales, [])


def _words(rows: Rows, count: int) -> list[Vector]:
    return rows.line() if count == LINE_WORDS else rows.words(0, count)


def _f16_several(rows: Rows, words: int) -> list[Vector]:
    return [_half_of(word, high) for word in _words(rows, words) for high in (False, True)]


def _bf16_several(rows: Rows, words: int) -> list[Vector]:
    return [v.bits_as(F32) for word in _words(rows, words) for v in (word << 16, word & -65536)]


TYPES: dict[str, Quantised | Float] = {
    "F32": Float(
        4, lambda rows, n: [w.bits_as(F32) for w in _words(rows, n)], lambda rows, o: rows.word(o).bits_as(F32)
    ),
    "F16": Float(2, _f16_several, lambda rows, o: rows.half(o)),
    "BF16": Float(2, _bf16_several, lambda rows, o: (rows.word(o, I16).widen_unsigned() << 16).bits_as(F32)),
    "Q4_0": Quantised(32, 18, 1, False, 15, 8, _q4_0),
    "Q4_1": Quantised(32, 20, 1, True, 15, 0, _q4_1),
    "Q5_0": Quantised(32, 22, 1, False, 31, 16, _q5_0),
    "Q5_1": Quantised(32, 24, 1, True, 31, 0, _q5_1),
    "Q8_0": Quantised(32, 34, 1, False, None, 0, _q8_0),
    "Q2_K": Quantised(256, 84, 2, True, 3, 0, _q2_k),
    "Q3_K": Quantised(256, 110, 2, False, 7, 4, _q3_k),
    "Q4_K": Quantised(256, 144, 1, True, 15, 0, lambda rows: _k_with_minimum(rows, 16, None)),
    "Q5_K": Quantised(256, 176, 1, True, 31, 0, lambda rows: _k_with_minimum(rows, 48, 16)),
    "Q6_K": Quantised(256, 210, 2, False, 63, 32, _q6_k),
    "Q8_K": Quantised(256, 292, 1, False, None, 0, _q8_k),
    "IQ4_NL": Quantised(32, 18, 1, False, None, 0, _iq4_nl),
    "IQ4_XS": Quantised(256, 136, 1, False, None, 0, _iq4_xs),
    "MXFP4": Quantised(32, 17, 1, False, 28, MXFP4_ZERO, _mxfp4),
    "NVFP4": Quantised(64, 36, 2, False, 28, MXFP4_ZERO, _nvfp4),
    "Q1_0": Quantised(128, 18, 1, False, 2, 1, _q1_0),
    "Q2_0": Quantised(64, 18, 1, False, 3, 1, _q2_0),
    "TQ1_0": Quantised(256, 54, 1, False, 2, 1, _tq1_0),
    "TQ2_0": Quantised(256, 66, 1, False, 3, 1, _tq2_0),
    "IQ1_S": Quantised(256, 50, 1, False, 25, IQ1_ZERO, _iq1_s),
    "IQ1_M": Quantised(256, 56, 2, False, 25, IQ1_ZERO, _iq1_m),
    "IQ2_XXS": Quantised(256, 66, 1, False, 107, GRID_ZERO, _iq2_xxs),
    "IQ2_XS": Quantised(256, 74, 2, False, 107, GRID_ZERO, _iq2_xs),
    "IQ2_S": Quantised(256, 82, 2, False, 107, GRID_ZERO, _iq2_s),
    "IQ3_XXS": Quantised(256, 98, 1, False, 126, GRID_ZERO, _iq3_xxs),
    "IQ3_S": Quantised(256, 110, 1, False, 31, IQ3_S_ZERO, _iq3_s),
}
