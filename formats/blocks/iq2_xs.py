"""IQ2_XS: 256 weights in 74 bytes, 2.3125 bits per weight.

    byte  0   2                                       66       74
          | d | qs                                    | scales |
          f16   32 little-endian uint16               8 bytes: byte i holds the scale of the first half of sub-block i
                                                      in its low half, of the second in its high half

          qs[4i + g]   bits 15-9 signs | 8-0 index: which of 512 groups of eight magnitudes, each 8, 25 or 43

    w[i, 8g + j] = (d * (scale[i, g // 2] + 0.5) / 4) * GRID[index[i, g]][j] * sign[i, g, j]
                                                                                           8 sub-blocks i of 32 weights

IQ2_XXS with twice as many groups to choose from and twice as many scales. The signs are packed as there: seven bits.
"""

import numpy as np
from numpy.typing import NDArray

from qrun.formats.blocks.fitting import Effort, Groups, Search
from qrun.formats.blocks.grid_fitting import fit_groups
from qrun.formats.blocks.grids import even_signs, grid
from qrun.formats.blocks.iq2_xxs import STARTS
from qrun.formats.blocks.layout import F32Array, U8Array, bit_fields, pack_fields, read_f16, write_f16


def half_scales(packed: U8Array) -> F32Array:
    """4-bit scales s, two a byte: [n, 8] -> (s + 0.5) / 4 [n, 16]. IQ2_S has the same."""
    scale = bit_fields(packed, 4).swapaxes(-1, -2).reshape(-1, 16)
    return (np.float32(0.5) + scale.astype(np.float32)) * np.float32(0.25)


def dequantize(blocks: U8Array) -> F32Array:
    n_blocks = len(blocks)
    qs = np.ascontiguousarray(blocks[:, 2:66]).view("<u2").astype(np.uint32)
    d = read_f16(blocks, 0) * half_scales(blocks[:, 66:])
    weights = grid("IQ2_XS")[qs & 511].reshape(n_blocks, 256) * even_signs(qs >> 9)
    return (d[..., None] * weights.reshape(n_blocks, 16, 16).astype(np.float32)).reshape(n_blocks, 256)


SEARCH = Search(16, 16, Groups("IQ2_XS", 8, 8, 17.5, 3, 1 / 8, "even"), False, Effort(STARTS, 1), 1, 31, 1)


def pack_scales(scales: NDArray[np.int32]) -> U8Array:
    """4-bit scales, two a byte: [n, m] -> uint8 [n, m / 2]."""
    return pack_fields(scales.reshape(len(scales), -1, 2).swapaxes(-1, -2), 4)


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 256] -> uint8 [n, 74]. Seeks d, scales and groups that make the sum of importance * (x - w)^2 least."""
    found = fit_groups(SEARCH, values, importance)
    qs = (found.indices.astype(np.uint16) | (found.sign_bytes & 127).astype(np.uint16) << 9).astype("<u2")
    return np.concatenate([write_f16(found.scale), qs.view(np.uint8), pack_scales(found.scales)], axis=-1)
