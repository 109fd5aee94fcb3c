"""Q2_K: 256 weights in 84 bytes, 2.625 bits per weight.

    byte  0        16                                  80  82     84
          | scales | qs                                | d | dmin |
          |          64 bytes, 2 bits a weight         f16   f16
          16 bytes: byte i holds the scale of sub-block i in its low half, its minimum in its high half

    w[i, j] = (d * scale[i]) * q[i, j] - (dmin * minimum[i])        16 sub-blocks i of 16 weights j, q in 0..3

          qs[0:32]   bits 0-1: weights   0- 31    2-3:  32- 63    4-5:  64- 95    6-7:  96-127
          qs[32:64]  bits 0-1: weights 128-159    2-3: 160-191    4-5: 192-223    6-7: 224-255

Two levels of scale: with a half-precision scale and minimum for each sixteen weights, 2 bits would have cost 4. Here
they are 4-bit numbers, scaled in turn by one pair for all 256. A byte holds weights that lie 32 apart, so that a
shift and a mask of 32 bytes, one AVX2 register, yield 32 neighbours.
"""

import numpy as np

from qrun.formats.blocks.fitting import Effort, Search, Steps, fit, spaced
from qrun.formats.blocks.layout import F32Array, U8Array, bit_fields, pack_fields, read_f16, write_f16


def dequantize(blocks: U8Array) -> F32Array:
    n_blocks = len(blocks)
    scale, minimum = (field.astype(np.float32) for field in (blocks[:, :16] & 15, blocks[:, :16] >> 4))
    q = bit_fields(blocks[:, 16:80].reshape(n_blocks, 2, 32), 2).reshape(n_blocks, 16, 16)
    d = (read_f16(blocks, 80) * scale)[..., None]
    m = (read_f16(blocks, 82) * minimum)[..., None]
    return (d * q.astype(np.float32) - m).reshape(n_blocks, 256)


SEARCH = Search(16, 16, Steps(0, 3), True, Effort(spaced(2, 4, 9), 2, (-0.2, 0.0, 0.2, 0.4, 0.6)), 0, 15, 4)


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 256] -> uint8 [n, 84]. Seeks d, dmin, scales and minimums: least sum of importance * (x - w)^2."""
    found = fit(SEARCH, values, importance)
    scales = (found.scales | found.minimums << 4).astype(np.uint8)
    quants = pack_fields(found.codes.reshape(-1, 2, 4, 32), 2).reshape(-1, 64)
    return np.concatenate([scales, quants, write_f16(found.scale), write_f16(found.minimum)], axis=-1)
