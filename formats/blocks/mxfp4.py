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

from qrun.formats.blocks.fitting import Effort, Search, Table, divide, total
from qrun.formats.blocks.layout import F32Array, U8Array, bit_fields, pack_fields

LEVELS = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=np.int8)


def dequantize(blocks: U8Array) -> F32Array:
    scale = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)
    return scale * LEVELS[bit_fields(blocks[:, 1:], 4)].reshape(-1, 32).astype(np.float32)


RISING = Table(tuple(sorted(set(LEVELS.tolist()))))
SEARCH = Search(1, 32, RISING, False, Effort((), 0))
# The exponent under which the largest weight falls between 4 and 8 (in LEVELS: 8 and 16), one less, and one more.
SHIFTS = (-2, -3, -1)


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 32] -> uint8 [n, 17]. Of three exponents, the one with the least sum of importance * (x - w)^2."""
    x = np.ascontiguousarray(values.T[None], np.float32)
    w = np.ones_like(x) if importance is None else np.ascontiguousarray(importance.T[None], np.float32)
    with np.errstate(all="ignore"):
        exponent = np.abs(x).max(axis=1).view(np.int32) >> 23
        best_error, best_exponent, best_q = None, exponent, x
        for shift in SHIFTS:
            # 2 and 254: below, the scale would be denormal, above, infinite.
            tried = np.clip(exponent + shift, 2, 254)
            scale = ((tried - 1) << 23).view(np.float32)
            q = RISING.nearest(x * divide(1, scale)[:, None])
            miss = x - q * scale[:, None]
            error = total((w * miss) * miss)
            if best_error is None:
                best_error, best_exponent, best_q = error, tried, q
                continue
            better = error < best_error
            best_error = np.where(better, error, best_error)
            best_exponent, best_q = np.where(better, tried, best_exponent), np.where(better[:, None], q, best_q)
    codes = signed_codes(best_q[0].T)
    return np.concatenate([best_exponent.astype(np.uint8).T, pack_fields(codes.reshape(-1, 2, 16), 4)], axis=-1)


def signed_codes(levels: F32Array) -> U8Array:
    """The codes of levels: a sign bit above three bits of magnitude."""
    index = RISING.codes(levels)
    return np.where(index < 7, 15 - index, index - 7).astype(np.uint8)
