"""IQ1_M: 256 weights in 56 bytes, 1.75 bits per weight.

    byte  0                                32               48       56
          | qs                             | qh             | scales |
          32 bytes: the low 8 bits of      16 bytes         4 little-endian uint16
          each index

          qh[2i + k]   bit 7 shift of group 2k + 1 | 6-4 high bits of its index
                           3 shift of group 2k     | 2-0 high bits of its index

          scales[m]    bits 15-12: four bits of d | 11-9 scale 4m + 3 | 8-6 4m + 2 | 5-3 4m + 1 | 2-0 scale 4m
                       d, a half-precision number: scales[0] has its lowest four bits, scales[3] its highest

    w[i, 8g + j] = (d * (2 * scale[2i + g // 2] + 1)) * (GRID[index[i, g]][j] + delta[i, g])
                                                                                           8 sub-blocks i of 32 weights
          index and delta as in IQ1_S: 2,048 groups of eight, and -1/8 where shift is set, else 1/8

IQ1_S with a scale for each 16 weights and a shift for each eight. The four top bits of the scales' words were free, and
together hold d, so there is no other place for it.
"""

import numpy as np

from qrun.formats.blocks.fitting import Effort, Groups, Search
from qrun.formats.blocks.grid_fitting import SHIFT as DELTA
from qrun.formats.blocks.grid_fitting import fit_groups
from qrun.formats.blocks.grids import grid
from qrun.formats.blocks.iq1_s import STARTS
from qrun.formats.blocks.layout import F32Array, U8Array, bit_fields, pack_fields


def dequantize(blocks: U8Array) -> F32Array:
    n_blocks = len(blocks)
    words = np.ascontiguousarray(blocks[:, 48:]).view("<u2")
    d_bits = np.bitwise_or.reduce(words >> 12 << np.arange(0, 16, 4, dtype=np.uint16), axis=-1)
    scale = words[..., None] >> np.arange(0, 12, 3, dtype=np.uint16) & 7
    d = d_bits.view(np.float16).astype(np.float32)[:, None] * (2 * scale + 1).reshape(n_blocks, 16).astype(np.float32)
    fields = bit_fields(blocks[:, 32:48], 4).swapaxes(-1, -2).reshape(n_blocks, 32)
    levels = grid("IQ1_S")[blocks[:, :32] | (fields & 7).astype(np.uint16) << 8].astype(np.float32)
    shifted = levels + np.where(fields & 8, -DELTA, DELTA)[..., None]
    return (d[..., None] * shifted.reshape(n_blocks, 16, 16)).reshape(n_blocks, 256)


SEARCH = Search(16, 16, Groups("IQ1_S", 8, -1, 1, 3, shifted=8), False, Effort(STARTS, 1), 1, 15, 1)


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 256] -> uint8 [n, 56]. Seeks d, scales, groups and shifts: least sum of importance * (x - w)^2."""
    found = fit_groups(SEARCH, values, importance)
    fields = found.indices >> 8 | found.shifted.astype(np.int32) << 3
    qh = pack_fields(fields.reshape(-1, 16, 2, 1), 4).reshape(-1, 16)
    scales = found.scales.astype(np.uint16).reshape(-1, 4, 4) << np.arange(0, 12, 3, dtype=np.uint16)
    d = found.scale.astype(np.float16).view(np.uint16)[:, None] >> np.arange(0, 16, 4, dtype=np.uint16) & 15
    words = np.bitwise_or.reduce(scales, axis=-1) | d << 12
    return np.concatenate([found.indices.astype(np.uint8), qh, words.astype("<u2").view(np.uint8)], axis=-1)
