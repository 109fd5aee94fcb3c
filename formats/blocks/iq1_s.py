"""IQ1_S: 256 weights in 50 bytes, 1.5625 bits per weight.

    byte  0   2                                34                 50
          | d | qs                             | qh               |
          f16   32 bytes: the low 8 bits of    8 little-endian uint16
                each index

          qh[i]   bit 15 shift | 14-12 scale | 11-9, 8-6, 5-3, 2-0 the high three bits of index 3, 2, 1, 0

    w[i, 8g + j] = (d * (2 * scale[i] + 1)) * (GRID[index[i, g]][j] + delta)               8 sub-blocks i of 32 weights
                   index[i, g] = qs[4i + g] | high << 8: one of 2,048 groups of eight of -1, 0 and 1
                   delta = -1/8 where shift is set, else 1/8

Eight ternary weights have 6,561 combinations; 2,048 of them take 11 bits. There are no signs beside the groups; instead
the three levels of a sub-block are moved a little to one side, whichever fits better.
"""

import numpy as np

from qrun.formats.blocks.fitting import Effort, Groups, Search
from qrun.formats.blocks.grid_fitting import SHIFT as DELTA
from qrun.formats.blocks.grid_fitting import fit_groups
from qrun.formats.blocks.grids import grid
from qrun.formats.blocks.layout import F32Array, U8Array, read_f16, write_f16


def dequantize(blocks: U8Array) -> F32Array:
    n_blocks = len(blocks)
    qh = np.ascontiguousarray(blocks[:, 34:]).view("<u2")[..., None]  # [n_blocks, 8, 1]
    d = read_f16(blocks, 0)[..., None] * (2 * (qh >> 12 & 7) + 1).astype(np.float32)
    high = qh >> np.arange(0, 12, 3, dtype=np.uint16) & 7
    levels = grid("IQ1_S")[blocks[:, 2:34].reshape(n_blocks, 8, 4) | high << 8].reshape(n_blocks, 8, 32)
    delta = np.where(qh >> 15, -DELTA, DELTA)
    return (d * (levels.astype(np.float32) + delta)).reshape(n_blocks, 256)


# The largest weight lies somewhat beyond the highest level, or more than twice as far out, and few of the others at 0.
STARTS = (1.2, 1.56, 2.03, 2.64)
SEARCH = Search(8, 32, Groups("IQ1_S", 8, -1, 1, 3, shifted=32), False, Effort(STARTS, 1), 1, 15, 1)


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 256] -> uint8 [n, 50]. Seeks d, scales, groups and shifts: least sum of importance * (x - w)^2."""
    found = fit_groups(SEARCH, values, importance)
    high = (found.indices >> 8).astype(np.uint16).reshape(-1, 8, 4)
    qh = np.bitwise_or.reduce(high << np.arange(0, 12, 3, dtype=np.uint16), axis=-1)
    shifted = found.shifted.reshape(-1, 8, 4)[..., 0].astype(np.uint16)
    qh |= found.scales.astype(np.uint16) << 12 | shifted << 15
    return np.concatenate([write_f16(found.scale), found.indices.astype(np.uint8), qh.astype("<u2").view(np.uint8)], -1)
