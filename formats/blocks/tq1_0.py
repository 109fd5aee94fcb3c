"""TQ1_0: 256 weights in 54 bytes, 1.6875 bits per weight.

    byte  0                       48   52  54
          | qs                    | qh | d |
          48 bytes: 5 weights a   |    f16
          byte                    4 bytes: 4 weights a byte

    w[j] = d * (t[j] - 1)        t in 0..2: a ternary digit

          qs[0:32]    byte j: digits of weights j, j + 32, j + 64, j + 96, j + 128
          qs[32:48]   byte j: of weights 160 + j, 176 + j, 192 + j, 208 + j, 224 + j
          qh          byte j: of weights 240 + j, 244 + j, 248 + j, 252 + j

A byte is a fraction x / 256, and its ternary digits follow the point: 3 * x, of which what is above 256 is the first
digit and the rest the fraction that has the others. Five digits have 243 combinations, so 95 % of a byte is used, and
nothing has to be divided.
"""

import numpy as np

from qrun.formats.blocks.fitting import fit
from qrun.formats.blocks.layout import F32Array, U8Array, read_f16, write_f16
from qrun.formats.blocks.tq2_0 import SEARCH as SEARCH


def digits(packed: U8Array, count: int) -> U8Array:
    """The first ternary digits of bytes: [..., n] -> 0..2 [..., count, n]."""
    fractions = packed[..., None, :] * np.array([3**n for n in range(count)], np.uint8)[:, None]
    return (fractions.astype(np.uint16) * 3 >> 8).astype(np.uint8)


def dequantize(blocks: U8Array) -> F32Array:
    parts = [digits(blocks[:, :32], 5), digits(blocks[:, 32:48], 5), digits(blocks[:, 48:52], 4)]
    t = np.concatenate([part.reshape(len(blocks), -1) for part in parts], axis=-1).astype(np.int8) - np.int8(1)
    return read_f16(blocks, 52) * t.astype(np.float32)


def pack_digits(t: U8Array) -> U8Array:
    """The reverse of digits: 0..2 [..., count, n] -> bytes [..., n], rounded up to the next fraction of 256."""
    count = t.shape[-2]
    number = (t * np.array([3 ** (4 - n) for n in range(count)], np.uint16)[:, None]).sum(axis=-2)
    return ((number * 256 + 242) // 243).astype(np.uint8)


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 256] -> uint8 [n, 54]. Seeks d that makes the sum of importance * (x - w)^2 least."""
    found = fit(SEARCH, values, importance)
    parts = [found.codes[:, :160].reshape(-1, 5, 32), found.codes[:, 160:240].reshape(-1, 5, 16)]
    parts.append(found.codes[:, 240:].reshape(-1, 4, 4))
    return np.concatenate([*map(pack_digits, parts), write_f16(found.scale)], axis=-1)
