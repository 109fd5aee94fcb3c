"""GPTQ: 2, 3, 4 or 8 bits per weight, and a scale and a zero point for each group of inputs and each output.

    qweight  int32 [in * bits / 32, out]       codes of one output packed down a column, as `bits` describes
    qzeros   int32 [groups, out * bits / 32]   zero points, packed along a row
    scales   float [groups, out]
    g_idx    int32 [in]                        the group of each input; if absent, `group_size` inputs in turn

    w[o, i] = scales[g, o] * (q[i, o] - zero[g, o])        g = g_idx[i]

Which group an input is in must be said since "act-order" quantises inputs in the order of their importance: the inputs
of a group then lie anywhere. Of zero points there are two conventions: the first format (`checkpoint_format` "gptq", or
none) stores them less one, modulo the number of codes; "gptq_v2" stores them as they are. With symmetric codes (`sym`)
the zero point is half the number of codes, which tells the two apart; that is relied on before the name, since files
of the second kind that bear the name of the first are about.

Every product is exact: a half-precision scale times an integer of 9 bits fits into single precision.
(Layout: AutoGPTQ's `QuantLinear.pack`; v2: GPTQModel.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrun.formats.blocks.layout import F32Array
from qrun.formats.checkpoints.bits import WORD_BITS, codes_in_period, unpack, unpack_range
from qrun.formats.checkpoints.stored import (
    Floats,
    group_size,
    integers,
    require_shape,
    whole_number,
    words,
)
from qrun.formats.safetensors import StoredTensor

BITS = (2, 3, 4, 8)
# By `checkpoint_format`: what is to be added to the zero points that are stored.
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}


class GPTQWeight:
    """See the top of this file. Raises ValueError where shapes, sizes or groups contradict each other."""

    def __init__(self, parts: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> None:
        """parts: qweight, qzeros, scales, perhaps g_idx. config: the `quantization_config`."""
        self.qweight, self.qzeros = words(parts["qweight"], "qweight"), words(parts["qzeros"], "qzeros")
        self.scales = Floats(parts["scales"], "scales")
        n_words, out = self.qweight.shape
        g_idx = parts.get("g_idx")
        if g_idx is not None and g_idx.shape[-1:] != (0,):
            groups = integers(g_idx, "g_idx", "I32", "I64")
            require_shape("g_idx", groups.shape, (groups.size,))
            # Single layers may have other bits than the configuration says. Their shapes do not lie.
            self.bits = WORD_BITS * n_words // max(groups.size, 1)
            n_in = groups.size
        else:
            groups = None
            self.bits = whole_number(config, ("bits",), 4, BITS)
            n_in = WORD_BITS * n_words // self.bits
        if self.bits not in BITS or n_in % codes_in_period(self.bits) or n_in * self.bits != n_words * WORD_BITS:
            raise ValueError(f"its qweight have {n_words} rows, which is not possible for {n_in} inputs")
        self.shape = (out, n_in)
        if out * self.bits % WORD_BITS or out % codes_in_period(self.bits):
            raise ValueError(f"the zero points of {out} outputs do not fill whole words at {self.bits} bits")
        n_groups = self.scales.shape[0] if self.scales.shape else 0
        require_shape("scales", self.scales.shape, (n_groups, out))
        require_shape("qzeros", self.qzeros.shape, (n_groups, out * self.bits // WORD_BITS))
        self.groups = self._groups(groups, n_groups, config)
        self.zero_offset = self._zero_offset(config)

    def _groups(self, groups: NDArray[Any] | None, n_groups: int, config: Mapping[str, Any]) -> NDArray[np.intp]:
        """The group of each input, all of them checked. All zeros stand for groups in turn, as if there were none."""
        n_in = self.shape[1]
        if groups is not None and (n_groups == 1 or groups.any()):
            if groups.size and not 0 <= groups.min() <= groups.max() < n_groups:
                raise ValueError(f"its g_idx go from {groups.min()} to {groups.max()}, and there are {n_groups} groups")
            return groups.astype(np.intp)
        size = group_size(config, ("group_size",), n_in)
        if -(-n_in // size) != n_groups:
            raise ValueError(f"{n_in} inputs in groups of {size} do not make the {n_groups} groups of its scales")
        return np.arange(n_in, dtype=np.intp) // size

    def _zero_offset(self, config: Mapping[str, Any]) -> int:
        name = str(config.get("checkpoint_format") or "gptq")
        if name not in ZERO_OFFSETS:
            raise ValueError(f"GPTQ in the format {name[:40]!r} is not supported")
        if config.get("sym") is True and self.qzeros.size:
            stored = unpack(self.qzeros[:1].T, self.bits)
            middle = 1 << (self.bits - 1)
            for offset in ZERO_OFFSETS.values():
                if (stored == middle - offset).all():
                    return offset
        return ZERO_OFFSETS[name]

    def rows(self, start: int, end: int) -> F32Array:
        codes = unpack(self.qweight[:, start:end], self.bits)
        mask = np.uint8((1 << self.bits) - 1)
        zeros = unpack_range(self.qzeros.T, self.bits, start, end).T
        zeros = (zeros + np.uint8(self.zero_offset)) & mask
        scales = self.scales[:, start:end]
        weights = codes.astype(np.float32)
        weights -= zeros.astype(np.float32)[self.groups]
        weights *= scales[self.groups]
        return np.ascontiguousarray(weights.T)
