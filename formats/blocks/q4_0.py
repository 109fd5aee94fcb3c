"""Q4_0: 32 weights in 18 bytes, 4.5 bits per weight.

    byte  0   2                                18
          | d | qs                             |
          f16   16 bytes: byte j holds weight j in its low half and weight j + 16 in its high half

    w[j] = d * (q[j] - 8)        q in 0..15

The simplest of all: one scale, symmetric about zero. The step of -8 without a +8 is why the quantiser picks the sign
of d so that the largest weight lands on -8. Halves j and j + 16 share a byte, not j and j + 1, so that one mask and
one shift of a 16-byte register give two runs of neighbours.
"""

import numpy as np

from qrun.formats.blocks.fitting import Effort, Search, Steps, fit, spaced
from qrun.formats.blocks.layout import F32Array, U8Array, bit_fields, pack_fields, read_f16, write_f16


def dequantize(blocks: U8Array) -> F32Array:
    q = bit_fields(blocks[:, 2:], 4).reshape(-1, 32).astype(np.int8) - np.int8(8)
    return read_f16(blocks, 0) * q.astype(np.float32)


# The largest weight is put at or beyond -8, the end that is one further out, or at the other.
SEARCH = Search(
    1, 32, Steps(-8, 7), False, Effort(spaced(-9.6, -6.4, 17) + spaced(8.6, 5.6, 16), 2),
    quick=Effort(spaced(-9.2, -6.8, 4), 1),
)  # fmt: skip


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 32] -> uint8 [n, 18]. Seeks d that makes the sum of importance * (x - d * (q - 8))^2 least."""
    found = fit(SEARCH, values, importance)
    return np.concatenate([write_f16(found.scale), pack_fields(found.codes.reshape(-1, 2, 16), 4)], axis=-1)
