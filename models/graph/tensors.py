"""Tensors by their names, checked before anything is computed with them."""

from collections import Counter
from math import prod

import numpy as np

from qrun.formats import FormatError, GGUFReader, TensorInfo, TensorType
from qrun.formats.blocks import BLOCK_FORMATS
from qrun.models.graph.values import Constant, Indices, Weight
from qrun.models.support import type_problem


class FileTensors:
    """The tensors of a file, as a description of a graph asks for them.

    A tensor that is missing, or has another shape than is asked for, or a type that cannot be decoded, raises
    `FormatError` with the file and the tensor.
    """

    def __init__(self, reader: GGUFReader) -> None:
        self.reader = reader
        self._weights: dict[str, Weight] = {}
        self._uses: Counter[str] = Counter()

    def has(self, name: str) -> bool:
        """Is there a tensor of this full name?"""
        return name in self.reader.tensors

    @property
    def in_float32(self) -> bool:
        """Are all weights float32? Then nothing rounds a result to fewer digits, and no cache should."""
        return all(tensor.type in (TensorType.F32, TensorType.I32) for tensor in self.reader.tensors.values())

    def n_rows(self, name: str) -> int:
        """How many rows the matrix of this full name has, or 0 if there is none."""
        tensor = self.reader.tensors.get(name)
        return tensor.shape[0] if tensor is not None and len(tensor.shape) == 2 else 0

    def count(self, name: str) -> int:
        """How many values the tensor of this full name has, or 0 if there is none."""
        tensor = self.reader.tensors.get(name)
        return prod(tensor.shape) if tensor is not None else 0

    def weight(self, name: str, *shape: int) -> Weight:
        """The tensor of this full name, to be read by kernels in file layout."""
        info = self._tensor(name, shape)
        return self._weights.setdefault(name, Weight(name, info.type, shape, info.raw))

    def constant(self, name: str, *shape: int) -> Constant:
        """The tensor of this full name as float32: norms, biases, rope factors."""
        values = self._tensor(name, shape).dequantize().reshape(shape)
        if not np.isfinite(values).all():
            raise self.error(f"tensor {name} has values that are not finite")
        return values

    def loose_constant(self, name: str, *shape: int) -> Constant:
        """The same where files have it in that shape, with dimensions of one anywhere between, or all in one row."""
        info = self.reader.tensors.get(name)
        found = None if info is None else _without_ones(info.shape)
        fits = found in (_without_ones(shape), _without_ones((prod(shape),)))
        return self.constant(name, *(info.shape if info is not None and fits else shape)).reshape(shape)

    def rows_constant(self, name: str, width: int) -> Constant:
        """The same as rows of that width, as many as there are."""
        return self.loose_constant(name, self.count(name) // width, width)

    def optional_constant(self, name: str, *shape: int) -> Constant | None:
        """As `constant`, or None if the file has no such tensor."""
        return self.constant(name, *shape) if self.has(name) else None

    def indices(self, name: str, *shape: int, below: int) -> Indices:
        """The tensor of this full name, of whole numbers from 0 on and below a limit."""
        info = self.reader.tensors.get(name)
        if info is None:
            raise self.error(f"tensor {name} is missing")
        if info.shape != shape or info.type is not TensorType.I32:
            raise self.error(f"tensor {name} is {info.type.name} {info.shape}, expected I32 {shape}")
        values = np.frombuffer(info.raw.tobytes(), "<i4").astype(np.int32).reshape(shape)
        if values.size and not (values.min() >= 0 and values.max() < below):
            raise self.error(f"tensor {name} has numbers outside of 0 to {below - 1}")
        return values

    def _tensor(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self.reader.tensors.get(name)
        if info is None:
            raise self.error(f"tensor {name} is missing")
        if _significant(info.shape) != _significant(shape):
            raise self.error(f"tensor {name} has shape {info.shape}, expected {shape}")
        if info.type not in BLOCK_FORMATS:
            raise self.error(type_problem(info, self.reader.tensors.values()))
        self._uses[name] += 1
        return info

    def error(self, problem: str) -> FormatError:
        """The error to raise about this file."""
        return FormatError(self.reader.path, problem)


def _significant(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without dimensions of one before all others, of which files have any number: a row is a vector too."""
    first = next((place for place, size in enumerate(shape[:-1]) if size != 1), len(shape) - 1)
    return shape[first:]


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
