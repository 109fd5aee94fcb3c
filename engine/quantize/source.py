"""What a model file is made from: metadata, and tensors whose rows can be had in any order and from several threads.

A source holds no weights in memory. It says beforehand what every tensor is called, what type and shape it has, and
then hands out rows, decoded or as they are to be stored. A GGUF file is a source; so is everything else that can be
seen as one.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qrun.formats import FormatError, GGUFReader, GGUFWriter, TensorInfo, TensorType, ValueType
from qrun.formats.blocks import dequantize
from qrun.formats.blocks.floats import DTYPES, Floats, as_stored
from qrun.formats.gguf.cursor import quote
from qrun.formats.mapping import forget_pages
from qrun.formats.tensors import SourceTensor, TensorFile
from qrun.models.huggingface import CheckpointSource

__all__ = ["CheckpointSource", "GGUFSource", "GGUFTensor", "Source", "SourceTensor", "open_source"]

F32Array = NDArray[np.float32]
U8Array = NDArray[np.uint8]


class Source(TensorFile[SourceTensor], Protocol):
    """A model that can be converted.

    path: for messages, and to name the result after. files: all that belong to it, never to be written over.
    metadata: in order. metadata_types: of each value and, if that is an array, of its items. tensors: by name, in the
    order in which they are written; when the source is closed they cannot be read any more. notices: lines for whoever
    uses it, about what of it is not used, or may be wrong.
    """

    @property
    def notices(self) -> Sequence[str]: ...

    @property
    def metadata_types(self) -> Mapping[str, tuple[ValueType, ValueType | None]]: ...

    def writer(self, path: str | os.PathLike[str]) -> GGUFWriter:
        """A writer that has all metadata, and as yet no tensors."""


@dataclass(frozen=True, eq=False)
class GGUFTensor(SourceTensor):
    """A tensor in a GGUF file, which `data` maps."""

    info: TensorInfo
    data: mmap.mmap

    def rows(self, start: int, end: int) -> F32Array:
        return dequantize(self.raw(start, end), self.type, (end - start, self.row))

    def floats(self, start: int, end: int) -> Floats:
        if self.type in DTYPES:
            return as_stored(self.raw(start, end), self.type, self.row)
        return self.rows(start, end)

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
        self.notices: Sequence[str] = ()
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


# What a checkpoint may have been made in already, and is kept in unless another type is asked for.
KEPT_TYPES = (TensorType.NVFP4, TensorType.MXFP4, TensorType.Q8_0)


def open_source(path: Path, *, keep: bool = False) -> Source:
    """What lies there: a folder with a checkpoint, or a GGUF file. Raises FormatError if it is neither, or damaged.

    keep: weights that a checkpoint has in one of KEPT_TYPES are tensors of that, and not decoded.
    """
    return CheckpointSource(path, keep=keep) if path.is_dir() else GGUFSource(GGUFReader(path))

