"""Q5_0: 32 weights in 22 bytes, 5.5 bits per weight.

    byte  0   2    6                                22
          | d | qh | qs                             |
          f16  |     16 bytes: the low 4 bits; byte j holds those of weight j and, above them, of weight j + 16
               4 bytes, a little-endian uint32: bit j is the fifth bit of weight j

    w[j] = d * (q[j] - 16)       q[j] = low[j] | high[j] << 4, in 0..31

Q4_0 with one bit more. Five does not divide eight, so the fifth bits are kept in a word of their own and the rest
unpacks just as Q4_0 does.
"""

import numpy as np

from qrun.formats.blocks.fitting import Effort, Search, Steps, fit, spaced
from qrun.formats.blocks.layout import F32Array, U8Array, bit_fields, pack_fields, read_f16, write_f16


def unpack(qh: U8Array, qs: U8Array) -> U8Array:
    """Join the fifth bits [n, 4] to the low four [n, 16]: 0..31 [n, 32]. Q5_1 packs its weights the same way."""
    high = np.unpackbits(qh, axis=-1, bitorder="little")
    return bit_fields(qs, 4).reshape(-1, 32) | high << np.uint8(4)


def dequantize(blocks: U8Array) -> F32Array:
    q = unpack(blocks[:, 2:6], blocks[:, 6:]).astype(np.int8) - np.int8(16)
    return read_f16(blocks, 0) * q.astype(np.float32)


SEARCH = Search(
    1, 32, Steps(-16, 15), False, Effort(spaced(-18.5, -13, 24) + spaced(17.5, 12, 24), 2),
    quick=Effort(spaced(-17.8, -14, 5), 0),
)  # fmt: skip


def pack(codes: U8Array) -> tuple[U8Array, U8Array]:
    """The reverse of unpack: 0..31 [n, 32] -> the fifth bits [n, 4], the low four [n, 16]."""
    return np.packbits(codes >> 4, axis=-1, bitorder="little"), pack_fields((codes & 15).reshape(-1, 2, 16), 4)


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 32] -> uint8 [n, 22]. Seeks d that makes the sum of importance * (x - d * (q - 16))^2 least."""
    found = fit(SEARCH, values, importance)
    return np.concatenate([write_f16(found.scale), *pack(found.codes)], axis=-1)
