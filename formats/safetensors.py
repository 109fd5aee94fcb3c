"""safetensors files, and folders that hold a checkpoint in one or several of them.

    uint64 length of the header | header: JSON | the tensors' bytes

The header is an object: name -> {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [begin, end]}, offsets from
the end of the header, and perhaps "__metadata__" -> an object of strings. Numbers are little-endian, rows lie one after
another. The tensors cover all bytes after the header, without overlap or gap, so that nothing can hide in a file
(https://github.com/huggingface/safetensors#format).
"""

import mmap
import re
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from qrun.formats.blocks.layout import U8Array
from qrun.formats.errors import FormatError
from qrun.formats.gguf.cursor import quote
from qrun.formats.json_file import parse_json, read_json
from qrun.formats.mapping import bytes_of, describe_start, forget_pages, map_file

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit
MAX_DIMS = 8
LENGTH_BYTES = 8
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_NAME = "adapter_model.safetensors"  # of PEFT
SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
# Files beside a model that are none: one of many, an adapter, Mistral's own format; and what a training leaves behind.
NO_MODEL = re.compile(r".*-\d+-of-\d+\.safetensors|adapter_model\.safetensors|consolidated.*\.safetensors")
NO_WEIGHTS = re.compile(r"training_args|optimizer|scheduler|rng_state|scaler")

# What NumPy has no type for (brain floats, floats of a byte) is read as unsigned integers of that size.
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(code)
    for name, code in {
        "BOOL": "?", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1", "I16": "<i2",
        "U16": "<u2", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "U32": "<u4", "F32": "<f4", "I64": "<i8",
        "U64": "<u8", "F64": "<f8",
    }.items()
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file. `raw` is a view of the mapped file: nothing is read before it is touched."""

    name: str
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    file: Path
    offset: int  # of the first byte, in its file
    raw: U8Array  # uint8 [n_bytes], read-only
    data: mmap.mmap

    def array(self) -> NDArray[Any]:
        """The numbers, of the NumPy type that DTYPES gives: [*shape]."""
        return self.raw.view(DTYPES[self.dtype]).reshape(self.shape)

    def forget(self) -> None:
        """Let the system take back the memory in which the tensor is mapped."""
        forget_pages(self.data, self.offset, len(self.raw))

    def error(self, reason: str) -> FormatError:
        return FormatError(self.file, f"tensor {quote(self.name)} {reason}", self.offset)


class SafetensorsFile:
    """A file, checked and mapped. Raises FormatError unless everything in its header holds together.

    tensors: by name, in the order of the header. metadata: the strings under "__metadata__".
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data = map_file(path)
        length = int.from_bytes(self._data[:LENGTH_BYTES], "little")
        self._start = LENGTH_BYTES + length
        header = self._read_header(length)
        self.metadata: dict[str, str] = self._strings(header.pop("__metadata__", {}))
        raw = bytes_of(self._data)
        self.tensors = {name: self._tensor(name, entry, raw) for name, entry in header.items()}
        self._check_cover()

    def close(self) -> None:
        """Give the map back, unless someone still holds a tensor of it: then it goes with the last of those."""
        self.tensors = {}
        with suppress(BufferError):
            self._data.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _error(self, reason: str, offset: int | None = None) -> FormatError:
        return FormatError(self.path, reason, offset)

    def _read_header(self, length: int) -> dict[str, Any]:
        n_bytes = len(self._data)
        if n_bytes < LENGTH_BYTES or self._data[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
            raise self._error(f"this is not a safetensors file; {describe_start(self._data[:32])}")
        if length > MAX_HEADER_BYTES:
            raise self._error(f"the header of {length} bytes is longer than {MAX_HEADER_BYTES}", 0)
        if length > n_bytes - LENGTH_BYTES:
            reason = f"the header of {length} bytes does not fit the file of {n_bytes}: its download was cut short"
            raise self._error(reason, 0)
        return parse_json(self.path, self._data[LENGTH_BYTES : self._start], offset=LENGTH_BYTES, unique=True)

    def _strings(self, metadata: Any) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._error("__metadata__ is not an object of strings", LENGTH_BYTES)
        return metadata

    def _tensor(self, name: str, entry: Any, raw: U8Array) -> StoredTensor:
        what = f"tensor {quote(name)}"
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._error(f"{what} is not described by dtype, shape and data_offsets", LENGTH_BYTES)
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._error(f"{what} is of the unknown type {quote(str(dtype))}", LENGTH_BYTES)
        if not _are_counts(shape) or len(shape) > MAX_DIMS or prod(max(n, 1) for n in shape) >= 1 << 60:
            raise self._error(f"{what} has the impossible shape {quote(str(shape))}", LENGTH_BYTES)
        if not _are_counts(offsets) or len(offsets) != 2:
            raise self._error(f"{what} has the impossible offsets {quote(str(offsets))}", LENGTH_BYTES)
        begin, end = offsets
        room = len(raw) - self._start
        if end > room:
            reason = f"{what} would end at byte {end} of the data, but the file has only {room}: it is damaged, "
            raise self._error(reason + "or its download was cut short", LENGTH_BYTES)
        if end - begin != prod(shape) * DTYPES[dtype].itemsize:
            reason = f"{what} of shape {tuple(shape)} and type {dtype} cannot have {end - begin} bytes"
            raise self._error(reason, LENGTH_BYTES)
        offset = self._start + begin
        return StoredTensor(name, dtype, tuple(shape), self.path, offset, raw[offset : self._start + end], self._data)

    def _check_cover(self) -> None:
        end, last = self._start, "the header"
        for tensor in sorted(self.tensors.values(), key=lambda tensor: (tensor.offset, len(tensor.raw))):
            if tensor.offset < end:
                raise self._error(f"{last} and tensor {quote(tensor.name)} overlap", tensor.offset)
            if tensor.offset > end:
                raise self._error(f"there is a gap between {last} and tensor {quote(tensor.name)}", end)
            end, last = tensor.offset + len(tensor.raw), f"tensor {quote(tensor.name)}"
        if end != len(self._data):
            raise self._error(f"{len(self._data) - end} bytes follow the last tensor", end)


class SafetensorsFolder:
    """The tensors of a checkpoint: of model.safetensors, or of the files that model.safetensors.index.json names, or of
    the only safetensors file that there is.

    An index beside model.safetensors counts for nothing, as in Transformers: it is left from before the model was saved
    anew. Raises FormatError if a file or a tensor is missing, or anything in a file is wrong. tensors: by name. files:
    all that were opened, the index among them.
    """

    def __init__(self, folder: Path, single: str = SINGLE_NAME) -> None:
        self.path = folder
        self.files: list[Path] = []
        self.tensors: dict[str, StoredTensor] = {}
        self._open: list[SafetensorsFile] = []
        index = folder / INDEX_NAME
        try:
            if (folder / single).is_file():
                self._add(folder / single)
            elif single == SINGLE_NAME and index.is_file():
                self._open_shards(index)
            elif single == SINGLE_NAME and (only := _only_file(folder)) is not None:
                self._add(only)
            else:
                raise _missing(folder, single)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unmap the files."""
        self.tensors = {}
        for file in self._open:
            file.close()

    def _add(self, path: Path) -> dict[str, StoredTensor]:
        file = SafetensorsFile(path)
        self._open.append(file)
        self.files.append(path)
        twice = next((name for name in file.tensors if name in self.tensors), None)
        if twice is not None:
            raise FormatError(path, f"tensor {quote(twice)} is in another file of the checkpoint too")
        self.tensors.update(file.tensors)
        return file.tensors

    def _open_shards(self, index: Path) -> None:
        self.files.append(index)
        shards: dict[str, list[str]] = {}
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise FormatError(index, '"weight_map" is missing, or no object')
        for name, shard in weight_map.items():
            # A name with a folder in it could lead anywhere.
            if not isinstance(shard, str) or shard != Path(shard).name or "\\" in shard or not shard.strip("."):
                raise FormatError(index, f"tensor {quote(name)} is said to be in {quote(str(shard))}, no file name")
            shards.setdefault(shard, []).append(name)
        for shard, names in sorted(shards.items()):
            path = self.path / shard
            if not path.is_file():
                raise FormatError(index, f"the file {quote(shard)}, which holds {len(names)} tensors, is missing")
            there = self._add(path)
            absent = next((name for name in names if name not in there), None)
            if absent is not None:
                raise FormatError(path, f"tensor {quote(absent)} is missing, which {index.name} says is here")


def _others(folder: Path) -> list[Path]:
    """Safetensors files that may hold a whole model, under names of their own."""
    files = (path for path in sorted(folder.glob("*.safetensors")) if path.is_file())
    return [path for path in files if not NO_MODEL.fullmatch(path.name)]


def _only_file(folder: Path) -> Path | None:
    others = _others(folder)
    return others[0] if len(others) == 1 and not any(folder.glob("*-of-*.safetensors")) else None


def _missing(folder: Path, name: str) -> FormatError:
    there = {path.name for path in folder.glob("*")}
    shard = min((other for other in there if SHARD.search(other)), default=None)
    reason = f"there is no {name}"
    if name != SINGLE_NAME:
        pass
    elif shard is not None:
        return FormatError(folder, f"there is {shard}, but no {INDEX_NAME} that lists all files")
    elif others := _others(folder):
        names = ", ".join(path.name for path in others[:8])
        return FormatError(folder, f"{reason}, and of several files it is not said which are meant: {names}")
    elif ADAPTER_NAME in there:
        return FormatError(folder, f"{reason}, only an adapter ({ADAPTER_NAME}), without its model")
    elif "weights.npz" in there:
        return FormatError(folder, f"{reason}, only weights.npz, as early versions of MLX have it, which is not read")
    elif any(other.startswith("consolidated") and other.endswith(".safetensors") for other in there):
        return FormatError(folder, f"{reason}, only a file with Mistral's own names of tensors, which are not known")
    if any(other.endswith((".bin", ".pt", ".pth")) and not NO_WEIGHTS.match(other) for other in there):
        reason += ", only files of PyTorch, which can hold programs and are not opened: get the model as safetensors"
    return FormatError(folder, reason)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)
