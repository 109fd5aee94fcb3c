"""F32, F16, BF16: weights that are not quantised. 32, 16 and 16 bits per weight.

    F32    seeeeeee emmmmmmm mmmmmmmm mmmmmmmm    IEEE 754 single
    F16    seeeeemm mmmmmmmm                      IEEE 754 half: finer, overflows at 65,504
    BF16   seeeeeee emmmmmmm                      the upper half of an F32: its range, 8 bits of precision

(Most significant bit first; the bytes are stored little-endian.) Norm weights and biases stay F32 in nearly every
file, since they are few and matter much. BF16 is what models are trained in, so it converts without loss.
"""

import numpy as np
from numpy.typing import NDArray

from qrun.formats.blocks.layout import F32Array, TensorType, U8Array, read_f16

Floats = F32Array | NDArray[np.float16] | NDArray[np.uint16]
"""Numbers of any of the three types. NumPy has no BF16: its bits go as integers."""

DTYPES: dict[TensorType, np.dtype[np.float32] | np.dtype[np.float16] | np.dtype[np.uint16]] = {
    TensorType.F32: np.dtype("<f4"),
    TensorType.F16: np.dtype("<f2"),
    TensorType.BF16: np.dtype("<u2"),
}


def as_stored(raw: U8Array, type: TensorType, row: int) -> Floats:
    """The bytes of rows of F32, F16 or BF16 as the numbers that they are: [rows, row]."""
    return raw.view(DTYPES[type]).reshape(-1, row)


def dequantize_f32(blocks: U8Array) -> F32Array:
    return blocks.view(np.float32)


def dequantize_f16(blocks: U8Array) -> F32Array:
    return read_f16(blocks, 0)


def dequantize_bf16(blocks: U8Array) -> F32Array:
    return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def quantize_f32(values: F32Array, importance: F32Array | None = None) -> U8Array:
    return np.ascontiguousarray(values, "<f4").view(np.uint8)


def quantize_f16(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """To the nearest, ties to even; to infinity beyond 65,519."""
    with np.errstate(over="ignore"):
        return values.astype("<f2").view(np.uint8)


def quantize_bf16(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """To the nearest, ties to even. A NaN stays one: its upper half may hold none of its bits, so one is set."""
    bits = values.view(np.uint32)
    rounded = bits + (0x7FFF + (bits >> 16 & 1))
    upper = np.where(np.isnan(values), bits | 0x400000, rounded) >> 16
    return upper.astype("<u2").view(np.uint8)
