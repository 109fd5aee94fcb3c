"""Q8_0: 32 weights in 34 bytes, 8.5 bits per weight.

    byte  0   2                                34
          | d | qs                             |
          f16   32 signed bytes, in order

    w[j] = d * q[j]              q in -127..127

Nearly lossless, and with nothing to unpack. Small blocks keep one outlier from coarsening more than 31 neighbours.
"""

import numpy as np

from qrun.formats.blocks.layout import F32Array, U8Array, read_f16


def dequantize(blocks: U8Array) -> F32Array:
    return read_f16(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)
