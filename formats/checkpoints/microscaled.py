"""Weights of four-bit floats, with a scale of a byte for 16 or 32 of them: NVFP4 and MXFP4.

Byte j of a row holds weight 2j in its low half and 2j + 1 in its high one, each E2M1. The scale is an E4M3 for 16
weights (NVFP4), and then there is a float for the whole matrix too, or a bare exponent for 32 (MXFP4).

    compressed-tensors   X.weight_packed, X.weight_scale, and for NVFP4 X.weight_global_scale, by which is divided
    modelopt             X.weight, X.weight_scale, X.weight_scale_2, by which is multiplied
    fp8 (DeepSeek V4)    X.weight, which may be I8, X.scale
    mxfp4 (gpt-oss)      X_blocks [experts, out, in / 32, 16], X_scales [experts, out, in / 32]

GGUF has the same numbers in other places (`formats.blocks.nvfp4`, `mxfp4`), so that weights can be moved there as they
are: bits change places, and nothing is lost. The float of a matrix becomes a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from qrun.formats.blocks import BLOCK_SIZES, TensorType, dequantize
from qrun.formats.blocks.layout import F32Array, U8Array
from qrun.formats.checkpoints import scaled
from qrun.formats.checkpoints.plain import decode as decode_floats
from qrun.formats.errors import FormatError
from qrun.formats.safetensors import StoredTensor
from qrun.formats.tensors import SourceTensor

# Weights that share a scale: NVFP4's in E4M3, MXFP4's in E8M0 (which many files call U8).
GROUPS = {TensorType.NVFP4: 16, TensorType.MXFP4: 32}
SCALE_TYPES = {"F8_E4M3": TensorType.NVFP4, "U8": TensorType.MXFP4, "F8_E8M0": TensorType.MXFP4}
MAGNITUDE = 0x7F  # of an E4M3 scale, whose sign GGUF does not read


@dataclass(frozen=True, eq=False)
class MicroscaledTensor(SourceTensor):
    """codes, scales: two weights, and one scale, in a byte. packed: the type of GGUF that has the same numbers.

    multiplier: of all weights. While `type` is F32, that is part of them; once kept, it is the `tensor_scale`.
    """

    codes: StoredTensor
    scales: StoredTensor
    packed: TensorType
    multiplier: np.float32

    def kept(self) -> SourceTensor:
        """The same as a tensor of the packed type, if its rows are whole blocks of that."""
        return replace(self, type=self.packed) if self.row % BLOCK_SIZES[self.packed][0] == 0 else self

    @property
    def tensor_scale(self) -> np.float32:
        return np.float32(1) if self.type == TensorType.F32 else self.multiplier

    def rows(self, start: int, end: int) -> F32Array:
        group, shape = GROUPS[self.packed], (end - start, self.row)
        scales, codes = self._scales(start, end), self._codes(start, end)
        if self.packed == TensorType.NVFP4:  # of which a block has four
            missing = -scales.shape[1] % 4
            scales = np.pad(scales, ((0, 0), (0, missing)))
            codes = np.pad(codes, ((0, 0), (0, missing), (0, 0)))
        padded = (len(scales), group * scales.shape[1])
        weights = dequantize(self._blocks(scales, codes), self.packed, padded)[:, : self.row].reshape(shape)
        with np.errstate(all="ignore"):  # what is not finite is found later
            return weights * (self.multiplier if self.type == TensorType.F32 else np.float32(1))

    def raw(self, start: int, end: int) -> U8Array:
        if self.type == TensorType.F32:
            return super().raw(start, end)
        return self._blocks(self._scales(start, end), self._codes(start, end))

    def _scales(self, start: int, end: int) -> U8Array:
        """[rows, groups]"""
        n_groups = self.row // GROUPS[self.packed]
        scales = self.scales.raw[start * n_groups : end * n_groups].reshape(end - start, n_groups)
        return scales & np.uint8(MAGNITUDE) if self.packed == TensorType.NVFP4 else scales

    def _codes(self, start: int, end: int) -> U8Array:
        """[rows, groups, bytes of a group], the second half of a group's weights in the high halves."""
        group, row_bytes = GROUPS[self.packed], self.row // 2
        pairs = self.codes.raw[start * row_bytes : end * row_bytes].reshape(end - start, -1, group // 2, 1)
        single = np.concatenate([pairs & np.uint8(15), pairs >> 4], axis=-1).reshape(end - start, -1, 2, group // 2)
        return single[:, :, 0] | single[:, :, 1] << 4

    def _blocks(self, scales: U8Array, codes: U8Array) -> U8Array:
        in_block = BLOCK_SIZES[self.packed][0] // GROUPS[self.packed]
        n_blocks = scales.size // in_block
        parts = [scales.reshape(n_blocks, in_block), codes.reshape(n_blocks, -1)]
        return np.concatenate(parts, axis=-1).reshape(-1)

    def forget(self) -> None:
        self.codes.forget()
        self.scales.forget()

    def error(self, reason: str) -> FormatError:
        return self.codes.error(reason)


def decode(
    tensors: dict[str, StoredTensor], quantization: Mapping[str, Any], path: Path
) -> dict[str, SourceTensor]:
    """See `formats.checkpoints.Decoder`. What is not of four-bit floats is left to `scaled`."""
    weights: dict[str, SourceTensor] = {}
    for name in [name for name, tensor in tensors.items() if tensor.dtype in ("U8", "I8")]:
        found = _parts(name, tensors) if name in tensors else None  # it was the scale of another one
        if found is None:
            continue
        weight, scales, divisor, factor = found
        awq = f"{weight.removesuffix('.weight')}.pre_quant_scale"
        if awq in tensors:
            raise tensors[awq].error("is of NVFP4 with AWQ, which is not supported")
        weights[weight] = _microscaled(weight, tensors[name], tensors[scales], divisor, factor)
        for part in (name, scales, *(stored.name for stored in (divisor, factor) if stored is not None)):
            del tensors[part]
    return weights | scaled.decode(tensors, quantization, path)


Found = tuple[str, str, StoredTensor | None, StoredTensor | None]


def _parts(name: str, tensors: Mapping[str, StoredTensor]) -> Found | None:
    """Of what may be the codes of a weight: its name, that of its scales, and what it is divided and multiplied by."""
    if name.endswith("_blocks") and (scales := f"{name.removesuffix('_blocks')}_scales") in tensors:
        return name.removesuffix("_blocks"), scales, None, None
    exponents = tensors.get(scaled.scale_beside(name))
    if exponents is not None and exponents.dtype == scaled.EXPONENTS:
        return name, exponents.name, None, None
    if tensors[name].dtype != "U8":
        return None
    for suffix in (".weight_packed", ".weight"):
        weight = f"{name.removesuffix(suffix)}.weight"
        scales = f"{weight}_scale"
        if name.endswith(suffix) and scales in tensors and tensors[scales].dtype in SCALE_TYPES:
            return weight, scales, tensors.get(f"{weight}_global_scale"), tensors.get(f"{weight}_scale_2")
    return None


def _microscaled(
    name: str, codes: StoredTensor, scales: StoredTensor, divisor: StoredTensor | None, factor: StoredTensor | None
) -> MicroscaledTensor:
    packed = SCALE_TYPES.get(scales.dtype)
    if packed is None:
        raise scales.error(f"is of type {scales.dtype}, expected one of {', '.join(SCALE_TYPES)}")
    group = GROUPS[packed]
    if len(scales.shape) < 2:
        raise scales.error(f"has the shape {scales.shape}, expected one scale for each {group} weights of a row")
    shape = (*scales.shape[:-1], group * scales.shape[-1])
    flat, blocks = (*shape[:-1], shape[-1] // 2), (*scales.shape, group // 2)
    if codes.shape not in (flat, blocks):
        raise codes.error(f"has the shape {codes.shape}, expected {flat}, as there are scales of {scales.shape}")
    multiplier = np.float32(1)
    if divisor is not None:
        with np.errstate(divide="ignore"):
            multiplier = np.float32(1) / _number(divisor)
    elif factor is not None:
        multiplier = _number(factor)
    return MicroscaledTensor(name, TensorType.F32, shape, codes, scales, packed, multiplier)


def _number(stored: StoredTensor) -> np.float32:
    if stored.dtype not in ("F32", "F16", "BF16") or prod(stored.shape) != 1:
        raise stored.error(f"is of type {stored.dtype} and shape {stored.shape}, expected a single float")
    value = np.float32(decode_floats(stored, stored.raw)[0])
    if not np.isfinite(value) or value == 0:
        raise stored.error(f"is {value}, which cannot be a scale")
    return value


def kept(weights: Mapping[str, SourceTensor]) -> dict[str, SourceTensor]:
    """All weights, those of four-bit floats in the types that GGUF has for them."""
    return {
        name: tensor.kept() if isinstance(tensor, MicroscaledTensor) else tensor for name, tensor in weights.items()
    }

