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
from numpy.typing import NDArray

from qrun.formats.blocks.fitting import Effort, Search, divide, total
from qrun.formats.blocks.layout import F32Array, U8Array, bit_fields, pack_fields
from qrun.formats.blocks.mxfp4 import LEVELS, RISING, signed_codes

_CODES = np.arange(256)
_EXPONENTS, _MANTISSAS = _CODES >> 3 & 15, _CODES & 7
SCALES = np.where(_EXPONENTS, np.ldexp(8 + _MANTISSAS, _EXPONENTS - 11), np.ldexp(_MANTISSAS, -10)).astype(np.float32)
"""Half of what each byte says as a scale."""
SCALES[127] = 0


def dequantize(blocks: U8Array) -> F32Array:
    n_blocks = len(blocks)
    levels = LEVELS[bit_fields(blocks[:, 4:].reshape(n_blocks, 4, 8), 4)].reshape(n_blocks, 4, 16)
    return (SCALES[blocks[:, :4]][..., None] * levels.astype(np.float32)).reshape(n_blocks, 64)


# How far from the scale under which the largest weight is the largest level, in steps of the scale's own levels: with
# a larger one it becomes the next level below.
SHIFTS = (0, -1, 1, -2, 2, 3, 4, 5, 6)
SEARCH = Search(4, 16, RISING, False, Effort(SHIFTS, 0))
LARGEST = 126
MANTISSA_BITS, DENORMALS = 20, 1024


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 64] -> uint8 [n, 36]. Of some scales for each sub-block, the one with the least sum of w * (x - y)^2."""
    x = np.ascontiguousarray(values.reshape(-1, 4, 16).transpose(1, 2, 0), np.float32)
    w = np.ones_like(x)
    if importance is not None:
        w = np.ascontiguousarray(importance.reshape(-1, 4, 16).transpose(1, 2, 0), np.float32)
    with np.errstate(all="ignore"):
        first = nearest_scale(np.abs(x).max(axis=1) * np.float32(1 / RISING.largest))
        for shift in SHIFTS:
            tried = np.clip(first + shift, 1, LARGEST)
            scale = SCALES[tried]
            q = RISING.nearest(x * divide(1, scale)[:, None])
            miss = x - q * scale[:, None]
            error = total((w * miss) * miss)
            if shift == 0:
                best_error, best, best_q = error, tried, q
                continue
            better = error < best_error
            best_error, best = np.where(better, error, best_error), np.where(better, tried, best)
            best_q = np.where(better[:, None], q, best_q)
    codes = signed_codes(best_q.transpose(2, 0, 1))
    return np.concatenate([best.astype(np.uint8).T, pack_fields(codes.reshape(-1, 4, 2, 8), 4).reshape(-1, 32)], -1)


def nearest_scale(values: F32Array) -> NDArray[np.int32]:
    """The code of the scale that is next to a number, halfway or more upwards: from the bits of its float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.int32)
    normal = ((bits + (1 << MANTISSA_BITS - 1)) >> MANTISSA_BITS) - (119 << 3)
    denormal = np.minimum(values * np.float32(DENORMALS) + np.float32(0.5), np.float32(8)).astype(np.int32)
    return np.where(normal < 8, denormal, normal)
