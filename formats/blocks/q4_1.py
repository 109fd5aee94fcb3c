"""Q4_1: 32 weights in 20 bytes, 5 bits per weight.

    byte  0   2   4                                20
          | d | m | qs                             |
          f16 f16   16 bytes: byte j holds weight j in its low half and weight j + 16 in its high half

    w[j] = d * q[j] + m          q in 0..15

Q4_0 with a minimum of its own: the sixteen levels are spread from the smallest weight of the block to the largest,
wherever zero lies. That costs two bytes more. Note that m is added; the K formats store it negated and subtract.
"""

import numpy as np

from qrun.formats.blocks.fitting import Effort, Search, Steps, fit, spaced
from qrun.formats.blocks.layout import F32Array, U8Array, bit_fields, pack_fields, read_f16, write_f16


def dequantize(blocks: U8Array) -> F32Array:
    q = bit_fields(blocks[:, 4:], 4).reshape(-1, 32)
    return read_f16(blocks, 0) * q.astype(np.float32) + read_f16(blocks, 2)


SEARCH = Search(
    1, 32, Steps(0, 15), True, Effort(spaced(13, 18, 12), 2, (-0.5, 0.0, 0.5)), quick=Effort((15,), 1, (0.0, 0.5))
)


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 32] -> uint8 [n, 20]. Seeks d and m that make the sum of importance * (x - d * q - m)^2 least."""
    found = fit(SEARCH, values, importance)
    header = [write_f16(found.scale), write_f16(0 - found.minimum)]
    return np.concatenate([*header, pack_fields(found.codes.reshape(-1, 2, 16), 4)], axis=-1)
