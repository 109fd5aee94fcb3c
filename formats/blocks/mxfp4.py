"""MXFP4: 32 weights in 17 bytes, 4.25 bits per weight.

    byte  0   1                                17
          | e | qs                             |
          u8    16 bytes: byte j holds weight j in its low half and weight j + 16 in its high half

    w[j] = 2 ** (e - 128) * LEVELS[q[j]]

A quarter of a bit of scale for each weight: the scale is a bare exponent (E8M0), and a weight a four-bit float
(E2M1: sign, two bits of exponent, one of mantissa), as the OCP Microscaling Formats specification 1.0 has it. LEVELS
are the sixteen E2M1 numbers doubled, so that they are whole and fit a byte shuffle; the exponent's bias is 128
instead of 127 to make up for it. The specification's e = 255 (NaN) is not treated apart, as in GGML.
"""

import numpy as np

from qrun.formats.blocks.layout import F32Array, U8Array, bit_fields

LEVELS = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.int8)


def dequantize(blocks: U8Array) -> F32Array:
    scale = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)
    return scale * LEVELS[bit_fields(blocks[:, 1:], 4)].reshape(-1, 32).astype(np.float32)
