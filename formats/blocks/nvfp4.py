"""NVFP4: 64 weights in 36 bytes, 4.5 bits per weight.

    byte  0        4                                36
          | scales | qs                             |
          4 bytes    32 bytes: byte 8i + j holds weight j of sub-block i in its low half, weight j + 8 in its high half

    w[i, j] = (e4m3(scale[i]) / 2) * LEVELS[q[i, j]]                4 sub-blocks i of 16 weights j, q in 0..15

          scale   bit 7 | 6-3 exponent | 2-0 mantissa        unsigned E4M3: (8 + mantissa) / 8 * 2 ** (exponent - 7),
                  not read                                   and mantissa / 8 * 2 ** -6 where the exponent is 0

A weight is the four-bit float of MXFP4 (LEVELS are those numbers doubled, so half the scale is taken). The scale has
eight levels between powers of two and serves 16 weights instead of 32. It spans only 2 ** -9 to 448, so there is one
float32 more for the whole tensor; in a GGUF file that is a tensor of its own beside this one. A scale of 127, which
E4M3 reads as NaN, counts as zero.
"""

import numpy as np

from qrun.formats.blocks.layout import F32Array, U8Array, bit_fields
from qrun.formats.blocks.mxfp4 import LEVELS

_CODES = np.arange(256)
_EXPONENTS, _MANTISSAS = _CODES >> 3 & 15, _CODES & 7
SCALES = np.where(_EXPONENTS, np.ldexp(8 + _MANTISSAS, _EXPONENTS - 11), np.ldexp(_MANTISSAS, -10)).astype(np.float32)
"""Half of what each byte says as a scale."""
SCALES[127] = 0


def dequantize(blocks: U8Array) -> F32Array:
    n_blocks = len(blocks)
    levels = LEVELS[bit_fields(blocks[:, 4:].reshape(n_blocks, 4, 8), 4)].reshape(n_blocks, 4, 16)
    return (SCALES[blocks[:, :4]][..., None] * levels.astype(np.float32)).reshape(n_blocks, 64)
