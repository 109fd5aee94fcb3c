"""Names and sizes of the tensor types of GGML, and the few moves that all of their decoders share.

A tensor is stored row by row, and a row is a run of blocks: a fixed number of weights in a fixed number of bytes.
Plain floats are blocks of one weight.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrun.formats.dataclass import dataclass

U8Array = NDArray[np.uint8]
F32Array = NDArray[np.float32]
Decoder = Callable[[U8Array], F32Array]
Encoder = Callable[[F32Array, F32Array | None], U8Array]


class TensorType(IntEnum):
    """A tensor's type as GGUF numbers it (`enum ggml_type` in ggml.h).

    Codes 4 and 5 were dropped before GGUF existed. 31-33 and 36-38 are the interleaved Q4_0 and IQ4_NL of 2024, which
    no engine reads any more, though files with them are still about.
    """

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    Q4_0_4_4 = 31
    Q4_0_4_8 = 32
    Q4_0_8_8 = 33
    TQ1_0 = 34
    TQ2_0 = 35
    IQ4_NL_4_4 = 36
    IQ4_NL_4_8 = 37
    IQ4_NL_8_8 = 38
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42


BLOCK_SIZES: dict[TensorType, tuple[int, int]] = {
    # weights in a block, bytes in a block
    TensorType.F32: (1, 4),
    TensorType.F16: (1, 2),
    TensorType.Q4_0: (32, 18),
    TensorType.Q4_1: (32, 20),
    TensorType.Q5_0: (32, 22),
    TensorType.Q5_1: (32, 24),
    TensorType.Q8_0: (32, 34),
    TensorType.Q8_1: (32, 36),
    TensorType.Q2_K: (256, 84),
    TensorType.Q3_K: (256, 110),
    TensorType.Q4_K: (256, 144),
    TensorType.Q5_K: (256, 176),
    TensorType.Q6_K: (256, 210),
    TensorType.Q8_K: (256, 292),
    TensorType.IQ2_XXS: (256, 66),
    TensorType.IQ2_XS: (256, 74),
    TensorType.IQ3_XXS: (256, 98),
    TensorType.IQ1_S: (256, 50),
    TensorType.IQ4_NL: (32, 18),
    TensorType.IQ3_S: (256, 110),
    TensorType.IQ2_S: (256, 82),
    TensorType.IQ4_XS: (256, 136),
    TensorType.I8: (1, 1),
    TensorType.I16: (1, 2),
    TensorType.I32: (1, 4),
    TensorType.I64: (1, 8),
    TensorType.F64: (1, 8),
    TensorType.IQ1_M: (256, 56),
    TensorType.BF16: (1, 2),
    TensorType.Q4_0_4_4: (32, 18),
    TensorType.Q4_0_4_8: (32, 18),
    TensorType.Q4_0_8_8: (32, 18),
    TensorType.TQ1_0: (256, 54),
    TensorType.TQ2_0: (256, 66),
    TensorType.IQ4_NL_4_4: (32, 18),
    TensorType.IQ4_NL_4_8: (32, 18),
    TensorType.IQ4_NL_8_8: (32, 18),
    TensorType.MXFP4: (32, 17),
    TensorType.NVFP4: (64, 36),
    TensorType.Q1_0: (128, 18),
    TensorType.Q2_0: (64, 18),
}


@dataclass(frozen=True)
class BlockFormat:
    """A tensor type that can be decoded, and perhaps encoded.

    quantize: from float32 [n_blocks, block_size], and how much the error of each weight matters (of that shape too, or
    None for all alike), to uint8 [n_blocks, block_bytes].
    """

    type: TensorType
    block_size: int  # weights
    block_bytes: int
    dequantize: Decoder  # uint8 [n_blocks, block_bytes] -> float32 [n_blocks, block_size]
    quantize: Encoder | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size


def read_f16(blocks: U8Array, at: int) -> F32Array:
    """The half-precision number at byte `at` of each block, as float32 [n_blocks, 1]."""
    return blocks[:, at : at + 2].view(np.float16).astype(np.float32)


def bit_fields(packed: U8Array, bits: int) -> U8Array:
    """Take bytes apart into fields of `bits` bits, lowest bits first: [..., n] -> [..., 8 // bits, n].

    All n lowest fields come first, then all n next ones. GGML packs so because one shift and one mask of a whole
    vector register then yield weights that are neighbours.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return packed[..., None, :] >> shifts & np.uint8((1 << bits) - 1)


def write_f16(numbers: F32Array) -> U8Array:
    """The reverse of read_f16: float32 [n] -> uint8 [n, 2]."""
    return numbers.astype("<f2").reshape(-1, 1).view(np.uint8)


def pack_fields(fields: NDArray[Any], bits: int) -> U8Array:
    """The reverse of bit_fields: integers of `bits` bits [..., 8 // bits, n] -> uint8 [..., n]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    packed: U8Array = np.bitwise_or.reduce(fields.astype(np.uint8) << shifts, axis=-2)
    return packed
