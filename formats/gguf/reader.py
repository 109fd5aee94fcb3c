"""Reading a model."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from qrun.formats.gguf.file import GGUFFile, TensorInfo
from qrun.formats.gguf.metadata import ValueType
from qrun.formats.gguf.split import open_parts
from qrun.formats.gguf.strings import Strings


class GGUFReader:
    """A GGUF file of version 2 or 3, little-endian, or all files of a split model of which the first is named.

    Opening reads and checks the headers and maps the data. It raises FormatError, naming the file, the byte and the
    matter, unless every count, length, type, shape and offset is right: all tensors lie within their file and none
    overlaps another. Strings of the vocabulary are decoded when they are first asked for.

    alone: open the named file only, whichever part of a split model it is: to look at it, not to run it.

    path: as given. files: the paths of all parts. parts: the files themselves. version, alignment: of the first.
    metadata: of the first, see `Metadata`. metadata_types: of each value and, if that is an array, of its items.
    tensors: of all parts, by name, in file order.
    """

    def __init__(self, path: str | os.PathLike[str], *, alone: bool = False) -> None:
        self.path = Path(path)
        self.parts: tuple[GGUFFile, ...] = (GGUFFile(self.path),) if alone else tuple(open_parts(self.path))
        first = self.parts[0]
        self.files: tuple[Path, ...] = tuple(part.path for part in self.parts)
        self.version = first.version
        self.alignment = first.alignment
        self.metadata: Mapping[str, Any] = first.metadata
        self.metadata_types: Mapping[str, tuple[ValueType, ValueType | None]] = first.metadata.types
        self.tensors: Mapping[str, TensorInfo] = {
            name: tensor for part in self.parts for name, tensor in part.tensors.items()
        }

    def raw_strings(self, key: str) -> list[bytes]:
        """The items of an array of strings, not decoded: quick, for those who want the bytes of tokens.

        Raises KeyError if there is no such key, FormatError if its value is not an array of strings.
        """
        return list(self.strings(key))

    def strings(self, key: str) -> Strings:
        """The items of an array of strings, not decoded, and without an object for each until it is asked for: for
        those who want a few of very many. They outlive this reader. Errors are those of `raw_strings`."""
        return self.parts[0].metadata.strings(key)

    def close(self) -> None:
        """Unmap the files. A TensorInfo that is still held keeps its own file mapped until it goes."""
        self.tensors = {}
        for part in self.parts:
            part.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
