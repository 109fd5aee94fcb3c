"""Q8_K: 256 weights in 292 bytes, 9.125 bits per weight.

    byte  0   4                               260             292
          | d | qs                            | bsums         |
          f32   256 signed bytes, in order      16 int16: the sum of each 16 of them

    w[j] = d * q[j]              q in -127..127

Made for activations, as the other side of a product with a K format, and hardly ever stored. There a minimum is
subtracted from each 16 or 32 weights, so its share of the product is the minimum times the sum of the activations:
`bsums` holds those sums ready. The weights themselves do not depend on them.
"""

import numpy as np

from qrun.formats.blocks.layout import F32Array, U8Array


def dequantize(blocks: U8Array) -> F32Array:
    return blocks[:, :4].view(np.float32) * blocks[:, 4:260].view(np.int8).astype(np.float32)
