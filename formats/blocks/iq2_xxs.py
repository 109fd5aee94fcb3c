"""IQ2_XXS: 256 weights in 66 bytes, 2.0625 bits per weight.

    byte  0   2                                                66
          | d | 8 sub-blocks of 8 bytes                        |
          f16

          sub-block i   byte  0 1 2 3    index 0-3: which of 256 groups of eight magnitudes, each 8, 25 or 43
                              4 5 6 7    a little-endian uint32:
                                         bits 31-28 scale | 27-21 signs 3 | 20-14 signs 2 | 13-7 signs 1 | 6-0 signs 0

    w[i, 8g + j] = (d * (scale[i] + 0.5) / 4) * GRID[index[i, g]][j] * sign[i, g, j]       8 sub-blocks i of 32 weights

The quantiser keeps the number of minus signs in each eight even (it turns the least important one where it is not), so
seven bits are enough for eight signs. With an index of eight bits that makes 15 bits for eight weights.
"""

import numpy as np
from numpy.typing import NDArray

from qrun.formats.blocks.fitting import Effort, Groups, Search, spaced
from qrun.formats.blocks.grid_fitting import fit_groups
from qrun.formats.blocks.grids import even_signs, grid
from qrun.formats.blocks.layout import F32Array, U8Array, read_f16, write_f16


def dequantize(blocks: U8Array) -> F32Array:
    n_blocks = len(blocks)
    parts = blocks[:, 2:].reshape(n_blocks, 8, 8)
    word = np.ascontiguousarray(parts[..., 4:]).view("<u4")  # [n_blocks, 8, 1]
    d = read_f16(blocks, 0)[..., None] * (np.float32(0.5) + (word >> 28).astype(np.float32)) * np.float32(0.25)
    magnitudes = grid("IQ2_XXS")[parts[..., :4]].reshape(n_blocks, 8, 32)
    sign = even_signs(word >> np.arange(0, 28, 7, dtype=np.uint32))
    return (d * (magnitudes * sign).astype(np.float32)).reshape(n_blocks, 256)


# The largest weight is put on the highest level, or somewhat above or below; and on the lowest, if all are of one size.
STARTS = (8, *spaced(0.6 * 43, 1.2 * 43, 8))
SEARCH = Search(8, 32, Groups("IQ2_XXS", 8, 8, 17.5, 3, 1 / 8, "even"), False, Effort(STARTS, 1), 1, 31, 1)


def pack_signs(sign_bytes: U8Array, scales: NDArray[np.int32]) -> U8Array:
    """Seven of each eight signs, and the scales, in a uint32 for each sub-block: [n, 32], [n, 8] -> uint8 [n, 8, 4]."""
    signs = (sign_bytes & 127).astype(np.uint32).reshape(-1, 8, 4)
    word = np.bitwise_or.reduce(signs << np.arange(0, 28, 7, dtype=np.uint32), axis=-1)
    return (word | scales.astype(np.uint32) << 28).astype("<u4")[..., None].view(np.uint8)


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 256] -> uint8 [n, 66]. Seeks d, scales and groups that make the sum of importance * (x - w)^2 least."""
    found = fit_groups(SEARCH, values, importance)
    indices = found.indices.astype(np.uint8).reshape(-1, 8, 4)
    words = pack_signs(found.sign_bytes, found.scales)
    return np.concatenate([write_f16(found.scale), np.concatenate([indices, words], axis=-1).reshape(-1, 64)], axis=-1)
