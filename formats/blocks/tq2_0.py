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

from qrun.formats.blocks.layout import F32Array, U8Array, bit_fields, read_f16


def dequantize(blocks: U8Array) -> F32Array:
    q = bit_fields(blocks[:, :64].reshape(-1, 2, 32), 2).reshape(-1, 256).astype(np.int8) - np.int8(1)
    return read_f16(blocks, 64) * q.astype(np.float32)
