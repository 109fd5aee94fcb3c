"""Q2_0: 64 weights in 18 bytes, 2.25 bits per weight.

    byte  0   2                                18
          | d | qs                             |
          f16   16 bytes: weight j in bits 2 * (j % 4) and 2 * (j % 4) + 1 of byte j // 4

    w[j] = d * (q[j] - 1)        q in 0..3

For models that were trained with weights of -1, 0 and 1; there is a fourth level, 2.
"""

import numpy as np

from qrun.formats.blocks.layout import F32Array, U8Array, bit_fields, read_f16


def dequantize(blocks: U8Array) -> F32Array:
    q = bit_fields(blocks[:, 2:], 2).swapaxes(-1, -2).reshape(-1, 64).astype(np.int8) - np.int8(1)
    return read_f16(blocks, 0) * q.astype(np.float32)
