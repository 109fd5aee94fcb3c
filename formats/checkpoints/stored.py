"""What the decoders of packed weights share: checked views of stored tensors, checked numbers of a configuration.

A decoder raises ValueError where tensors do not fit together; who calls it puts file and tensor before the reason.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qrun.formats.blocks import TensorType, dequantize
from qrun.formats.blocks.layout import F32Array
from qrun.formats.safetensors import StoredTensor

# The types that scales have, by safetensors' names.
FLOATS = {"F32": TensorType.F32, "F16": TensorType.F16, "BF16": TensorType.BF16}


class PackedWeight(Protocol):
    """The weight of a linear layer, in whatever form. Its rows may be asked for by several threads at once."""

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]: outputs, inputs."""

    def rows(self, start: int, end: int) -> F32Array:
        """What outputs start to end multiply the inputs by: float32 [end - start, in]."""


class Floats:
    """A matrix or vector of F32, F16 or BF16, decoded only where it is asked for. Indexed as an array is."""

    def __init__(self, tensor: StoredTensor, name: str) -> None:
        if tensor.dtype not in FLOATS:
            raise ValueError(f"its {name} are {tensor.dtype}, not {' or '.join(FLOATS)}")
        self.type = FLOATS[tensor.dtype]
        self.stored = tensor.array()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def __getitem__(self, index: Any) -> F32Array:
        numbers = np.ascontiguousarray(self.stored[index])
        return dequantize(numbers.reshape(-1).view(np.uint8), self.type, numbers.shape)


def integers(tensor: StoredTensor, name: str, *dtypes: str) -> NDArray[Any]:
    """The tensor as an array, unless its dtype is none of these."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"its {name} are {tensor.dtype}, not {' or '.join(dtypes)}")
    return tensor.array()


def words(tensor: StoredTensor, name: str) -> NDArray[np.uint32]:
    """A matrix of 32-bit words in which codes are packed."""
    if len(tensor.shape) != 2:
        raise ValueError(f"its {name} have the shape {list(tensor.shape)}, which is no matrix")
    return integers(tensor, name, "I32").view("<u4")


def require_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise ValueError(f"its {name} have the shape {list(shape)}, not {list(expected)}")


def whole_number(config: Mapping[str, Any], keys: tuple[str, ...], default: int, allowed: Container[int]) -> int:
    """The first of these keys that a configuration has, checked."""
    value = next((config[key] for key in keys if config.get(key) is not None), default)
    if not isinstance(value, int) or isinstance(value, bool) or value not in allowed:
        raise ValueError(f"the configuration says {keys[0]} = {str(value)[:40]!r}, which is not possible")
    return value


def group_size(config: Mapping[str, Any], keys: tuple[str, ...], n_in: int) -> int:
    """How many inputs in turn share a scale. -1 stands for all of them."""
    size = whole_number(config, keys, -1, range(-1, 1 << 31))
    if size == 0:
        raise ValueError("the configuration says that groups have 0 inputs")
    return max(n_in, 1) if size == -1 else size
