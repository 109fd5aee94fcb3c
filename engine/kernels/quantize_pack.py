"""Codes and scales into the bytes of a block, as `formats/blocks` draws them: of the K formats eight codes at a time.

A packer takes the address of a block's codes (a byte each), of its lane in `head` (see `quantize_fit`; its numbers lie
`vector` bytes apart) and of its bytes. Formats put codes together that lie 16, 32 or 64 apart, and codes are so small
that shifting a word of eight moves none into its neighbour.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qrun.engine.kernels.quantize_fit import MINIMUMS, SCALES
from qrun.engine.simd import operations as v
from qrun.formats.blocks import BLOCK_SIZES, TensorType

LOW_BITS = 0x0101010101010101
LOW_TWO = 0x0303030303030303
LOW_FOUR = 0x0F0F0F0F0F0F0F0F


@v.helper
def eight(codes, at):  # type: ignore[no-untyped-def]
    return v.load_i64(codes + at)


@v.helper
def scale_of(head, vector, i):  # type: ignore[no-untyped-def]
    return v.load_i32(head + (SCALES + i) * vector)


@v.helper
def minimum_of(head, vector, i):  # type: ignore[no-untyped-def]
    return v.load_i32(head + (MINIMUMS + i) * vector)


@v.helper
def pack_nibbles(codes, out):  # type: ignore[no-untyped-def]
    """32 codes to 16 bytes: j and j + 16 together."""
    for j in range(0, 16, 8):
        low, high = eight(codes, j) & LOW_FOUR, eight(codes, j + 16) & LOW_FOUR
        v.store_i64(out + j, low | high << 4)


@v.helper
def pack_pairs(codes, out):  # type: ignore[no-untyped-def]
    """The low two bits of 128 codes to 32 bytes: j, j + 32, j + 64, j + 96 together."""
    for j in range(0, 32, 8):
        low = (eight(codes, j) & LOW_TWO) | (eight(codes, j + 32) & LOW_TWO) << 2
        v.store_i64(out + j, low | (eight(codes, j + 64) & LOW_TWO) << 4 | (eight(codes, j + 96) & LOW_TWO) << 6)


@v.helper
def pack_iq4_xs(codes, head, vector, out):  # type: ignore[no-untyped-def]
    v.store_f16(out, v.load_f32(head))
    high = 0
    for i in range(8):
        high |= ((scale_of(head, vector, i) + 32) >> 4) << (2 * i)
    v.store_u8(out + 2, high)
    v.store_u8(out + 3, high >> 8)
    for i in range(4):
        low, upper = scale_of(head, vector, 2 * i) + 32, scale_of(head, vector, 2 * i + 1) + 32
        v.store_u8(out + 4 + i, (low & 15) | (upper & 15) << 4)
    for i in range(8):
        pack_nibbles(codes + 32 * i, out + 8 + 16 * i)


@v.helper
def pack_q2_k(codes, head, vector, out):  # type: ignore[no-untyped-def]
    for i in range(16):
        v.store_u8(out + i, scale_of(head, vector, i) | minimum_of(head, vector, i) << 4)
    for half in range(2):
        pack_pairs(codes + 128 * half, out + 16 + 32 * half)
    v.store_f16(out + 80, v.load_f32(head))
    v.store_f16(out + 82, v.load_f32(head + vector))


@v.helper
def pack_q3_k(codes, head, vector, out):  # type: ignore[no-untyped-def]
    for j in range(0, 32, 8):
        mask = 0
        for k in range(8):
            mask |= ((eight(codes, 32 * k + j) >> 2) & LOW_BITS) << k
        v.store_i64(out + j, mask)
    for half in range(2):
        pack_pairs(codes + 128 * half, out + 32 + 32 * half)
    for i in range(8):
        low, upper = scale_of(head, vector, i) + 32, scale_of(head, vector, i + 8) + 32
        v.store_u8(out + 96 + i, (low & 15) | (upper & 15) << 4)
    for i in range(4):
        high = 0
        for k in range(4):
            high |= ((scale_of(head, vector, 4 * k + i) + 32) >> 4) << (2 * k)
        v.store_u8(out + 104 + i, high)
    v.store_f16(out + 108, v.load_f32(head))


@v.helper
def pack_k_head(head, vector, out):  # type: ignore[no-untyped-def]
    """What Q4_K and Q5_K begin with."""
    v.store_f16(out, v.load_f32(head))
    v.store_f16(out + 2, v.load_f32(head + vector))
    for i in range(4):
        scale, upper = scale_of(head, vector, i), scale_of(head, vector, i + 4)
        minimum, upper_minimum = minimum_of(head, vector, i), minimum_of(head, vector, i + 4)
        v.store_u8(out + 4 + i, scale | (upper >> 4) << 6)
        v.store_u8(out + 8 + i, minimum | (upper_minimum >> 4) << 6)
        v.store_u8(out + 12 + i, (upper & 15) | (upper_minimum & 15) << 4)


@v.helper
def pack_far_nibbles(codes, out):  # type: ignore[no-untyped-def]
    """256 codes to 128 bytes: in each 64, j and j + 32 together."""
    for k in range(4):
        for j in range(0, 32, 8):
            low, high = eight(codes, 64 * k + j) & LOW_FOUR, eight(codes, 64 * k + j + 32) & LOW_FOUR
            v.store_i64(out + 32 * k + j, low | high << 4)


@v.helper
def pack_q4_k(codes, head, vector, out):  # type: ignore[no-untyped-def]
    pack_k_head(head, vector, out)
    pack_far_nibbles(codes, out + 16)


@v.helper
def pack_q5_k(codes, head, vector, out):  # type: ignore[no-untyped-def]
    pack_k_head(head, vector, out)
    for j in range(0, 32, 8):
        fifth = 0
        for k in range(8):
            fifth |= ((eight(codes, 32 * k + j) >> 4) & LOW_BITS) << k
        v.store_i64(out + 16 + j, fifth)
    pack_far_nibbles(codes, out + 48)


@v.helper
def pack_q6_k(codes, head, vector, out):  # type: ignore[no-untyped-def]
    for half in range(2):
        for j in range(0, 64, 8):
            low, high = eight(codes, 128 * half + j) & LOW_FOUR, eight(codes, 128 * half + j + 64) & LOW_FOUR
            v.store_i64(out + 64 * half + j, low | high << 4)
        for j in range(0, 32, 8):
            top = 0
            for k in range(4):
                top |= ((eight(codes, 128 * half + 32 * k + j) >> 4) & LOW_TWO) << (2 * k)
            v.store_i64(out + 128 + 32 * half + j, top)
    for i in range(16):
        v.store_u8(out + 192 + i, scale_of(head, vector, i))
    v.store_f16(out + 208, v.load_f32(head))


@v.helper
def pack_tq1_0(codes, head, vector, out):  # type: ignore[no-untyped-def]
    """The first five ternary digits of a fraction of 256, rounded up: 243 of them make a whole."""
    for j in range(52):
        # Bytes 0-31 have digits 32 apart, 32-47 have them 16 apart, the last four 4 apart, and one less.
        apart = 32 if j < 32 else 16 if j < 48 else 4
        first = j if j < 32 else j + 128 if j < 48 else j + 192
        number = 0
        for n in range(5):
            digit = 0
            if j < 48 or n < 4:
                digit = v.load_u8(codes + first + n * apart)
            number = 3 * number + digit
        v.store_u8(out + j, (number * 256 + 242) // 243)
    v.store_f16(out + 52, v.load_f32(head))


@v.helper
def pack_tq2_0(codes, head, vector, out):  # type: ignore[no-untyped-def]
    for half in range(2):
        pack_pairs(codes + 128 * half, out + 32 * half)
    v.store_f16(out + 64, v.load_f32(head))


@v.helper
def pack_q1_0(codes, head, vector, out):  # type: ignore[no-untyped-def]
    v.store_f16(out, v.load_f32(head))
    for j in range(16):
        bits = 0
        for k in range(8):
            bits |= v.load_u8(codes + 8 * j + k) << k
        v.store_u8(out + 2 + j, bits)


@v.helper
def pack_q2_0(codes, head, vector, out):  # type: ignore[no-untyped-def]
    v.store_f16(out, v.load_f32(head))
    for j in range(16):
        bits = 0
        for k in range(4):
            bits |= v.load_u8(codes + 4 * j + k) << (2 * k)
        v.store_u8(out + 2 + j, bits)


@v.helper
def e2m1(code):  # type: ignore[no-untyped-def]
    """From levels that rise from 0 to 14 with zero in the middle: a bit for the sign and three for the magnitude."""
    return 15 - code if code < 7 else code - 7


@v.helper
def pack_nvfp4(codes, head, vector, out):  # type: ignore[no-untyped-def]
    for i in range(4):
        v.store_u8(out + i, scale_of(head, vector, i))
        for j in range(8):
            low, high = e2m1(v.load_u8(codes + 16 * i + j)), e2m1(v.load_u8(codes + 16 * i + j + 8))
            v.store_u8(out + 4 + 8 * i + j, low | high << 4)


PACKERS: dict[str, Callable[..., Any]] = {
    "Q2_K": pack_q2_k,
    "Q3_K": pack_q3_k,
    "Q4_K": pack_q4_k,
    "Q5_K": pack_q5_k,
    "Q6_K": pack_q6_k,
    "IQ4_XS": pack_iq4_xs,
    "TQ1_0": pack_tq1_0,
    "TQ2_0": pack_tq2_0,
    "Q1_0": pack_q1_0,
    "Q2_0": pack_q2_0,
    "NVFP4": pack_nvfp4,
}


def build_pack_codes(type_name: str) -> Any:
    """pack(x, head, out, count): the blocks of `count` lanes, of which the codes lie at x, to `out`."""
    pack_block = PACKERS[type_name]
    block_size, block_bytes = BLOCK_SIZES[TensorType[type_name]]
    vector = 4 * v.target().lanes

    @v.helper
    def pack(x, head, out, count):  # type: ignore[no-untyped-def]
        codes = v.scratch(block_size)
        for lane in range(count):
            for j in range(block_size):
                v.store_u8(codes + j, v.load_i32(x + j * vector + 4 * lane))
            pack_block(codes, head + 4 * lane, vector, out + lane * block_bytes)

    return pack


# --- groups -----------------------------------------------------------------------------------------------------------
#
# These packers take the address of a block's lane at x, where `quantize_groups` has put the index of each group of
# weights in the place of its first weight, and bits in that of its second.


@v.helper
def index_of(x, vector, weight):  # type: ignore[no-untyped-def]
    """Of the group that begins with this weight."""
    return v.load_i32(x + weight * vector)


@v.helper
def bits_of(x, vector, weight):  # type: ignore[no-untyped-def]
    return v.load_i32(x + (weight + 1) * vector)


@v.helper
def store_u16(out, value):  # type: ignore[no-untyped-def]
    v.store_u8(out, value)
    v.store_u8(out + 1, value >> 8)


@v.helper
def signs_and_scale(x, head, vector, i):  # type: ignore[no-untyped-def]
    """Of sub-block i of 32 weights: seven of each eight signs, and the scale above them."""
    word = scale_of(head, vector, i) << 28
    for k in range(4):
        word |= (bits_of(x, vector, 32 * i + 8 * k) & 127) << (7 * k)
    return word


@v.helper
def pack_half_scales(head, vector, count, out):  # type: ignore[no-untyped-def]
    for i in range(0, count, 2):
        v.store_u8(out + i // 2, scale_of(head, vector, i) | scale_of(head, vector, i + 1) << 4)


@v.helper
def pack_iq2_xxs(x, head, vector, out):  # type: ignore[no-untyped-def]
    v.store_f16(out, v.load_f32(head))
    for i in range(8):
        for k in range(4):
            v.store_u8(out + 2 + 8 * i + k, index_of(x, vector, 32 * i + 8 * k))
        v.store_i32(out + 6 + 8 * i, signs_and_scale(x, head, vector, i))


@v.helper
def pack_iq2_xs(x, head, vector, out):  # type: ignore[no-untyped-def]
    v.store_f16(out, v.load_f32(head))
    for i in range(32):
        store_u16(out + 2 + 2 * i, index_of(x, vector, 8 * i) | (bits_of(x, vector, 8 * i) & 127) << 9)
    pack_half_scales(head, vector, 16, out + 66)


@v.helper
def pack_iq2_s(x, head, vector, out):  # type: ignore[no-untyped-def]
    v.store_f16(out, v.load_f32(head))
    for i in range(8):
        high = 0
        for k in range(4):
            index = index_of(x, vector, 32 * i + 8 * k)
            v.store_u8(out + 2 + 4 * i + k, index)
            v.store_u8(out + 34 + 4 * i + k, bits_of(x, vector, 32 * i + 8 * k))
            high |= (index >> 8) << (2 * k)
        v.store_u8(out + 66 + i, high)
    pack_half_scales(head, vector, 16, out + 74)


@v.helper
def pack_iq3_xxs(x, head, vector, out):  # type: ignore[no-untyped-def]
    v.store_f16(out, v.load_f32(head))
    for i in range(64):
        v.store_u8(out + 2 + i, index_of(x, vector, 4 * i))
    for i in range(8):
        v.store_i32(out + 66 + 4 * i, signs_and_scale(x, head, vector, i))


@v.helper
def pack_iq3_s(x, head, vector, out):  # type: ignore[no-untyped-def]
    v.store_f16(out, v.load_f32(head))
    for i in range(8):
        ninth = 0
        for k in range(8):
            index = index_of(x, vector, 32 * i + 4 * k)
            v.store_u8(out + 2 + 8 * i + k, index)
            ninth |= (index >> 8) << k
        v.store_u8(out + 66 + i, ninth)
    for i in range(32):
        v.store_u8(out + 74 + i, bits_of(x, vector, 8 * i))
    pack_half_scales(head, vector, 8, out + 106)


@v.helper
def pack_iq1_s(x, head, vector, out):  # type: ignore[no-untyped-def]
    v.store_f16(out, v.load_f32(head))
    for i in range(8):
        word = scale_of(head, vector, i) << 12 | bits_of(x, vector, 32 * i) << 15
        for k in range(4):
            index = index_of(x, vector, 32 * i + 8 * k)
            v.store_u8(out + 2 + 4 * i + k, index)
            word |= (index >> 8) << (3 * k)
        store_u16(out + 34 + 2 * i, word)


@v.helper
def pack_iq1_m(x, head, vector, out):  # type: ignore[no-untyped-def]
    for i in range(16):
        fields = 0
        for k in range(2):
            weight = 16 * i + 8 * k
            index = index_of(x, vector, weight)
            v.store_u8(out + 2 * i + k, index)
            fields |= (index >> 8 | bits_of(x, vector, weight) << 3) << (4 * k)
        v.store_u8(out + 32 + i, fields)
    # The scale of the block is put where the first word will be, and taken from there bit by bit.
    v.store_f16(out + 48, v.load_f32(head))
    scale = v.load_u8(out + 48) | v.load_u8(out + 49) << 8
    for m in range(4):
        word = ((scale >> (4 * m)) & 15) << 12
        for k in range(4):
            word |= scale_of(head, vector, 4 * m + k) << (3 * k)
        store_u16(out + 48 + 2 * m, word)


GROUP_PACKERS: dict[str, Callable[..., Any]] = {
    "IQ2_XXS": pack_iq2_xxs,
    "IQ2_XS": pack_iq2_xs,
    "IQ2_S": pack_iq2_s,
    "IQ3_XXS": pack_iq3_xxs,
    "IQ3_S": pack_iq3_s,
    "IQ1_S": pack_iq1_s,
    "IQ1_M": pack_iq1_m,
}


def build_pack_groups(type_name: str) -> Any:
    """pack(x, head, out, count): the blocks of `count` lanes, of which indices and bits lie at x, to `out`."""
    pack_block = GROUP_PACKERS[type_name]
    _, block_bytes = BLOCK_SIZES[TensorType[type_name]]
    vector = 4 * v.target().lanes

    @v.helper
    def pack(x, head, out, count):  # type: ignore[no-untyped-def]
        for lane in range(count):
            pack_block(x + 4 * lane, head + 4 * lane, vector, out + lane * block_bytes)

    return pack
