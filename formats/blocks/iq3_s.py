"""IQ3_S: 256 weights in 110 bytes, 3.4375 bits per weight.

    byte  0   2                        66   74               106      110
          | d | qs                     | qh | signs          | scales |
          f16   64 bytes: the low 8    |    32 bytes: bit j    4 bytes of two scales, the even sub-block's in the low
                bits of each index     |    of byte 4i + k     half
                                       |    is that of weight 8k + j, set for minus
                                       8 bytes: bit g of byte i is the ninth bit of index g of sub-block i

    w[i, 4g + j] = (d * (2 * scale[i] + 1)) * GRID[index[i, g]][j] * sign[i, 4g + j]       8 sub-blocks i of 32 weights
                   index[i, g] = qs[8i + g] | (ninth bit) << 8: one of 512 groups of four magnitudes 1, 3, 5 to 15

As many bits as Q3_K, which has weights one by one on evenly spaced levels. Groups hold the combinations that models
have, so the error is smaller; all signs are stored.
"""

import numpy as np

from qrun.formats.blocks.fitting import Effort, Groups, Search, spaced
from qrun.formats.blocks.grid_fitting import fit_groups
from qrun.formats.blocks.grids import grid, signs
from qrun.formats.blocks.iq2_xs import pack_scales
from qrun.formats.blocks.layout import F32Array, U8Array, bit_fields, read_f16, write_f16


def dequantize(blocks: U8Array) -> F32Array:
    n_blocks = len(blocks)
    ninth = np.unpackbits(blocks[:, 66:74], axis=-1, bitorder="little")
    index = blocks[:, 2:66] | ninth.astype(np.uint16) << 8
    scale = bit_fields(blocks[:, 106:], 4).swapaxes(-1, -2).reshape(n_blocks, 8)
    d = read_f16(blocks, 0) * (2 * scale + 1).astype(np.float32)
    weights = grid("IQ3_S")[index].reshape(n_blocks, 256) * signs(blocks[:, 74:106])
    return (d[..., None] * weights.reshape(n_blocks, 8, 32).astype(np.float32)).reshape(n_blocks, 256)


STARTS = (1, *spaced(0.6 * 15, 1.2 * 15, 8))
SEARCH = Search(8, 32, Groups("IQ3_S", 4, 1, 2, 8, 1, "free"), False, Effort(STARTS, 1), 1, 31, 1)


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 256] -> uint8 [n, 110]. Seeks d, scales and groups that make the sum of importance * (x - w)^2 least."""
    found = fit_groups(SEARCH, values, importance)
    low = found.indices.astype(np.uint8)
    ninth = np.packbits(found.indices >> 8, axis=-1, bitorder="little")
    parts = [write_f16(found.scale), low, ninth, found.sign_bytes, pack_scales(found.scales)]
    return np.concatenate(parts, axis=-1)
