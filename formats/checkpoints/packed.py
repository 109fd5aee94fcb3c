"""Weights whose codes are packed into bits: which tensors make up a weight, and what decodes it.

Under each method stand the layouts that its weights may have: the suffix that gives such a weight away, and those of
its parts. Layers that were left as they are have neither, so nothing need be known of `modules_to_not_convert` and its
like.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qrun.formats.blocks import TensorType
from qrun.formats.blocks.layout import F32Array
from qrun.formats.checkpoints.awq import awq_weight
from qrun.formats.checkpoints.bitsandbytes import EightBitWeight, FourBitWeight
from qrun.formats.checkpoints.gptq import GPTQWeight
from qrun.formats.checkpoints.stored import PackedWeight
from qrun.formats.errors import FormatError
from qrun.formats.gguf.cursor import quote
from qrun.formats.safetensors import StoredTensor
from qrun.formats.tensors import SourceTensor

Build = Callable[[Mapping[str, StoredTensor], Mapping[str, Any]], PackedWeight]


@dataclass(frozen=True)
class Layout:
    """How the tensors of a weight are called, after the name of its layer.

    marker: the one by which it is known. needed, optional: the names that `build` knows the parts by, and their
    suffixes; of the optional ones there are all or none. build: from parts and settings; ValueError if they do not fit.
    """

    marker: str
    needed: Mapping[str, str]
    optional: Mapping[str, str]
    build: Build


@dataclass(frozen=True, eq=False)
class PackedTensor(SourceTensor):
    """A weight, and the tensors that it is made of. The first of them says where it lies."""

    weight: PackedWeight
    parts: tuple[StoredTensor, ...]

    def rows(self, start: int, end: int) -> F32Array:
        with np.errstate(all="ignore"):  # scales that are not finite make weights that are not, which is found later
            return self.weight.rows(start, end)

    def forget(self) -> None:
        for part in self.parts:
            part.forget()

    def error(self, reason: str) -> FormatError:
        return FormatError(self.parts[0].file, f"tensor {quote(self.name)} {reason}", self.parts[0].offset)


def _suffixes(*names: str) -> dict[str, str]:
    return {name: f".{name}" for name in names}


def _four_bits(kind: str) -> Layout:
    state = f".weight.quant_state.bitsandbytes__{kind}"
    needed = {"weight": ".weight", "absmax": ".weight.absmax", "quant_map": ".weight.quant_map", "state": state}
    nested = {name: f".weight.{name}" for name in ("nested_absmax", "nested_quant_map")}
    return Layout(state, needed, nested, FourBitWeight)


LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "gptq": (Layout(".qweight", _suffixes("qweight", "qzeros", "scales"), _suffixes("g_idx"), GPTQWeight),),
    "awq": (Layout(".qweight", _suffixes("qweight", "qzeros", "scales"), {}, awq_weight),),
    "bitsandbytes": (
        _four_bits("nf4"),
        _four_bits("fp4"),
        Layout(".SCB", _suffixes("weight", "SCB"), _suffixes("weight_format"), EightBitWeight),
    ),
}
"""By `quant_method`."""


def decoder(method: str) -> Callable[[dict[str, StoredTensor], Mapping[str, Any], Path], dict[str, SourceTensor]]:
    """The `formats.checkpoints.Decoder` of a method."""

    def decode(
        tensors: dict[str, StoredTensor], quantization: Mapping[str, Any], path: Path
    ) -> dict[str, SourceTensor]:
        weights: dict[str, SourceTensor] = {}
        for layout in LAYOUTS[method]:
            for name in [name for name in tensors if name.endswith(layout.marker)]:
                layer = name.removesuffix(layout.marker)
                weights[f"{layer}.weight"] = _take(layout, layer, tensors, quantization)
                _drop_zero_bias(f"{layer}.bias", tensors)
        if not weights:
            names = ", ".join(f"*{layout.marker}" for layout in LAYOUTS[method])
            raise FormatError(path, f"the weights are said to be quantised by {method}, but none is called {names}")
        return weights

    return decode


def _take(
    layout: Layout, layer: str, tensors: dict[str, StoredTensor], quantization: Mapping[str, Any]
) -> PackedTensor:
    marker, name = tensors[layer + layout.marker], f"{layer}.weight"
    try:
        parts = {part: tensors[stored] for part, stored in _parts(layout, layer, tensors).items()}
        weight = layout.build(parts, quantization)
    except ValueError as error:
        raise FormatError(marker.file, f"tensor {quote(name)}: {error}", marker.offset) from None
    for part in parts.values():
        del tensors[part.name]
    # Single precision holds the products of half-precision scales and small integers exactly; nothing shorter does.
    return PackedTensor(name, TensorType.F32, weight.shape, weight, tuple(parts.values()))


def _parts(layout: Layout, layer: str, tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Name of a part -> name of its tensor."""
    optional = {part: layer + suffix for part, suffix in layout.optional.items()}
    parts = {part: layer + suffix for part, suffix in layout.needed.items()}
    if any(name in tensors for name in optional.values()):
        parts |= optional
    for name in parts.values():
        if name not in tensors:
            raise ValueError(f"its part {quote(name)} is missing")
    return parts


def _drop_zero_bias(name: str, tensors: dict[str, StoredTensor]) -> None:
    """Packers of old gave a bias to layers of models that have none there. It is all zeros, and can go."""
    if name in tensors and not tensors[name].raw.any():
        del tensors[name]
