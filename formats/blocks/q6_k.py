"""Q6_K: 256 weights in 210 bytes, 6.5625 bits per weight.

    byte  0                    128             192      208  210
          | ql                 | qh            | scales | d |
          128 bytes:           64 bytes:       |        f16
          the low 4 bits       the high 2      16 signed bytes

    w[i, j] = (d * scale[i]) * (q[i, j] - 32)            16 sub-blocks i of 16 weights j, scale in -128..127
                                                         q = low | high << 4, in 0..63

          Each half of 128 weights has 64 bytes of ql and 32 of qh; for weights j in 0..31 of its four quarters:

          quarter       0               1                2                3
          low 4 bits    ql[j] low       ql[32 + j] low   ql[j] high       ql[32 + j] high
          high 2 bits   qh[j] bits 0-1  qh[j] bits 2-3   qh[j] bits 4-5   qh[j] bits 6-7

The format for the tensors that matter most: output, and half of `attn_v` and `ffn_down` in a "medium" mix. At six bits
a minimum no longer pays, so it is symmetric, and the scales have a whole byte, which keeps them aligned.
"""

import numpy as np

from qrun.formats.blocks.fitting import Effort, Search, Steps, fit, spaced
from qrun.formats.blocks.layout import F32Array, U8Array, bit_fields, pack_fields, read_f16, write_f16


def dequantize(blocks: U8Array) -> F32Array:
    n_blocks = len(blocks)
    low = bit_fields(blocks[:, :128].reshape(n_blocks, 2, 64), 4).reshape(n_blocks, 16, 16)
    high = bit_fields(blocks[:, 128:192].reshape(n_blocks, 2, 32), 2).reshape(n_blocks, 16, 16)
    q = (low | high << np.uint8(4)).astype(np.int8) - np.int8(32)
    d = (read_f16(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32))[..., None]
    return (d * q.astype(np.float32)).reshape(n_blocks, 256)


SEARCH = Search(16, 16, Steps(-32, 31), False, Effort(spaced(-36, -27, 20) + spaced(35, 26, 20), 1), -128, 127, 1)


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 256] -> uint8 [n, 210]. Seeks d and scales that make the sum of importance * (x - w)^2 least."""
    found = fit(SEARCH, values, importance)
    low = pack_fields((found.codes & 15).reshape(-1, 2, 2, 64), 4).reshape(-1, 128)
    high = pack_fields((found.codes >> 4).reshape(-1, 2, 4, 32), 2).reshape(-1, 64)
    scales = found.scales.astype(np.int8).view(np.uint8)
    return np.concatenate([low, high, scales, write_f16(found.scale)], axis=-1)
