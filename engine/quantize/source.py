"""What a model file is made from: metadata, and tensors whose rows can be had in any order and from several threads.

A source holds no weights in memory. It says beforehand what every tensor is called, what type and shape it has, and
then hands out rows, decoded or as they are to be stored. A GGUF file is a source; so is everything else that can be
seen as one.
"""

from __future__ import annotations

import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qrun.formats import FormatError, GGUFReader, GGUFWriter, TensorInfo, TensorType, ValueType
from qrun.formats.blocks import BLOCK_SIZES, dequantize, quantize
from qrun.formats.gguf.cursor import quote

F32Array = NDArray[np.float32]
U8Array = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class SourceTensor(ABC):
    """One tensor of a source.

    name: as GGUF files have it. type: what it is stored as where it is to be copied. shape: in NumPy's order; its rows
    are counted over all dimensions but the last.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]

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

    def raw(self, start: int, end: int) -> U8Array:
        """The bytes of rows start to end in the tensor's type: uint8 [(end - start) * bytes of a row]."""
        return quantize(self.rows(start, end), self.type)

    def forget(self) -> None:  # noqa: B027 - a source that maps no file has nothing to do
        """Let the system take back the memory in which the tensor is mapped: else a whole file would stay in it."""

    @abstractmethod
    def error(self, reason: str) -> FormatError:
        """The error to raise: it names the file, the place in it and the tensor, of which `reason` says the rest."""


class Source(Protocol):
    """A model that can be converted.

    path: for messages, and to name the result after. files: all that belong to it, never to be written over.
    metadata: in order. metadata_types: of each value and, if that is an array, of its items. tensors: by name, in the
    order in which they are written.
    """

    @property
    def path(self) -> Path: ...

    @property
    def files(self) -> Sequence[Path]: ...

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    @property
    def metadata_types(self) -> Mapping[str, tuple[ValueType, ValueType | None]]: ...

    @property
    def tensors(self) -> Mapping[str, SourceTensor]: ...

    def writer(self, path: str | os.PathLike[str]) -> GGUFWriter:
        """A writer that has all metadata, and as yet no tensors."""

    def close(self) -> None:
        """Give back what is open. The tensors cannot be read any more."""


@dataclass(frozen=True, eq=False)
class GGUFTensor(SourceTensor):
    """A tensor in a GGUF file, which `data` maps."""

    info: TensorInfo
    data: mmap.mmap

    def rows(self, start: int, end: int) -> F32Array:
        return dequantize(self.raw(start, end), self.type, (end - start, self.row))

    def raw(self, start: int, end: int) -> U8Array:
        row_bytes = self.n_bytes // self.n_rows if self.n_rows else 0
        return self.info.raw[start * row_bytes : end * row_bytes]

    def forget(self) -> None:
        forget_pages(self.data, self.info.offset, self.info.n_bytes)

    def error(self, reason: str) -> FormatError:
        return FormatError(self.info.file, f"tensor {quote(self.name)} {reason}", self.info.offset)


class GGUFSource:
    """A GGUF file, or all files of a split model, as a source. It closes the reader that it is made of."""

    def __init__(self, reader: GGUFReader) -> None:
        self.reader = reader
        self.path = reader.path
        self.files = reader.files
        self.metadata = reader.metadata
        self.metadata_types = reader.metadata_types
        data = {part.path: part.data for part in reader.parts}
        self.tensors = {
            name: GGUFTensor(name, info.type, info.shape, info, data[info.file])
            for name, info in reader.tensors.items()
        }

    def writer(self, path: str | os.PathLike[str]) -> GGUFWriter:
        """Has the metadata byte for byte as they are."""
        return GGUFWriter.from_reader(path, self.reader)

    def close(self) -> None:
        self.tensors = {}
        self.reader.close()


def forget_pages(data: mmap.mmap, offset: int, n_bytes: int) -> None:
    """Let the system take back the pages of these bytes of a map, where it can be told so."""
    if hasattr(mmap, "MADV_DONTNEED") and n_bytes:
        start = offset - offset % mmap.PAGESIZE
        with suppress(OSError, ValueError):
            data.madvise(mmap.MADV_DONTNEED, start, offset + n_bytes - start)
