"""IQ3_XXS: 256 weights in 98 bytes, 3.0625 bits per weight.

    byte  0   2                                       66                       98
          | d | qs                                    | 8 little-endian uint32 |
          f16   64 bytes: indices                     sub-block i, bits 31-28 scale | 27-21 signs 3 | 20-14 signs 2
                                                                    | 13-7 signs 1 | 6-0 signs 0

    w[i, 4g + j] = (d * (scale[i] + 0.5) / 2) * GRID[qs[8i + g]][j] * sign[i, 4g + j]      8 sub-blocks i of 32 weights

IQ2_XXS with groups of four instead of eight: 256 of them, of magnitudes 4, 12, 20, 28, 36, 44, 52 and 62. The signs of
eight weights take seven bits, as there.
"""

import numpy as np

from qrun.formats.blocks.fitting import Effort, Groups, Search, spaced
from qrun.formats.blocks.grid_fitting import fit_groups
from qrun.formats.blocks.grids import even_signs, grid
from qrun.formats.blocks.iq2_xxs import pack_signs
from qrun.formats.blocks.layout import F32Array, U8Array, read_f16, write_f16


def dequantize(blocks: U8Array) -> F32Array:
    n_blocks = len(blocks)
    word = np.ascontiguousarray(blocks[:, 66:]).view("<u4")[..., None]  # [n_blocks, 8, 1]
    d = read_f16(blocks, 0)[..., None] * (np.float32(0.5) + (word >> 28).astype(np.float32)) * np.float32(0.5)
    magnitudes = grid("IQ3_XXS")[blocks[:, 2:66]].reshape(n_blocks, 8, 32)
    sign = even_signs(word >> np.arange(0, 28, 7, dtype=np.uint32))
    return (d * (magnitudes * sign).astype(np.float32)).reshape(n_blocks, 256)


STARTS = (4, *spaced(0.6 * 62, 1.2 * 62, 8))
SEARCH = Search(8, 32, Groups("IQ3_XXS", 4, 4, 8, 8, 1 / 4, "even"), False, Effort(STARTS, 1), 1, 31, 1)


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 256] -> uint8 [n, 98]. Seeks d, scales and groups that make the sum of importance * (x - w)^2 least."""
    found = fit_groups(SEARCH, values, importance)
    words = pack_signs(found.sign_bytes, found.scales).reshape(-1, 32)
    return np.concatenate([write_f16(found.scale), found.indices.astype(np.uint8), words], axis=-1)
