"""Q1_0: 128 weights in 18 bytes, 1.125 bits per weight.

    byte  0   2                                18
          | d | qs                             |
          f16   16 bytes: bit j % 8 of byte j // 8 belongs to weight j

    w[j] = d where the bit is set, else -d

For models that were trained with weights of two values.
"""

import numpy as np

from qrun.formats.blocks.layout import F32Array, U8Array, read_f16


def dequantize(blocks: U8Array) -> F32Array:
    bits = np.unpackbits(blocks[:, 2:], axis=-1, bitorder="little").astype(np.int8)
    return read_f16(blocks, 0) * (np.int8(2) * bits - np.int8(1)).astype(np.float32)
