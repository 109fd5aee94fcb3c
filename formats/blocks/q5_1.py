"""Q5_1: 32 weights in 24 bytes, 6 bits per weight.

    byte  0   2   4    8                                24
          | d | m | qh | qs                             |
          f16 f16  |     16 bytes: the low 4 bits; byte j holds those of weight j and, above them, of weight j + 16
                   4 bytes, a little-endian uint32: bit j is the fifth bit of weight j

    w[j] = d * q[j] + m          q[j] = low[j] | high[j] << 4, in 0..31

What Q4_1 is to Q4_0, this is to Q5_0: a minimum of its own for two bytes more.
"""

import numpy as np

from qrun.formats.blocks.layout import F32Array, U8Array, read_f16
from qrun.formats.blocks.q5_0 import unpack


def dequantize(blocks: U8Array) -> F32Array:
    q = unpack(blocks[:, 4:8], blocks[:, 8:])
    return read_f16(blocks, 0) * q.astype(np.float32) + read_f16(blocks, 2)
