"""F32, F16, BF16: weights that are not quantised. 32, 16 and 16 bits per weight.

    F32    seeeeeee emmmmmmm mmmmmmmm mmmmmmmm    IEEE 754 single
    F16    seeeeemm mmmmmmmm                      IEEE 754 half: finer, overflows at 65,504
    BF16   seeeeeee emmmmmmm                      the upper half of an F32: its range, 8 bits of precision

(Most significant bit first; the bytes are stored little-endian.) Norm weights and biases stay F32 in nearly every
file, since they are few and matter much. BF16 is what models are trained in, so it converts without loss.
"""

import numpy as np

from qrun.formats.blocks.layout import F32Array, U8Array, read_f16


def dequantize_f32(blocks: U8Array) -> F32Array:
    return blocks.view(np.float32)


def dequantize_f16(blocks: U8Array) -> F32Array:
    return read_f16(blocks, 0)


def dequantize_bf16(blocks: U8Array) -> F32Array:
    return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
