"""Q4_K: 256 weights in 144 bytes, 4.5 bits per weight.

    byte  0   2      4        16                                144
          | d | dmin | scales | qs                              |
          f16   f16    |        128 bytes, 4 bits a weight
                       12 bytes: 8 scales and 8 minimums of 6 bits

    w[i, j] = (d * scale[i]) * q[i, j] - (dmin * minimum[i])        8 sub-blocks i of 32 weights j, q in 0..15

          qs[32k : 32k + 32]   low halves: sub-block 2k    high halves: sub-block 2k + 1

          scales   bit   7 6   5 4 3 2 1 0
          byte  0-3    | S4-7 | scale 0-3   |      S, M: the top two bits of scales 4-7, of minimums 4-7
          byte  4-7    | M4-7 | minimum 0-3 |
          byte  8-11   | minimum 4-7 | scale 4-7 |   their low four bits, a half byte each

As many bits as Q4_0, and better: with 6-bit scales and minimums under one half-precision pair for all 256 weights,
each 32 have a minimum at the price at which Q4_0 has a scale alone. Four of the twelve bytes of `scales` are read at
a time, so that three 32-bit words, a few shifts and a few masks give all sixteen numbers.
"""

import numpy as np
from numpy.typing import NDArray

from qrun.formats.blocks.fitting import Effort, Search, Steps, fit, spaced
from qrun.formats.blocks.layout import F32Array, U8Array, bit_fields, pack_fields, read_f16, write_f16


def unpack_scales(packed: U8Array) -> tuple[U8Array, U8Array]:
    """The scales and minimums of each block: [n_blocks, 12] -> two of [n_blocks, 8], 0..63. Q5_K has the same."""
    first, second, last = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, last & 15 | first >> 2 & 48], axis=-1)
    minimums = np.concatenate([second & 63, last >> 4 | second >> 2 & 48], axis=-1)
    return scales, minimums


def dequantize(blocks: U8Array) -> F32Array:
    n_blocks = len(blocks)
    scale, minimum = unpack_scales(blocks[:, 4:16])
    d = (read_f16(blocks, 0) * scale.astype(np.float32))[..., None]
    m = (read_f16(blocks, 2) * minimum.astype(np.float32))[..., None]
    q = bit_fields(blocks[:, 16:].reshape(n_blocks, 4, 32), 4).reshape(n_blocks, 8, 32)
    return (d * q.astype(np.float32) - m).reshape(n_blocks, 256)


SEARCH = Search(8, 32, Steps(0, 15), True, Effort(spaced(13, 17, 9), 2, (-0.75, -0.25, 0.25, 0.75)), 0, 63, 2)


def pack_scales(scales: NDArray[np.int32], minimums: NDArray[np.int32]) -> U8Array:
    """The reverse of unpack_scales: two of [n, 8], 0..63 -> uint8 [n, 12]."""
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = minimums[:, :4] | minimums[:, 4:] >> 4 << 6
    last = scales[:, 4:] & 15 | (minimums[:, 4:] & 15) << 4
    return np.concatenate([first, second, last], axis=-1).astype(np.uint8)


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 256] -> uint8 [n, 144]. Seeks d, dmin, scales and minimums: least sum of importance * (x - w)^2."""
    found = fit(SEARCH, values, importance)
    header = [write_f16(found.scale), write_f16(found.minimum), pack_scales(found.scales, found.minimums)]
    return np.concatenate([*header, pack_fields(found.codes.reshape(-1, 4, 2, 32), 4).reshape(-1, 128)], axis=-1)
