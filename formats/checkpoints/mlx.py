"""MLX: 2 to 8 bits per weight, and a scale and an offset for each group of inputs of each output.

    weight   uint32 [out, in * bits / 32]   codes of a row from the lowest bits up, across the borders of words
    scales   float [out, groups]
    biases   float [out, groups]

    w[o, i] = scales[o, g] * q[o, i] + biases[o, g]        g = i // group_size

The settings stand in config.json under "quantization" (and by now under "quantization_config" too), those of single
layers by their names within it. Linear layers and embeddings are quantised alike.
(Layout: `mlx.core.quantize` in the mode "affine"; its other modes, with floats of 4 bits, are not read.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qrun.formats.blocks import TensorType
from qrun.formats.blocks.layout import F32Array
from qrun.formats.checkpoints.bits import WORD_BITS, codes_in_period, unpack
from qrun.formats.checkpoints.packed import PackedTensor
from qrun.formats.checkpoints.stored import Floats, integers, require_shape, whole_number
from qrun.formats.errors import FormatError
from qrun.formats.gguf.cursor import quote
from qrun.formats.safetensors import StoredTensor
from qrun.formats.tensors import SourceTensor

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = range(1, 1 << 31)
WEIGHT, SCALES, BIASES = ".weight", ".scales", ".biases"


class AffineWeight:
    """See the top of this file. Raises ValueError where shapes and sizes contradict each other."""

    def __init__(self, parts: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> None:
        """parts: weight, scales, biases. settings: those of this layer."""
        mode = settings.get("mode", "affine")
        if mode != "affine":
            raise ValueError(f"MLX in the mode {str(mode)[:40]!r} is not supported: affine is")
        self.bits = whole_number(settings, ("bits",), 4, BITS)
        self.group_size = whole_number(settings, ("group_size",), 64, GROUP_SIZES)
        self.words = integers(parts["weight"], "weight", "U32")
        self.scales, self.biases = Floats(parts["scales"], "scales"), Floats(parts["biases"], "biases")
        if self.words.ndim != 2:
            raise ValueError(f"it has the shape {list(self.words.shape)}, which is no matrix")
        out, n_words = self.words.shape
        n_in = n_words * WORD_BITS // self.bits
        self.shape = (out, n_in)
        if n_in % self.group_size or n_in % codes_in_period(self.bits) or n_in * self.bits != n_words * WORD_BITS:
            raise ValueError(f"{n_words} words in a row are not whole groups of {self.group_size} x {self.bits} bits")
        for name, floats in (("scales", self.scales), ("biases", self.biases)):
            require_shape(name, floats.shape, (out, n_in // self.group_size))

    def rows(self, start: int, end: int) -> F32Array:
        codes = unpack(self.words[start:end].T, self.bits).T
        weights = codes.reshape(end - start, -1, self.group_size).astype(np.float32)
        weights *= self.scales[start:end][..., None]
        weights += self.biases[start:end][..., None]
        return weights.reshape(end - start, self.shape[1])


def is_quantized(tensors: Mapping[str, StoredTensor]) -> bool:
    """Are there weights as MLX packs them?"""
    return any(
        tensor.dtype == "U32" and name.endswith(WEIGHT) and name.removesuffix(WEIGHT) + SCALES in tensors
        for name, tensor in tensors.items()
    )


def decode(
    tensors: dict[str, StoredTensor], quantization: Mapping[str, Any], path: Path
) -> dict[str, SourceTensor]:
    """See `formats.checkpoints.Decoder`."""
    weights: dict[str, SourceTensor] = {}
    for layer in [name.removesuffix(SCALES) for name in tensors if name.endswith(SCALES)]:
        names = {part.removeprefix("."): layer + part for part in (WEIGHT, SCALES, BIASES)}
        own = quantization.get(layer)
        settings = {**quantization, **own} if isinstance(own, dict) else quantization
        marker = tensors[layer + SCALES]
        try:
            missing = next((name for name in names.values() if name not in tensors), None)
            if missing is not None:
                raise ValueError(f"its part {quote(missing)} is missing")
            parts = {part: tensors[name] for part, name in names.items()}
            weight = AffineWeight(parts, settings)
        except ValueError as error:
            raise FormatError(marker.file, f"tensor {quote(layer + WEIGHT)}: {error}", marker.offset) from None
        for part in parts.values():
            del tensors[part.name]
        name = layer + WEIGHT
        weights[name] = PackedTensor(name, TensorType.F32, weight.shape, weight, tuple(parts.values()))
    if not weights:
        raise FormatError(path, f"the weights are said to be quantised by MLX, but none is called *{SCALES}")
    return weights
