"""Block formats: one file per format, each with its layout drawn at the top."""

from math import prod

import numpy as np

from qrun.formats.blocks import (
    floats,
    iq1_m,
    iq1_s,
    iq2_s,
    iq2_xs,
    iq2_xxs,
    iq3_s,
    iq3_xxs,
    iq4_nl,
    iq4_xs,
    mxfp4,
    nvfp4,
    q1_0,
    q2_0,
    q2_k,
    q3_k,
    q4_0,
    q4_1,
    q4_k,
    q5_0,
    q5_1,
    q5_k,
    q6_k,
    q8_0,
    q8_k,
    tq1_0,
    tq2_0,
)
from qrun.formats.blocks.fitting import Search, by_size
from qrun.formats.blocks.layout import BLOCK_SIZES, BlockFormat, Decoder, Encoder, F32Array, TensorType, U8Array

__all__ = ["BLOCK_FORMATS", "BLOCK_SIZES", "SEARCHES", "BlockFormat", "TensorType", "dequantize", "quantize"]

_CODECS: dict[TensorType, tuple[Decoder, Encoder | None]] = {
    TensorType.F32: (floats.dequantize_f32, floats.quantize_f32),
    TensorType.F16: (floats.dequantize_f16, floats.quantize_f16),
    TensorType.BF16: (floats.dequantize_bf16, floats.quantize_bf16),
    TensorType.Q4_0: (q4_0.dequantize, q4_0.quantize),
    TensorType.Q4_1: (q4_1.dequantize, q4_1.quantize),
    TensorType.Q5_0: (q5_0.dequantize, q5_0.quantize),
    TensorType.Q5_1: (q5_1.dequantize, q5_1.quantize),
    TensorType.Q8_0: (q8_0.dequantize, q8_0.quantize),
    TensorType.Q2_K: (q2_k.dequantize, q2_k.quantize),
    TensorType.Q3_K: (q3_k.dequantize, q3_k.quantize),
    TensorType.Q4_K: (q4_k.dequantize, q4_k.quantize),
    TensorType.Q5_K: (q5_k.dequantize, q5_k.quantize),
    TensorType.Q6_K: (q6_k.dequantize, q6_k.quantize),
    TensorType.Q8_K: (q8_k.dequantize, None),
    TensorType.IQ1_S: (iq1_s.dequantize, iq1_s.quantize),
    TensorType.IQ1_M: (iq1_m.dequantize, iq1_m.quantize),
    TensorType.IQ2_XXS: (iq2_xxs.dequantize, iq2_xxs.quantize),
    TensorType.IQ2_XS: (iq2_xs.dequantize, iq2_xs.quantize),
    TensorType.IQ2_S: (iq2_s.dequantize, iq2_s.quantize),
    TensorType.IQ3_XXS: (iq3_xxs.dequantize, iq3_xxs.quantize),
    TensorType.IQ3_S: (iq3_s.dequantize, iq3_s.quantize),
    TensorType.IQ4_NL: (iq4_nl.dequantize, iq4_nl.quantize),
    TensorType.IQ4_XS: (iq4_xs.dequantize, iq4_xs.quantize),
    TensorType.MXFP4: (mxfp4.dequantize, mxfp4.quantize),
    TensorType.NVFP4: (nvfp4.dequantize, nvfp4.quantize),
    TensorType.Q1_0: (q1_0.dequantize, q1_0.quantize),
    TensorType.Q2_0: (q2_0.dequantize, q2_0.quantize),
    TensorType.TQ1_0: (tq1_0.dequantize, tq1_0.quantize),
    TensorType.TQ2_0: (tq2_0.dequantize, tq2_0.quantize),
}

BLOCK_FORMATS: dict[TensorType, BlockFormat] = {
    type: BlockFormat(type, *BLOCK_SIZES[type], decode, encode)
    for type, (decode, encode) in _CODECS.items()
}

# How the scales of each quantised type are sought.
SEARCHES: dict[TensorType, Search] = {
    TensorType.Q4_0: q4_0.SEARCH,
    TensorType.Q4_1: q4_1.SEARCH,
    TensorType.Q5_0: q5_0.SEARCH,
    TensorType.Q5_1: q5_1.SEARCH,
    TensorType.Q8_0: q8_0.SEARCH,
    TensorType.Q2_K: q2_k.SEARCH,
    TensorType.Q3_K: q3_k.SEARCH,
    TensorType.Q4_K: q4_k.SEARCH,
    TensorType.Q5_K: q5_k.SEARCH,
    TensorType.Q6_K: q6_k.SEARCH,
    TensorType.IQ4_NL: iq4_nl.SEARCH,
    TensorType.IQ4_XS: iq4_xs.SEARCH,
    TensorType.IQ1_S: iq1_s.SEARCH,
    TensorType.IQ1_M: iq1_m.SEARCH,
    TensorType.IQ2_XXS: iq2_xxs.SEARCH,
    TensorType.IQ2_XS: iq2_xs.SEARCH,
    TensorType.IQ2_S: iq2_s.SEARCH,
    TensorType.IQ3_XXS: iq3_xxs.SEARCH,
    TensorType.IQ3_S: iq3_s.SEARCH,
    TensorType.Q1_0: q1_0.SEARCH,
    TensorType.Q2_0: q2_0.SEARCH,
    TensorType.TQ1_0: tq1_0.SEARCH,
    TensorType.TQ2_0: tq2_0.SEARCH,
    TensorType.NVFP4: nvfp4.SEARCH,
    TensorType.MXFP4: mxfp4.SEARCH,
}

# With importance, those in which errors of large weights are to count for more (`fitting.by_size`). In others it gains
# nothing, or loses.
LARGE_FIRST = frozenset({TensorType.Q2_K, TensorType.Q3_K, TensorType.IQ4_NL, TensorType.IQ4_XS})

# Weights decoded in one go: few enough that what a decoder holds in between stays in the cache of a core.
CHUNK = 1 << 16


def dequantize(raw: U8Array, type: TensorType, shape: tuple[int, ...]) -> F32Array:
    """Decode the bytes of a tensor.

    raw: uint8 [n_bytes], contiguous, as in the file. shape: of the weights, rows of whole blocks.
    Returns float32 of that shape. Raises ValueError if the type cannot be decoded or the sizes do not fit together.
    """
    block_format = BLOCK_FORMATS.get(type)
    if block_format is None:
        raise ValueError(f"tensors of type {type.name} cannot be decoded")
    if raw.size * block_format.block_size != prod(shape) * block_format.block_bytes:
        raise ValueError(f"{raw.size} bytes of {type.name} do not hold the {prod(shape)} weights of {shape}")
    blocks = raw.reshape(-1, block_format.block_bytes)
    weights = np.empty((len(blocks), block_format.block_size), dtype=np.float32)
    step = CHUNK // block_format.block_size
    # A scale may be infinite or NaN in a damaged file. Then so are the weights; that is no reason for a warning.
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), step):
            weights[start : start + step] = block_format.dequantize(blocks[start : start + step])
    return weights.reshape(shape)


def quantize(
    weights: F32Array, type: TensorType, importance: F32Array | None = None, *, large_first: bool | None = None
) -> U8Array:
    """Encode weights, the slow and plain way; `engine.quantize` gives the same bytes sooner.

    weights: float32 [..., row], rows of whole blocks. importance: float32 [row], how much the error of each matters.
    large_first: with importance, errors of large weights count for more (`fitting.by_size`); by default in types of
    LARGE_FIRST.
    Returns uint8 [n_bytes]. Raises ValueError if the type cannot be encoded or its blocks do not fit the rows.
    """
    block_format = BLOCK_FORMATS.get(type)
    if block_format is None or block_format.quantize is None:
        raise ValueError(f"tensors of type {type.name} cannot be encoded")
    size = block_format.block_size
    if weights.shape[-1] % size:
        raise ValueError(f"rows of {weights.shape[-1]} weights are not whole blocks of {size}, as {type.name} has them")
    blocks = np.ascontiguousarray(weights, np.float32).reshape(-1, size)
    matters = None if importance is None else np.broadcast_to(importance, weights.shape).reshape(-1, size)
    if matters is not None and (type in LARGE_FIRST if large_first is None else large_first):
        matters = by_size(blocks, matters)
    return block_format.quantize(blocks, matters).reshape(-1)
