"""Q5_1: 32 weights in 24 bytes, 6 bits per weight.

    byte  0   2   4    8                                24
          | d | m | qh | qs                             |
          f16 f16  |     16 bytes: the low 4 bits; byte j holds those of weight j and, above them, of weight j + 16
                   4 bytes, a little-endian uint32: bit j is the fifth bit of weight j

    w[j] = d * q[j] + m          q[j] = low[j] | high[j] << 4, in 0..31

What Q4_1 is to Q4_0, this is to Q5_0: a minimum of its own for two bytes more.
"""

import numpy as np

from qrun.formats.blocks.fitting import Effort, Search, Steps, fit, spaced
from qrun.formats.blocks.layout import F32Array, U8Array, read_f16, write_f16
from qrun.formats.blocks.q5_0 import pack, unpack


def dequantize(blocks: U8Array) -> F32Array:
    q = unpack(blocks[:, 4:8], blocks[:, 8:])
    return read_f16(blocks, 0) * q.astype(np.float32) + read_f16(blocks, 2)


SEARCH = Search(1, 32, Steps(0, 31), True, Effort(spaced(28, 35, 28), 2), quick=Effort((31,), 1, (0.0, 0.5)))


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 32] -> uint8 [n, 24]. Seeks d and m that make the sum of importance * (x - d * q - m)^2 least."""
    found = fit(SEARCH, values, importance)
    header = [write_f16(found.scale), write_f16(0 - found.minimum)]
    return np.concatenate([*header, *pack(found.codes)], axis=-1)
