"""Q3_K: 256 weights in 110 bytes, 3.4375 bits per weight.

    byte  0       32                        96       108  110
          | hmask | qs                      | scales | d |
          |         64 bytes: the low 2 bits  |        f16
          |         of each weight            12 bytes: 16 scales of 6 bits
          32 bytes: the third bit of each weight

    w[i, j] = (d * (scale[i] - 32)) * (q[i, j] - 4)      16 sub-blocks i of 16 weights j, scale in 0..63
                                                         q = low | (third bit) << 2, in 0..7

          qs       as in Q2_K: byte j of either 32-byte half holds weights j, j + 32, j + 64, j + 96 of its 128
          hmask    bit k of byte j belongs to weight 32 * k + j

          scales   byte  0- 3   low 4 bits of scale  8-11 | of scale  0- 3
                   byte  4- 7   low 4 bits of scale 12-15 | of scale  4- 7
                   byte  8-11   high 2 bits of scale 12-15 | 8-11 | 4-7 | 0-3      (most significant bits first)

Symmetric: there is no minimum, which pays for 6-bit scales with a sign. Where the third bit is set nothing is taken
off and where it is clear 4 is, so that q - 4 comes out of two masks and one subtraction.
"""

import numpy as np
from numpy.typing import NDArray

from qrun.formats.blocks.fitting import Effort, Search, Steps, fit, spaced
from qrun.formats.blocks.layout import F32Array, U8Array, bit_fields, pack_fields, read_f16, write_f16


def unpack_scales(packed: U8Array) -> NDArray[np.int8]:
    """The 16 signed scales of each block: [n_blocks, 12] -> int8 [n_blocks, 16], -32..31."""
    low = bit_fields(packed[:, :8], 4).reshape(-1, 16)
    high = bit_fields(packed[:, 8:], 2).reshape(-1, 16)
    return (low | high << np.uint8(4)).astype(np.int8) - np.int8(32)


def dequantize(blocks: U8Array) -> F32Array:
    n_blocks = len(blocks)
    d = (read_f16(blocks, 108) * unpack_scales(blocks[:, 96:108]).astype(np.float32))[..., None]
    low = bit_fields(blocks[:, 32:96].reshape(n_blocks, 2, 32), 2).reshape(n_blocks, 16, 16)
    high = bit_fields(blocks[:, :32], 1).reshape(n_blocks, 16, 16)
    q = (low | high << np.uint8(2)).astype(np.int8) - np.int8(4)
    return (d * q.astype(np.float32)).reshape(n_blocks, 256)


SEARCH = Search(16, 16, Steps(-4, 3), False, Effort(spaced(-5.4, -2.6, 10) + spaced(4.4, 1.6, 10), 1), -32, 31, 2)


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 256] -> uint8 [n, 110]. Seeks d and scales that make the sum of importance * (x - w)^2 least."""
    found = fit(SEARCH, values, importance)
    scales = (found.scales + 32).astype(np.uint8)
    low = pack_fields((scales & 15).reshape(-1, 2, 8), 4)
    high = pack_fields((scales >> 4).reshape(-1, 4, 4), 2)
    mask = pack_fields((found.codes >> 2).reshape(-1, 8, 32), 1)
    quants = pack_fields((found.codes & 3).reshape(-1, 2, 4, 32), 2).reshape(-1, 64)
    return np.concatenate([mask, quants, low, high, write_f16(found.scale)], axis=-1)
