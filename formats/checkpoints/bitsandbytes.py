"""bitsandbytes: NF4 and FP4 with a scale for each block of weights, and the eight bits of LLM.int8().

4 bits. The matrix is taken as one run of weights, row after row; blocks do not care where a row ends.

    weight                   bytes, two weights each, the first in the high half; as many as the weights need
    weight.quant_map         float32 [16]            the levels
    weight.absmax            float32 [blocks]        the scale of each block of `blocksize` weights
    weight.quant_state...    a JSON object as bytes: shape, blocksize, quant_type, dtype, nested_*

    w[k] = quant_map[q[k]] * absmax[k // blocksize]

With double quantisation the scales are quantised in their turn, in blocks of `nested_blocksize`:

    weight.absmax            uint8 [blocks]
    weight.nested_quant_map  float32 [256]
    weight.nested_absmax     float32 [nested blocks]

    absmax[b] = nested_quant_map[q[b]] * nested_absmax[b // nested_blocksize] + nested_offset

8 bits. `weight` is int8 [out, in], `SCB` float32 [out] is the largest magnitude of each row, and

    w[o, i] = weight[o, i] * SCB[o] * (1 / 127)          multiplied in this order

All of it is computed in single precision, as bitsandbytes itself does when asked for it.
(Layout: `QuantState.as_dict` and `Linear8bitLt` of bitsandbytes 0.50.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from qrun.formats.blocks.layout import F32Array
from qrun.formats.checkpoints.stored import Floats, integers, require_shape, whole_number
from qrun.formats.safetensors import StoredTensor

# Bytes of the JSON object at most; bitsandbytes writes some 200.
MAX_STATE = 1 << 16
MAX_BLOCK = 1 << 31
MAX_OFFSET = 1e30
ONE_127TH = np.float32(1 / 127)
ROW_FORMAT = 0  # the only `weight_format` that files have had since turing and ampere layouts went


class FourBitWeight:
    """NF4 or FP4. Raises ValueError where shapes and sizes contradict each other."""

    def __init__(self, parts: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> None:
        """parts: weight, absmax, quant_map, state, with double quantisation nested_absmax and nested_quant_map."""
        state = _read_state(parts["state"])
        self.shape = _shape(state)
        self.block_size = whole_number(state, ("blocksize",), 0, range(1, MAX_BLOCK))
        self.packed = parts["weight"].raw  # of any dtype: `bnb_4bit_quant_storage` only gives the bytes another name
        n_weights = prod(self.shape)
        if self.packed.size != -(-n_weights // 2):
            raise ValueError(f"it has {self.packed.size} bytes for {n_weights} weights of 4 bits")
        self.levels = _levels(parts["quant_map"], "quant_map", 16)
        absmax, n_blocks = parts["absmax"], -(-n_weights // self.block_size)
        require_shape("absmax", absmax.shape, (n_blocks,))
        self.nested = _Nested(parts, state, n_blocks) if "nested_absmax" in parts else None
        self.absmax = Floats(absmax, "absmax") if self.nested is None else None

    def rows(self, start: int, end: int) -> F32Array:
        n_in = self.shape[1]
        first, last = start * n_in, end * n_in
        packed = self.packed[first // 2 : -(-last // 2)]
        codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[first % 2 :][: last - first]
        weights = self.levels[codes]
        blocks = np.arange(first // self.block_size, -(-last // self.block_size))
        # Of each block, how many of its weights are among these.
        counts = np.minimum((blocks + 1) * self.block_size, last) - np.maximum(blocks * self.block_size, first)
        weights *= np.repeat(self._scales(blocks), counts)
        return weights.reshape(end - start, n_in)

    def _scales(self, blocks: np.ndarray) -> F32Array:
        if self.nested is not None:
            return self.nested.scales(blocks)
        assert self.absmax is not None
        return self.absmax[blocks]


class _Nested:
    """Scales that are quantised themselves."""

    def __init__(self, parts: Mapping[str, StoredTensor], state: Mapping[str, Any], n_blocks: int) -> None:
        self.codes = integers(parts["absmax"], "absmax", "U8")
        self.block_size = whole_number(state, ("nested_blocksize",), 0, range(1, MAX_BLOCK))
        self.levels = _levels(parts["nested_quant_map"], "nested_quant_map", 256)
        self.absmax = Floats(parts["nested_absmax"], "nested_absmax")
        require_shape("nested_absmax", self.absmax.shape, (-(-n_blocks // self.block_size),))
        offset = state.get("nested_offset")
        if offset is None or type(offset) not in (int, float) or not abs(offset) < MAX_OFFSET:
            raise ValueError(f"its quant_state says nested_offset = {str(offset)[:40]!r}, which is no number")
        self.offset = np.float32(offset)

    def scales(self, blocks: np.ndarray) -> F32Array:
        return self.levels[self.codes[blocks]] * self.absmax[blocks // self.block_size] + self.offset


class EightBitWeight:
    """LLM.int8(): the rows of a matrix of int8, each with its scale."""

    def __init__(self, parts: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> None:
        """parts: weight, SCB, perhaps weight_format."""
        if len(parts["weight"].shape) != 2:
            raise ValueError(f"it has the shape {list(parts['weight'].shape)}, which is no matrix")
        self.codes = integers(parts["weight"], "values", "I8")
        out, n_in = self.codes.shape
        self.shape = (out, n_in)
        self.scales = Floats(parts["SCB"], "SCB")
        require_shape("SCB", self.scales.shape, (out,))
        if (weight_format := parts.get("weight_format")) is not None:
            values = integers(weight_format, "weight_format", "U8", "I8", "I32", "I64")
            if (values != ROW_FORMAT).any():
                raise ValueError(f"its weight_format is {values.reshape(-1)[0]}, and only {ROW_FORMAT} is supported")

    def rows(self, start: int, end: int) -> F32Array:
        weights = self.codes[start:end].astype(np.float32)
        weights *= self.scales[start:end, None]
        weights *= ONE_127TH
        return weights


def _read_state(tensor: StoredTensor) -> Mapping[str, Any]:
    if tensor.dtype != "U8" or tensor.raw.size > MAX_STATE:
        raise ValueError(f"its quant_state is {tensor.raw.size} bytes of {tensor.dtype}, not a short text")
    try:
        state = json.loads(tensor.raw.tobytes())
    except (ValueError, RecursionError):
        raise ValueError("its quant_state is no JSON") from None
    if not isinstance(state, dict):
        raise ValueError("its quant_state is no JSON object")
    return state


def _shape(state: Mapping[str, Any]) -> tuple[int, int]:
    shape = state.get("shape")
    sizes = shape if isinstance(shape, list) else []
    if len(sizes) != 2 or not all(type(n) is int and 0 <= n < 1 << 31 for n in sizes):
        raise ValueError(f"its quant_state says shape = {str(shape)[:40]!r}, which is that of no matrix")
    return sizes[0], sizes[1]


def _levels(tensor: StoredTensor, name: str, count: int) -> F32Array:
    require_shape(name, tensor.shape, (count,))
    return Floats(tensor, name)[:]
