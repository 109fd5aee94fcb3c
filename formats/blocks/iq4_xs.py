"""IQ4_XS: 256 weights in 136 bytes, 4.25 bits per weight.

    byte  0   2          4          8                                136
          | d | scales_h | scales_l | qs                             |
          f16   |          |          128 bytes, 4 bits a weight
                |          4 bytes: the low 4 bits of the scales, two a byte, the even sub-block in the low half
                uint16: the high 2 bits of the scales, sub-block i in bits 2i and 2i + 1

    w[i, j] = (d * (scale[i] - 32)) * LEVELS[q[i, j]]    8 sub-blocks i of 32 weights j, scale in 0..63, q in 0..15

          qs[16i : 16i + 16]   sub-block i: weight j in the low half of byte j, weight j + 16 in the high half

The uneven levels of IQ4_NL with the two-level scales of the K formats: 6 bits a sub-block instead of 16.
"""

import numpy as np

from qrun.formats.blocks.fitting import Effort, Search, Table, fit
from qrun.formats.blocks.iq4_nl import LEVELS, STARTS
from qrun.formats.blocks.layout import F32Array, U8Array, bit_fields, pack_fields, read_f16, write_f16


def dequantize(blocks: U8Array) -> F32Array:
    n_blocks = len(blocks)
    # Scales run along a byte first, weights across bytes: hence the swaps.
    high = bit_fields(blocks[:, 2:4], 2).swapaxes(-1, -2).reshape(n_blocks, 8)
    low = bit_fields(blocks[:, 4:8], 4).swapaxes(-1, -2).reshape(n_blocks, 8)
    scale = (low | high << np.uint8(4)).astype(np.int8) - np.int8(32)
    d = (read_f16(blocks, 0) * scale.astype(np.float32))[..., None]
    levels = LEVELS[bit_fields(blocks[:, 8:].reshape(n_blocks, 8, 16), 4)].reshape(n_blocks, 8, 32)
    return (d * levels.astype(np.float32)).reshape(n_blocks, 256)


SEARCH = Search(8, 32, Table(tuple(LEVELS.tolist())), False, Effort(STARTS, 1), -32, 31, 2)


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 256] -> uint8 [n, 136]. Seeks d and scales that make the sum of importance * (x - w)^2 least."""
    found = fit(SEARCH, values, importance)
    scales = (found.scales + 32).astype(np.uint8)
    high = pack_fields((scales >> 4).reshape(-1, 2, 4).swapaxes(-1, -2), 2)
    low = pack_fields((scales & 15).reshape(-1, 4, 2).swapaxes(-1, -2), 4)
    quants = pack_fields(found.codes.reshape(-1, 8, 2, 16), 4).reshape(-1, 128)
    return np.concatenate([write_f16(found.scale), high, low, quants], axis=-1)
