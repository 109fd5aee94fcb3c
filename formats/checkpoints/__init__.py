"""Quantised weights of Hugging Face checkpoints: which tensors make up a weight, and what decodes it.

`quantization_config` of a checkpoint names a method. Under each stand the layouts that its weights may have: the
suffix that gives such a weight away, and those of its parts. Layers that were left as they are have neither, so nothing
need be known of `modules_to_not_convert` and its like.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qrun.formats.checkpoints.awq import awq_weight
from qrun.formats.checkpoints.bitsandbytes import EightBitWeight, FourBitWeight
from qrun.formats.checkpoints.gptq import GPTQWeight
from qrun.formats.checkpoints.stored import PackedWeight, StoredTensor
from qrun.formats.errors import FormatError
from qrun.formats.gguf.cursor import quote

__all__ = ["METHODS", "Packed", "PackedWeight", "StoredTensor", "packed_weights"]

Build = Callable[[Mapping[str, StoredTensor], Mapping[str, Any]], PackedWeight]


@dataclass(frozen=True)
class Layout:
    """How the tensors of a weight are called, after the name of its layer.

    marker: the one by which it is known. needed, optional: the names that `build` knows the parts by, and their
    suffixes; of the optional ones there are all or none.
    """

    marker: str
    needed: Mapping[str, str]
    optional: Mapping[str, str]
    build: Build


@dataclass(frozen=True)
class Packed:
    """A weight and the names of the tensors that it is made of."""

    weight: PackedWeight
    parts: tuple[str, ...]


def _suffixes(*names: str) -> dict[str, str]:
    return {name: f".{name}" for name in names}


def _four_bits(kind: str) -> Layout:
    state = f".weight.quant_state.bitsandbytes__{kind}"
    needed = {"weight": ".weight", "absmax": ".weight.absmax", "quant_map": ".weight.quant_map", "state": state}
    nested = {name: f".weight.{name}" for name in ("nested_absmax", "nested_quant_map")}
    return Layout(state, needed, nested, FourBitWeight)


METHODS: dict[str, tuple[Layout, ...]] = {
    "gptq": (Layout(".qweight", _suffixes("qweight", "qzeros", "scales"), _suffixes("g_idx"), GPTQWeight),),
    "awq": (Layout(".qweight", _suffixes("qweight", "qzeros", "scales"), {}, awq_weight),),
    "bitsandbytes": (
        _four_bits("nf4"),
        _four_bits("fp4"),
        Layout(".SCB", _suffixes("weight", "SCB"), _suffixes("weight_format"), EightBitWeight),
    ),
}


def packed_weights(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> dict[str, Packed]:
    """All quantised weights among the tensors of a checkpoint, by the name that the plain weight would have.

    config: its `quantization_config`, whose `quant_method` is one of METHODS. Raises FormatError with the file, the
    weight and the reason if one lacks a part or its parts do not fit together.
    """
    found = {}
    for layout in METHODS[config["quant_method"]]:
        for name, marker in tensors.items():
            if not name.endswith(layout.marker):
                continue
            layer = name.removesuffix(layout.marker)
            try:
                parts = _parts(layout, layer, tensors)
                weight = layout.build({part: tensors[name] for part, name in parts.items()}, config)
            except ValueError as error:
                raise FormatError(marker.file, f"tensor {quote(layer + '.weight')}: {error}") from None
            found[f"{layer}.weight"] = Packed(weight, tuple(parts.values()))
    return found


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
