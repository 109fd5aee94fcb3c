"""IQ4_NL: 32 weights in 18 bytes, 4.5 bits per weight.

    byte  0   2                                18
          | d | qs                             |
          f16   16 bytes: byte j holds weight j in its low half and weight j + 16 in its high half

    w[j] = d * LEVELS[q[j]]      q in 0..15

Byte for byte a Q4_0, but the sixteen levels are not evenly spaced: they lie densely about zero, as the weights of a
trained model do. A kernel looks them up with one byte shuffle. They lean to one side (1, not 0, is in the middle),
and the quantiser uses that by picking the sign of d.
"""

import numpy as np

from qrun.formats.blocks.fitting import Effort, Search, Table, fit
from qrun.formats.blocks.layout import F32Array, U8Array, bit_fields, pack_fields, read_f16, write_f16

LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int8)


def dequantize(blocks: U8Array) -> F32Array:
    levels = LEVELS[bit_fields(blocks[:, 2:], 4)].reshape(-1, 32)
    return read_f16(blocks, 0) * levels.astype(np.float32)


# The largest weight is put near either end of the levels: 127 / 16 apart, and 113 / 16.
STARTS = (*(-127 * (1 + k / 16) for k in range(-6, 6)), *(113 * (1 + k / 16) for k in range(-6, 6)))
SEARCH = Search(1, 32, Table(tuple(LEVELS.tolist())), False, Effort(STARTS, 2))


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 32] -> uint8 [n, 18]. Seeks d that makes the sum of importance * (x - d * LEVELS[q])^2 least."""
    found = fit(SEARCH, values, importance)
    return np.concatenate([write_f16(found.scale), pack_fields(found.codes.reshape(-1, 2, 16), 4)], axis=-1)
