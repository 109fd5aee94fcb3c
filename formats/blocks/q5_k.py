"""Q5_K: 256 weights in 176 bytes, 5.5 bits per weight.

    byte  0   2      4        16   48                               176
          | d | dmin | scales | qh | qs                             |
          f16   f16    |        |    128 bytes: the low 4 bits of each weight
                       |        32 bytes: the fifth bits
                       12 bytes: 8 scales and 8 minimums of 6 bits, packed as in Q4_K

    w[i, j] = (d * scale[i]) * q[i, j] - (dmin * minimum[i])        8 sub-blocks i of 32 weights j
                                                                    q = low | (fifth bit) << 4, in 0..31

          qs[32k : 32k + 32]   low halves: sub-block 2k    high halves: sub-block 2k + 1
          qh                   bit i of byte j belongs to weight j of sub-block i

Q4_K with one bit more. The fifth bits of a sub-block lie in one bit position of the same 32 bytes, in step with the
32 bytes that hold its low bits.
"""

import numpy as np

from qrun.formats.blocks.fitting import Effort, Search, Steps, fit, spaced
from qrun.formats.blocks.layout import F32Array, U8Array, bit_fields, pack_fields, read_f16, write_f16
from qrun.formats.blocks.q4_k import pack_scales, unpack_scales


def dequantize(blocks: U8Array) -> F32Array:
    n_blocks = len(blocks)
    scale, minimum = unpack_scales(blocks[:, 4:16])
    d = (read_f16(blocks, 0) * scale.astype(np.float32))[..., None]
    m = (read_f16(blocks, 2) * minimum.astype(np.float32))[..., None]
    low = bit_fields(blocks[:, 48:].reshape(n_blocks, 4, 32), 4).reshape(n_blocks, 8, 32)
    q = low | bit_fields(blocks[:, 16:48], 1) << np.uint8(4)
    return (d * q.astype(np.float32) - m).reshape(n_blocks, 256)


SEARCH = Search(8, 32, Steps(0, 31), True, Effort(spaced(28, 35, 15), 2, (-0.5, 0.0, 0.5)), 0, 63, 2)


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 256] -> uint8 [n, 176]. Seeks d, dmin, scales and minimums: least sum of importance * (x - w)^2."""
    found = fit(SEARCH, values, importance)
    header = [write_f16(found.scale), write_f16(found.minimum), pack_scales(found.scales, found.minimums)]
    fifth = pack_fields((found.codes >> 4).reshape(-1, 8, 32), 1)
    low = pack_fields((found.codes & 15).reshape(-1, 4, 2, 32), 4).reshape(-1, 128)
    return np.concatenate([*header, fifth, low], axis=-1)
