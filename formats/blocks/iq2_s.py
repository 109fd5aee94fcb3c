"""IQ2_S: 256 weights in 82 bytes, 2.5625 bits per weight.

    byte  0   2                34               66   74       82
          | d | qs             | signs          | qh | scales |
          f16   32 bytes: the    32 bytes: bit    |    8 bytes, as in IQ2_XS
                low 8 bits of    j of byte 4i     8 bytes: the high 2 bits of the indices of sub-block i,
                each index       + g is set for   index g in bits 2g and 2g + 1
                                 minus

    w[i, 8g + j] = (d * (scale[i, g // 2] + 0.5) / 4) * GRID[index[i, g]][j] * sign[i, g, j]
                   8 sub-blocks i of 32 weights; index[i, g] = qs[4i + g] | high << 8: one of 1,024 groups of eight

All eight signs are stored here, so that no weight has to take a wrong one.
"""

import numpy as np

from qrun.formats.blocks.fitting import Effort, Groups, Search
from qrun.formats.blocks.grid_fitting import fit_groups
from qrun.formats.blocks.grids import grid, signs
from qrun.formats.blocks.iq2_xs import half_scales, pack_scales
from qrun.formats.blocks.iq2_xxs import STARTS
from qrun.formats.blocks.layout import F32Array, U8Array, bit_fields, pack_fields, read_f16, write_f16


def dequantize(blocks: U8Array) -> F32Array:
    n_blocks = len(blocks)
    high = bit_fields(blocks[:, 66:74], 2).swapaxes(-1, -2).reshape(n_blocks, 32)
    index = blocks[:, 2:34] | high.astype(np.uint16) << 8
    d = read_f16(blocks, 0) * half_scales(blocks[:, 74:])
    weights = grid("IQ2_S")[index].reshape(n_blocks, 256) * signs(blocks[:, 34:66])
    return (d[..., None] * weights.reshape(n_blocks, 16, 16).astype(np.float32)).reshape(n_blocks, 256)


SEARCH = Search(16, 16, Groups("IQ2_S", 8, 8, 17.5, 3, 1 / 8, "free"), False, Effort(STARTS, 1), 1, 31, 1)


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 256] -> uint8 [n, 82]. Seeks d, scales and groups that make the sum of importance * (x - w)^2 least."""
    found = fit_groups(SEARCH, values, importance)
    low = found.indices.astype(np.uint8)
    high = pack_fields((found.indices >> 8).reshape(-1, 8, 4, 1), 2).reshape(-1, 8)
    parts = [write_f16(found.scale), low, found.sign_bytes, high, pack_scales(found.scales)]
    return np.concatenate(parts, axis=-1)
