"""Codes and scales of a K format into the bytes of a block, as `formats/blocks` draws them: eight codes at a time.

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


PACKERS: dict[str, Callable[..., Any]] = {
    "Q2_K": pack_q2_k,
    "Q3_K": pack_q3_k,
    "Q4_K": pack_q4_k,
    "Q5_K": pack_q5_k,
    "Q6_K": pack_q6_k,
    "IQ4_XS": pack_iq4_xs,
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
