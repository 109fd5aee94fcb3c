"""AWQ as AutoAWQ stores it: 4 bits per weight, and a scale and a zero point for each group of inputs and each output.

    "gemm"   qweight  int32 [in, out / 8]          eight outputs in a word, four bits each, from the lowest bits up:
                                                   0, 2, 4, 6, 1, 3, 5, 7
             qzeros   int32 [groups, out / 8]      in the same order
             scales   float [groups, out]

    "gemv"   qweight  int32 [out, in / 8]          eight inputs in a word, in order
             qzeros   int32 [out, words]           groups in order; rows are padded at their end
             scales   float [out, words * 8]

    w[o, i] = scale[g, o] * (q[o, i] - zero[g, o])        g = i // group_size

The order of "gemm" puts even outputs into the low halves of bytes and odd ones into the high halves once a word is
widened to half precision, two outputs at a time. AWQ's own trick, to scale up the inputs that matter before rounding,
leaves no trace here: what is scaled down again is the norm or the layer before.
(Layout: AutoAWQ's `WQLinear_GEMM` and `WQLinear_GEMV`.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qrun.formats.blocks.layout import F32Array, U8Array
from qrun.formats.checkpoints.bits import unpack, unpack_range
from qrun.formats.checkpoints.stored import (
    Floats,
    PackedWeight,
    group_size,
    require_shape,
    whole_number,
    words,
)
from qrun.formats.safetensors import StoredTensor

BITS = 4
CODES_IN_WORD = 8
# Where outputs 0 to 7 are found in a word of "gemm".
PLACES = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])


def awq_weight(parts: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> PackedWeight:
    """parts: qweight, qzeros, scales. config: the `quantization_config`. Raises ValueError if they do not fit."""
    whole_number(config, ("bits", "w_bit"), BITS, (BITS,))
    version = str(config.get("version") or "gemm").lower()
    if version not in ("gemm", "gemv"):
        raise ValueError(f"AWQ in the version {version[:40]!r} is not supported: gemm and gemv are")
    return (GEMMWeight if version == "gemm" else GEMVWeight)(parts, config)


class GEMMWeight:
    """See the top of this file."""

    def __init__(self, parts: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> None:
        self.qweight, self.qzeros = words(parts["qweight"], "qweight"), words(parts["qzeros"], "qzeros")
        self.scales = Floats(parts["scales"], "scales")
        n_in, n_words = self.qweight.shape
        self.shape = (n_words * CODES_IN_WORD, n_in)
        self.group_size = group_size(config, ("group_size", "q_group_size"), n_in)
        self.n_groups = n_in // self.group_size
        if n_in % self.group_size:
            raise ValueError(f"{n_in} inputs are not whole groups of {self.group_size}")
        require_shape("qzeros", self.qzeros.shape, (self.n_groups, n_words))
        require_shape("scales", self.scales.shape, (self.n_groups, self.shape[0]))

    def rows(self, start: int, end: int) -> F32Array:
        # [out, groups, inputs of a group], and what belongs to each group beside it.
        codes = _in_order(self.qweight.T, start, end).reshape(end - start, self.n_groups, self.group_size)
        zeros = _in_order(self.qzeros.T, start, end)
        scales = self.scales[:, start:end].T
        return _decode(codes, zeros, scales)


class GEMVWeight:
    """See the top of this file."""

    def __init__(self, parts: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> None:
        self.qweight, self.qzeros = words(parts["qweight"], "qweight"), words(parts["qzeros"], "qzeros")
        self.scales = Floats(parts["scales"], "scales")
        out, n_words = self.qweight.shape
        self.shape = (out, n_words * CODES_IN_WORD)
        self.group_size = group_size(config, ("group_size", "q_group_size"), self.shape[1])
        self.n_groups = self.shape[1] // self.group_size
        if self.shape[1] % self.group_size:
            raise ValueError(f"{self.shape[1]} inputs are not whole groups of {self.group_size}")
        n_zero_words = self.qzeros.shape[1]
        if n_zero_words * CODES_IN_WORD < self.n_groups:
            raise ValueError(f"its qzeros have {n_zero_words} words in a row, too few for {self.n_groups} groups")
        require_shape("qzeros", self.qzeros.shape, (out, n_zero_words))
        require_shape("scales", self.scales.shape, (out, n_zero_words * CODES_IN_WORD))

    def rows(self, start: int, end: int) -> F32Array:
        codes = unpack(self.qweight[start:end].T, BITS).T.reshape(end - start, self.n_groups, self.group_size)
        zeros = unpack(self.qzeros[start:end].T, BITS)[: self.n_groups].T
        return _decode(codes, zeros, self.scales[start:end, : self.n_groups])


def _in_order(packed: np.ndarray, start: int, end: int) -> U8Array:
    """Codes of outputs start to end: uint32 [out / 8, n] -> uint8 [end - start, n]."""
    first, last = start // CODES_IN_WORD * CODES_IN_WORD, -(-end // CODES_IN_WORD) * CODES_IN_WORD
    codes = unpack_range(packed, BITS, first, last)
    order = np.arange(0, last - first, CODES_IN_WORD)[:, None] + PLACES
    return codes[order.reshape(-1)[start - first : end - first]]


def _decode(codes: U8Array, zeros: U8Array, scales: F32Array) -> F32Array:
    """codes: [out, groups, group_size]; zeros, scales: [out, groups]. Exact if scales have half precision."""
    weights = codes.astype(np.float32)
    weights -= zeros[..., None]
    weights *= scales[..., None]
    return weights.reshape(len(codes), codes.shape[1] * codes.shape[2])
