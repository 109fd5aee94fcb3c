"""Tensors that are read row by row, whatever they are stored as."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from qrun.formats.blocks import BLOCK_SIZES, TensorType, quantize
from qrun.formats.blocks.floats import Floats
from qrun.formats.blocks.layout import F32Array, U8Array
from qrun.formats.dataclass import dataclass
from qrun.formats.errors import FormatError


class Described(Protocol):
    """A tensor as far as a header tells of it: `TensorInfo` of a GGUF file, `SourceTensor`."""

    @property
    def name(self) -> str: ...

    @property
    def type(self) -> TensorType: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


T_co = TypeVar("T_co", bound=Described, covariant=True)


def n_weights(tensors: Iterable[Described]) -> int:
    """How many weights they have together."""
    return sum(prod(tensor.shape) for tensor in tensors)


class TensorFile(Protocol[T_co]):
    """Metadata and tensors of a `GGUFReader`, or of anything that can be seen as one.

    path: for messages. files: all that belong to it.
    """

    @property
    def path(self) -> Path: ...

    @property
    def files(self) -> Sequence[Path]: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, T_co]: ...

    def close(self) -> None: ...


def text_of(file: TensorFile[Described], key: str) -> str | None:
    """The text that metadata have under a key. None where there is none, or another kind of value: an array cannot be
    compared with a text."""
    value = file.metadata.get(key)
    return value if isinstance(value, str) else None


@dataclass(frozen=True, eq=False)
class SourceTensor(ABC):
    """One tensor, whose rows can be had in any order and from several threads.

    type: what it is stored as where it is to be copied. shape: in NumPy's order; rows are counted over all dimensions
    but the last.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]

    @property
    def copyable(self) -> bool:
        """Are there bytes of it to be copied? If not, it is encoded, even to its own type."""
        return True

    @property
    def tensor_scale(self) -> np.float32:
        """What all weights are to be multiplied by, if its type has no place for that and a file has it beside them."""
        return np.float32(1)

    @property
    def row(self) -> int:
        """Weights in a row."""
        return self.shape[-1] if self.shape else 1

    @property
    def n_rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def n_bytes(self) -> int:
        """Of the whole tensor in its type."""
        block_size, block_bytes = BLOCK_SIZES[self.type]
        return prod(self.shape) // block_size * block_bytes

    @abstractmethod
    def rows(self, start: int, end: int) -> F32Array:
        """Rows start to end, decoded: float32 [end - start, row]. Raises FormatError if that cannot be done."""

    def floats(self, start: int, end: int) -> Floats:
        """Rows start to end as they are stored, if that is as floats of some kind, else decoded: [end - start, row]."""
        return self.rows(start, end)

    def raw(self, start: int, end: int) -> U8Array:
        """The bytes of rows start to end in the tensor's type: uint8 [(end - start) * bytes of a row]."""
        return quantize(self.rows(start, end), self.type)

    def forget(self) -> None:  # noqa: B027 - what maps no file has nothing to do
        """Let the system take back the memory in which the tensor is mapped: else a whole file would stay in it."""

    @abstractmethod
    def error(self, reason: str) -> FormatError:
        """The error to raise: it names the file, the place in it and the tensor, of which `reason` says the rest."""
