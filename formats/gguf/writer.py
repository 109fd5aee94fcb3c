"""Writing a model."""

import errno
import os
import struct
from collections.abc import Collection
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Self

from qrun.formats.blocks import BLOCK_SIZES, TensorType
from qrun.formats.dataclass import dataclass
from qrun.formats.gguf.cursor import quote
from qrun.formats.gguf.file import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, MAX_DIMS, VERSIONS, TensorInfo, align
from qrun.formats.gguf.metadata import ValueType, encode_string, encode_value
from qrun.formats.gguf.reader import GGUFReader
from qrun.formats.gguf.split import SPLIT_COUNT, SPLIT_KEYS, SPLIT_NO, SPLIT_TENSORS, part_name
from qrun.formats.whole_file import naming_file, temporary_name
from qrun.formats.write_behind import WriteBehind


@dataclass
class _Tensor:
    name: str
    type: TensorType
    shape: tuple[int, ...]
    n_bytes: int
    offset: int  # from the start of the data
    written: int = 0


class GGUFWriter:
    """Writes a GGUF file: all metadata, then a description of all tensors, then their data in pieces of any size.

        with GGUFWriter("model.gguf") as writer:
            writer.set_metadata("general.architecture", "llama", ValueType.STRING)
            writer.set_metadata("tokenizer.ggml.tokens", ["<s>", "</s>"], ValueType.ARRAY, ValueType.STRING)
            writer.add_tensor("output.weight", TensorType.F16, (32000, 576))
            writer.write_tensor("output.weight", rows)

    path: where it is written. version: 2 or 3, of the format.

    The file grows under a temporary name beside its target, takes its name when it is complete, and is removed if an
    exception leaves the `with`. Misuse raises ValueError; a disk that is full, OSError with the target's name.
    """

    def __init__(self, path: str | os.PathLike[str], version: int = 3) -> None:
        if version not in VERSIONS:
            raise ValueError(f"GGUF version {version} cannot be written, only versions 2 and 3")
        self.path = Path(path)
        self.version = version
        self._metadata: dict[str, bytes] = {}
        self._tensors: dict[str, _Tensor] = {}
        self._unwritten: list[_Tensor] = []  # the next one last
        self._file: BinaryIO | None = None
        self._disk = WriteBehind()
        self._target = Path(os.path.realpath(path))  # of a link, what it points to
        self._temporary = temporary_name(self._target)
        self._header_end = 0
        self._finished = False

    @classmethod
    def from_reader(cls, path: str | os.PathLike[str], reader: GGUFReader) -> Self:
        """A writer that has a reader's version and metadata, byte for byte, and as yet no tensors.

        A split model becomes one file: what its parts say of the split is left out.
        """
        writer = cls(path, reader.version)
        for key in reader.metadata:
            if len(reader.parts) == 1 or key not in SPLIT_KEYS:
                writer._metadata[key] = reader.parts[0].metadata.encoded(key)
        return writer

    @property
    def alignment(self) -> int:
        """In bytes; set it as the metadata `general.alignment`, before the first tensor is added."""
        encoded = self._metadata.get(ALIGNMENT_KEY)
        return int.from_bytes(encoded[4:], "little") if encoded else DEFAULT_ALIGNMENT

    def set_metadata(self, key: str, value: Any, type: ValueType, item_type: ValueType | None = None) -> None:
        """Add a value, or put it in the place of the one that the key has.

        type: as what it is written. item_type: of the items of an array. The items of arrays within an array are NumPy
        arrays or lists of strings. Raises ValueError for a value that the type cannot hold, for an alignment that is no
        power of two, and once the header is written.
        """
        self._check_settable(key)
        if key == ALIGNMENT_KEY and (type != ValueType.UINT32 or value < 1 or value & (value - 1)):
            raise ValueError(f"{key} must be a power of two of type UINT32, not {value}")
        self._metadata[key] = encode_value(value, type, item_type)

    def remove_metadata(self, key: str) -> None:
        """Take a value out. Raises KeyError if there is none."""
        self._check_settable(key)
        del self._metadata[key]

    def add_tensor(self, name: str, type: TensorType, shape: tuple[int, ...]) -> None:
        """Describe the next tensor.

        name: that nothing else has. type: of its blocks. shape: in NumPy's order, [rows, weights of a row]. Raises
        ValueError for a name that is there, rows that are no whole number of blocks, and once the header is written.
        """
        self._check_header_open()
        block_size, block_bytes = BLOCK_SIZES[type]
        if name in self._tensors:
            raise ValueError(f"there is a tensor {quote(name)} already")
        if len(shape) > MAX_DIMS or any(n < 0 for n in shape) or (shape[-1] if shape else 1) % block_size:
            raise ValueError(f"tensor {quote(name)} cannot have the shape {shape} in type {type.name}")
        last = next(reversed(self._tensors.values()), None)
        offset = align(last.offset + last.n_bytes, self.alignment) if last else 0
        n_bytes = prod(shape) // block_size * block_bytes
        self._tensors[name] = _Tensor(name, type, tuple(shape), n_bytes, offset)

    @property
    def n_bytes(self) -> int:
        """Of the whole file, as far as it is described."""
        last = next(reversed(self._tensors.values()), None)
        data = align(last.offset + last.n_bytes, self.alignment) if last else 0
        return align(len(self._header()), self.alignment) + data

    def write_tensor(self, name: str, data: Any) -> None:
        """Append bytes to a tensor: a contiguous array or anything else with a buffer, all of the tensor or a part.

        Tensors are written in the order in which they were added, each whole before the next begins. Raises ValueError
        for another than the next one, or for more bytes than it has.
        """
        file = self._begin()
        view = memoryview(data)
        if view.nbytes == 0:  # all there is of a tensor without weights, which counts as written from the start
            return
        if not self._unwritten or self._unwritten[-1].name != name:
            expected = quote(self._unwritten[-1].name) if self._unwritten else "none"
            raise ValueError(f"tensor {quote(name)} is not the next to be written, which is {expected}")
        tensor = self._unwritten[-1]
        if tensor.written + view.nbytes > tensor.n_bytes:
            raise ValueError(f"tensor {quote(name)} has {tensor.n_bytes} bytes, and more were written")
        with naming_file(self.path):
            file.write(view.cast("B"))
            tensor.written += view.nbytes
            self._finish_tensors(file)
            self._disk.wrote(file, view.nbytes)

    def copy_tensors(self, reader: GGUFReader) -> None:
        """Describe and write all tensors of a reader.

        The data of a single file is copied as it lies, with whatever is between and after the tensors: together with
        from_reader that gives a file of the same bytes. Parts of a split model are joined, one tensor after another.
        """
        self._check_header_open()
        source = reader.parts[0]
        if len(reader.parts) > 1 or self.alignment != source.alignment or self._tensors:
            self._append_tensors(reader.tensors.values())
            return
        for tensor in source.tensors.values():
            offset, n_bytes = tensor.offset - source.data_start, tensor.n_bytes
            self._tensors[tensor.name] = _Tensor(tensor.name, tensor.type, tensor.shape, n_bytes, offset, n_bytes)
        file = self._begin()
        start = source.data_start
        if self._header_end == source.header_end:
            # Unchanged so far, so the padding is the file's own too: it may be other than zeros, or missing at the end.
            start = file.seek(source.header_end)
            file.truncate()
        with naming_file(self.path):
            file.write(memoryview(source.data)[start:])

    def _append_tensors(self, tensors: Collection[TensorInfo]) -> None:
        for tensor in tensors:
            self.add_tensor(tensor.name, tensor.type, tensor.shape)
        for tensor in tensors:
            self.write_tensor(tensor.name, tensor.raw)

    def close(self) -> None:
        """Complete the file and give it its name. Raises ValueError if a tensor has not been written in full."""
        if self._finished:
            return
        try:
            file = self._begin()
            if self._unwritten:
                raise ValueError(f"tensor {quote(self._unwritten[-1].name)} has not been written in full")
            with naming_file(self.path):
                self._disk.finish(file)  # or a crash could leave the name on a file whose data never reached the disk
                self._disk.stop()
                file.close()
                os.replace(self._temporary, self._target)
            self._finished = True
        finally:
            self.abort()

    def abort(self) -> None:
        """Give up: remove what has been written, and leave the target as it was."""
        if self._file is not None and not self._finished:
            self._disk.stop()
            with suppress(OSError):  # a full disk does not take what is still in the buffer either
                self._file.close()
            self._temporary.unlink(missing_ok=True)
        self._finished = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *rest: object) -> None:
        if exception_type is None:
            self.close()
        else:
            self.abort()

    def _check_header_open(self) -> None:
        if self._file is not None or self._finished:
            raise ValueError("the header is written already: metadata and tensors are added before the first data")

    def _check_settable(self, key: str) -> None:
        self._check_header_open()
        if key == ALIGNMENT_KEY and self._tensors:
            raise ValueError(f"{key} cannot change once tensors are added: their offsets depend on it")

    def _begin(self) -> BinaryIO:
        """Open the file and write the header, the first time."""
        if self._finished:
            raise ValueError("the file is closed")
        if self._file is None:
            with naming_file(self.path):
                if self._target.exists() and not self._target.is_file():
                    raise OSError(errno.EINVAL, "is a folder or a device: name a file to write")
                self._file = open(self._temporary, "xb")  # noqa: SIM115 - closed by close() or abort()
                self._file.write(self._header())
                self._header_end = self._file.tell()
                self._pad(self._file)
                self._unwritten = list(reversed(self._tensors.values()))
                self._finish_tensors(self._file)
        return self._file

    def _header(self) -> bytes:
        parts = [struct.pack("<4sIQQ", MAGIC, self.version, len(self._tensors), len(self._metadata))]
        for key, encoded in self._metadata.items():
            parts += encode_string(key), encoded
        for tensor in self._tensors.values():
            n_dims = len(tensor.shape)
            layout = struct.pack(f"<I{n_dims}QIQ", n_dims, *reversed(tensor.shape), tensor.type, tensor.offset)
            parts += encode_string(tensor.name), layout
        return b"".join(parts)

    def _finish_tensors(self, file: BinaryIO) -> None:
        """Leave the tensors that are complete behind, those of no bytes among them."""
        while self._unwritten and self._unwritten[-1].written == self._unwritten[-1].n_bytes:
            self._unwritten.pop()
            self._pad(file)

    def _pad(self, file: BinaryIO) -> None:
        """Fill up with zeros."""
        end = align(file.tell(), self.alignment)
        file.truncate(end)
        file.seek(end)


def write_split(reader: GGUFReader, prefix: str | os.PathLike[str], max_bytes: int) -> list[Path]:
    """Write a model as parts PREFIX-00001-of-0000N.gguf, none with more than max_bytes of tensors unless one alone has.

    Returns the paths of the parts. They are complete one by one, not all at once.
    """
    groups: list[list[TensorInfo]] = [[]]
    size = 0
    for tensor in reader.tensors.values():
        if groups[-1] and size + tensor.n_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.n_bytes
    paths = [Path(part_name(os.fspath(prefix), no, len(groups))) for no in range(len(groups))]
    for no, (path, group) in enumerate(zip(paths, groups, strict=True)):
        with GGUFWriter.from_reader(path, reader) if no == 0 else GGUFWriter(path, reader.version) as writer:
            if no > 0 and ALIGNMENT_KEY in reader.metadata:
                writer.set_metadata(ALIGNMENT_KEY, reader.alignment, ValueType.UINT32)
            writer.set_metadata(SPLIT_NO, no, ValueType.UINT16)
            writer.set_metadata(SPLIT_COUNT, len(groups), ValueType.UINT16)
            writer.set_metadata(SPLIT_TENSORS, len(reader.tensors), ValueType.INT32)
            writer._append_tensors(group)
    return paths
