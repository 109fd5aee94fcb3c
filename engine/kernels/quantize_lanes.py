"""Between blocks that lie one after another and vectors whose lanes are blocks: weights in, codes of 32 weights out.

Into lanes: as many weights of each block as there are lanes make a square, which log2(lanes) rounds of shuffles
transpose. That is four shuffles for each vector of 16 weights, where one weight at a time would take 32 moves.

Out of them: the codes of a block of 32 make a few words of 32 bits. They are put together lane by lane, with a vector
operation for what would be one for each block, and only then leave the lanes, word by word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from qrun.engine.kernels.quantize_fit import SCALES
from qrun.engine.simd import operations as v
from qrun.engine.simd.operations import operation
from qrun.engine.simd.vector import F16, F32, I16, I32, Emitter, Vector
from qrun.formats.blocks import BLOCK_SIZES, TensorType

# The types of floats that weights can be read from, by their number in a record: bytes of one, and how to widen them.
SOURCES: dict[int, tuple[int, ir.Type, Callable[[Vector], Vector]]] = {
    TensorType.F32: (4, F32, lambda x: x),
    TensorType.F16: (2, F16, lambda x: x.to_float()),
    TensorType.BF16: (2, I16, lambda x: (x.widen_unsigned() << 16).bits_as(F32)),
}


def transpose(rows: Sequence[Vector]) -> list[Vector]:
    """n vectors of n lanes, n a power of two: lane j of vector i to lane i of vector j.

    Each round swaps the off-diagonal quarters of all squares of one size.
    """
    vectors = list(rows)
    n = len(vectors)
    half = n // 2
    while half:
        keep_low = [lane if lane & half == 0 else n + lane - half for lane in range(n)]
        keep_high = [lane + half if lane & half == 0 else n + lane for lane in range(n)]
        for i in range(n):
            if i & half == 0:
                low, high = vectors[i], vectors[i + half]
                vectors[i], vectors[i + half] = low.shuffle(high, keep_low), low.shuffle(high, keep_high)
        half //= 2
    return vectors


def build_to_lanes(source_type: int, block_size: int) -> Any:
    """to_lanes(source, x): `lanes` weights of each of `lanes` blocks that follow each other, to as many vectors."""
    width, element, widen = SOURCES[source_type]

    @operation(lambda *_: v.types.void)
    def to_lanes(e: Emitter, source: ir.Value, x: ir.Value) -> None:
        rows = [widen(e.load(source, i * block_size * width, element, e.lanes)) for i in range(e.lanes)]
        for j, vector in enumerate(transpose(rows)):
            e.store(vector.value, x, 4 * e.lanes * j)

    return to_lanes


# --- codes to words ---------------------------------------------------------------------------------------------------

Words = Callable[[Sequence[Vector]], list[Vector]]


def bytes_to_words(bytes_: Sequence[Vector]) -> list[Vector]:
    """Four bytes a word, the first one lowest. The last of each four may have bits above its eight."""
    return [
        bytes_[i] | bytes_[i + 1] << 8 | bytes_[i + 2] << 16 | bytes_[i + 3] << 24 for i in range(0, len(bytes_), 4)
    ]


def nibbles(codes: Sequence[Vector]) -> list[Vector]:
    """Codes j and j + 16 in one byte."""
    return bytes_to_words([codes[j] | codes[j + 16] << 4 for j in range(16)])


def five_bits(codes: Sequence[Vector]) -> list[Vector]:
    """The fifth bits in order, then the low four as nibbles."""
    fifths = codes[0] >> 4
    for j in range(1, 32):
        fifths = fifths | (codes[j] >> 4) << j
    return [fifths, *nibbles([code & 15 for code in codes])]


def signed_bytes(codes: Sequence[Vector]) -> list[Vector]:
    """Codes of 0..254 less 127."""
    return bytes_to_words([(code - 127) & 0xFF for code in codes])


def signed_nibbles(codes: Sequence[Vector]) -> list[Vector]:
    """Of levels that rise from 0 to 14 with zero in the middle: a bit for the sign and three for the magnitude."""
    return nibbles([code.less(7).choose(code.constant(15) - code, code - 7) for code in codes])


@v.helper
def put_scale(head, vector, out):  # type: ignore[no-untyped-def]
    v.store_f16(out, v.load_f32(head))


@v.helper
def put_scale_and_minimum(head, vector, out):  # type: ignore[no-untyped-def]
    v.store_f16(out, v.load_f32(head))
    v.store_f16(out + 2, v.float32(0.0) - v.load_f32(head + vector))


@v.helper
def put_exponent(head, vector, out):  # type: ignore[no-untyped-def]
    v.store_u8(out, v.load_i32(head + SCALES * vector))


# What stands before the words of a block (a function of one lane of `head`, and its bytes), and the words.
LAYOUTS: dict[str, tuple[Any, int, Words]] = {
    "Q4_0": (put_scale, 2, nibbles),
    "IQ4_NL": (put_scale, 2, nibbles),
    "Q4_1": (put_scale_and_minimum, 4, nibbles),
    "Q5_0": (put_scale, 2, five_bits),
    "Q5_1": (put_scale_and_minimum, 4, five_bits),
    "Q8_0": (put_scale, 2, signed_bytes),
    "MXFP4": (put_exponent, 1, signed_nibbles),
}


def build_pack_lanes(type_name: str) -> Any:
    """pack(x, head, out, count): the blocks of `count` lanes, of which the codes lie at x, to `out`."""
    put_head, head_bytes, to_words = LAYOUTS[type_name]
    _, block_bytes = BLOCK_SIZES[TensorType[type_name]]
    lanes, vector = v.target().lanes, 4 * v.target().lanes
    n_words = (block_bytes - head_bytes) // 4
    words_bytes = n_words * vector

    @operation(lambda *_: v.types.void)
    def gather(e: Emitter, x: ir.Value, words: ir.Value) -> None:
        codes = [e.load(x, vector * j, I32, lanes) for j in range(32)]
        for i, word in enumerate(to_words(codes)):
            e.store(word.value, words, vector * i)

    @v.helper
    def pack(x, head, out, count):  # type: ignore[no-untyped-def]
        words = v.scratch(words_bytes)
        gather(x, words)
        for lane in range(count):
            place = out + lane * block_bytes
            put_head(head + 4 * lane, vector, place)
            for i in range(n_words):
                v.store_i32(place + head_bytes + 4 * i, v.load_i32(words + i * vector + 4 * lane))

    return pack
