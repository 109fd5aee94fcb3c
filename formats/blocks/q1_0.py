"""Q1_0: 128 weights in 18 bytes, 1.125 bits per weight.

    byte  0   2                                18
          | d | qs                             |
          f16   16 bytes: bit j % 8 of byte j // 8 belongs to weight j

    w[j] = d where the bit is set, else -d

For models that were trained with weights of two values.
"""

import numpy as np

from qrun.formats.blocks.fitting import Effort, Search, Table, fit
from qrun.formats.blocks.layout import F32Array, U8Array, read_f16, write_f16


def dequantize(blocks: U8Array) -> F32Array:
    bits = np.unpackbits(blocks[:, 2:], axis=-1, bitorder="little").astype(np.int8)
    return read_f16(blocks, 0) * (np.int8(2) * bits - np.int8(1)).astype(np.float32)


# Every start gives the same signs.
SEARCH = Search(1, 128, Table((-1, 1)), False, Effort((1,), 0))


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 128] -> uint8 [n, 18]. Seeks d that makes the sum of importance * (x - w)^2 least."""
    found = fit(SEARCH, values, importance)
    return np.concatenate([write_f16(found.scale), np.packbits(found.codes, axis=-1, bitorder="little")], axis=-1)
