"""TQ2_0: 256 weights in 66 bytes, 2.0625 bits per weight.

    byte  0                                64  66
          | qs                             | d |
          64 bytes, 2 bits a weight        f16

    w[j] = d * (q[j] - 1)        q in 0..2 (3 is not made, and would be 2)

          qs[0:32]   bits 0-1: weights   0- 31    2-3:  32- 63    4-5:  64- 95    6-7:  96-127
          qs[32:64]  bits 0-1: weights 128-159    2-3: 160-191    4-5: 192-223    6-7: 224-255

For ternary models, such as BitNet b1.58: one scale for 256 weights, and the bits laid out as in Q2_K, which makes them
quick to unpack.
"""

import numpy as np

from qrun.formats.blocks.fitting import Effort, Search, Steps, fit
from qrun.formats.blocks.layout import F32Array, U8Array, bit_fields, pack_fields, read_f16, write_f16


def dequantize(blocks: U8Array) -> F32Array:
    q = bit_fields(blocks[:, :64].reshape(-1, 2, 32), 2).reshape(-1, 256).astype(np.int8) - np.int8(1)
    return read_f16(blocks, 64) * q.astype(np.float32)


# The largest weight lies at the highest level in a ternary model, and in others up to many times as far out.
SEARCH = Search(1, 256, Steps(-1, 1), False, Effort((1, 1.5, 2, 2.5, 3, 4, 6, 12), 4))


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 256] -> uint8 [n, 66]. Seeks d that makes the sum of importance * (x - w)^2 least."""
    found = fit(SEARCH, values, importance)
    quants = pack_fields(found.codes.reshape(-1, 2, 4, 32), 2).reshape(-1, 64)
    return np.concatenate([quants, write_f16(found.scale)], axis=-1)
