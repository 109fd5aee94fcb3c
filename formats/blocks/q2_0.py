"""Q2_0: 64 weights in 18 bytes, 2.25 bits per weight.

    byte  0   2                                18
          | d | qs                             |
          f16   16 bytes: weight j in bits 2 * (j % 4) and 2 * (j % 4) + 1 of byte j // 4

    w[j] = d * (q[j] - 1)        q in 0..3

For models that were trained with weights of -1, 0 and 1; there is a fourth level, 2.
"""

import numpy as np

from qrun.formats.blocks.fitting import Effort, Search, Steps, fit
from qrun.formats.blocks.layout import F32Array, U8Array, bit_fields, pack_fields, read_f16, write_f16


def dequantize(blocks: U8Array) -> F32Array:
    q = bit_fields(blocks[:, 2:], 2).swapaxes(-1, -2).reshape(-1, 64).astype(np.int8) - np.int8(1)
    return read_f16(blocks, 0) * q.astype(np.float32)


# The largest weight is put near the highest level or the lowest, which is half as far from zero, or further out.
STARTS = (1, 1.4, 1.7, 2, 2.3, 2.7, 3.5, -0.7, -1, -1.3, -1.7, -2, -2.5, -3)
SEARCH = Search(1, 64, Steps(-1, 2), False, Effort(STARTS, 2))


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 64] -> uint8 [n, 18]. Seeks d that makes the sum of importance * (x - w)^2 least."""
    found = fit(SEARCH, values, importance)
    quants = pack_fields(found.codes.reshape(-1, 16, 4).swapaxes(-1, -2), 2)
    return np.concatenate([write_f16(found.scale), quants], axis=-1)
