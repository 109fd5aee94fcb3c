"""Q8_0: 32 weights in 34 bytes, 8.5 bits per weight.

    byte  0   2                                34
          | d | qs                             |
          f16   32 signed bytes, in order

    w[j] = d * q[j]              q in -127..127

Nearly lossless, and with nothing to unpack. Small blocks keep one outlier from coarsening more than 31 neighbours.
"""

import numpy as np

from qrun.formats.blocks.fitting import Effort, Search, Steps, fit, spaced
from qrun.formats.blocks.layout import F32Array, U8Array, read_f16, write_f16


def dequantize(blocks: U8Array) -> F32Array:
    return read_f16(blocks, 0) * blocks[:, 2:].view(np.int8).astype(np.float32)


# Which scale puts all 32 weights near whole numbers is a matter of chance: a few tries are better than one. Many more
# would take off another tenth of an error that is next to nothing, and most of the time would go into them.
SEARCH = Search(1, 32, Steps(-127, 127), False, Effort(spaced(127.5, 120, 4), 0))


def quantize(values: F32Array, importance: F32Array | None = None) -> U8Array:
    """[n, 32] -> uint8 [n, 34]. Seeks d that makes the sum of importance * (x - d * q)^2 least."""
    found = fit(SEARCH, values, importance)
    q = (found.codes.astype(np.int16) - 127).astype(np.int8)
    return np.concatenate([write_f16(found.scale), q.view(np.uint8)], axis=-1)


def round_to_nearest(values: F32Array) -> U8Array:
    """[n, 32] -> uint8 [n, 34]. The scale is what the largest weight asks for: as most engines make these blocks."""
    scale = np.abs(values).max(axis=-1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        scaled = values * np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    whole = np.floor(np.abs(scaled))
    q = np.sign(scaled) * (whole + np.floor(2 * (np.abs(scaled) - whole)))  # halves go away from zero
    return np.concatenate([write_f16(scale[:, 0]), q.astype(np.int8).view(np.uint8)], axis=-1)
