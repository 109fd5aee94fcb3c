"""How each tensor type's blocks become rows of vectors: lane r of a vector belongs to row r of a group of rows.

Quantised types come apart into groups of 32 weights a row: eight int32 vectors whose bytes are four consecutive weights
of each row (ready for four-way int8 products), a scale for each row (two, where 16 weights share one), and perhaps a
minimum. A weight is `scale * (q - zero) - minimum`. Float types come apart into one vector a weight.

The generators run while a kernel is compiled. Layouts are drawn in `formats/blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llvmlite import ir

from qrun.engine.simd.vector import F16, F32, I8, I16, I32, I64, Emitter, Vector

IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Twice the values of a 4-bit float (1 sign, 2 exponent, 1 mantissa bit), so that they are integers.
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


# Words of a cache line, and lanes of the widest vectors.
LINE_WORDS = 16


class Rows:
    """As many rows as a vector has lanes, `stride` bytes apart: reads the same place of each into one vector."""

    def __init__(self, e: Emitter, address: ir.Value, stride: ir.Value) -> None:
        self.e = e
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
    """32 weights of each row. One scale (and minimum) for all, or two: for the first and the second 16."""

    weights: list[Vector]
    scales: list[Vector]
    minimums: list[Vector]


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
    result = []
    for i, word in enumerate(words):
        # The byte that holds the four bits, in all bytes of its lane; then one bit of it in each.
        copies = bits.bits_as(I8).permute([lane // 4 * 4 + i // 2 for lane in range(4 * bits.lanes)])
        result.append(_add_where(copies.bits_as(I32) & (0x80402010 if i % 2 else 0x08040201), 16, word))
    return result


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


def _looked_up(rows: Rows, words: list[Vector], table: tuple[int, ...]) -> list[Vector]:
    bias = rows.e.signed_bias
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
    yield Group(_looked_up(rows, rows.words(1, 4), MXFP4_VALUES), [scale], [])


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
    "MXFP4": Quantised(32, 17, 1, False, None, 0, _mxfp4),
}
