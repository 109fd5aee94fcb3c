"""One GGUF file, mapped and checked.

    magic "GGUF" | uint32 version | uint64 tensor count | uint64 pair count
    pairs:     string key | uint32 type | value
    tensors:   string name | uint32 n_dims | uint64 dimensions, the shortest stride first | uint32 type | uint64 offset
    padding up to a multiple of `general.alignment`, then the data of the tensors, to which the offsets are relative

All numbers are little-endian. Versions 2 and 3 differ in nothing else than that 3 may also be big-endian.
"""

from contextlib import suppress
from math import prod
from pathlib import Path
from typing import NamedTuple

from qrun.formats.blocks import BLOCK_FORMATS, BLOCK_SIZES, TensorType, dequantize
from qrun.formats.blocks.layout import F32Array, U8Array
from qrun.formats.dataclass import dataclass
from qrun.formats.errors import FormatError
from qrun.formats.gguf.cursor import Cursor, quote
from qrun.formats.gguf.metadata import MIN_PAIR_BYTES, Metadata, Span, ValueType, read_span
from qrun.formats.mapping import bytes_of, describe_start, map_file

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4  # GGML_MAX_DIMS
MIN_TENSOR_BYTES = 8 + 4 + 4 + 8  # length of the name, n_dims, type, offset: the least that a description takes


@dataclass(frozen=True, eq=False)
class TensorInfo:
    """A tensor in a file.

    name: as the file has it. type: how its weights are encoded. shape: in NumPy's order: a matrix of 1536 rows of 576
    weights each is (1536, 576). n_bytes: its size. offset: of its first byte in `file`. raw: uint8 [n_bytes], a view of
    the mapped file, read-only: nothing is read before it is touched.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    n_bytes: int
    offset: int
    file: Path
    raw: U8Array

    def dequantize(self) -> F32Array:
        """The weights, float32 [*shape]. Raises FormatError if they are of a type that cannot be decoded."""
        if self.type not in BLOCK_FORMATS:
            reason = f"tensor {quote(self.name)} is of type {self.type.name}, which cannot be decoded"
            raise FormatError(self.file, reason, self.offset)
        return dequantize(self.raw, self.type, self.shape)


class _Layout(NamedTuple):
    """What the header says of a tensor."""

    type: TensorType
    shape: tuple[int, ...]
    relative: int  # offset from the start of the data
    described_at: int


def align(position: int, alignment: int) -> int:
    return position + -position % alignment


class GGUFFile:
    """A file's header, parsed, and its data, mapped. Raises FormatError unless everything in it holds together.

    header_end, data_start: bytes from the start of the file, to the end of the last description of a tensor and to
    where the data of tensors may begin.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = map_file(path)
        cursor = Cursor(path, self.data)
        self.version = _read_version(cursor)
        n_tensors = cursor.u64("the tensor count")
        n_pairs = cursor.u64("the metadata count")
        spans = _read_pairs(cursor, n_pairs)
        self.metadata = Metadata(path, self.data, spans)
        self.alignment = _alignment(cursor, spans.get(ALIGNMENT_KEY))
        layouts = _read_layouts(cursor, n_tensors)
        self.header_end = cursor.position
        self.data_start = align(self.header_end, self.alignment)
        raw = bytes_of(self.data)
        self.tensors = {name: self._tensor(name, layout, raw) for name, layout in layouts.items()}
        self._check_overlap()

    def close(self) -> None:
        """Give the map back, unless someone still holds a tensor of it: then it goes with the last of those."""
        self.tensors = {}
        with suppress(BufferError):
            self.data.close()

    def _tensor(self, name: str, layout: _Layout, raw: U8Array) -> TensorInfo:
        type, shape, relative, described_at = layout
        block_size, block_bytes = BLOCK_SIZES[type]
        n_bytes = prod(shape) // block_size * block_bytes
        offset = self.data_start + relative
        end = offset + n_bytes
        if relative % self.alignment:
            reason = f"tensor {quote(name)} has the offset {relative}, not a multiple of {self.alignment}"
            raise FormatError(self.path, reason, described_at)
        if end > len(raw):
            reason = f"tensor {quote(name)} would end at byte {end}, but the file has only {len(raw)}: it is damaged, "
            raise FormatError(self.path, reason + "or its download was cut short", described_at)
        return TensorInfo(name, type, shape, n_bytes, offset, self.path, raw[offset:end])

    def _check_overlap(self) -> None:
        end, last = self.data_start, ""
        for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.n_bytes == 0:
                continue
            if tensor.offset < end:
                reason = f"tensors {quote(last)} and {quote(tensor.name)} overlap"
                raise FormatError(self.path, reason, tensor.offset)
            end, last = tensor.offset + tensor.n_bytes, tensor.name


def _read_version(cursor: Cursor) -> int:
    magic = cursor.data[: len(MAGIC)]
    if magic != MAGIC:
        raise cursor.error(f"this is not a GGUF file; {describe_start(cursor.data[:32])}")
    cursor.skip(len(MAGIC), "the magic")
    version = cursor.u32("the version")
    if version in VERSIONS:
        return version
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise cursor.error("this is a big-endian GGUF file, and only little-endian ones are supported", 4)
    if version == 1:
        raise cursor.error("GGUF version 1 is no longer in use: get the model again as version 3", 4)
    raise cursor.error(f"GGUF version {version} is not known, only versions 2 and 3", 4)


def _read_pairs(cursor: Cursor, count: int) -> dict[str, Span]:
    cursor.require(count * MIN_PAIR_BYTES, f"the metadata of {count} pairs")
    spans: dict[str, Span] = {}
    for _ in range(count):
        start = cursor.position
        key = cursor.string("a metadata key")
        if key in spans:
            raise cursor.error(f"there are two metadata keys {quote(key)}", start)
        spans[key] = read_span(cursor, f"metadata {quote(key)}")
    return spans


def _alignment(cursor: Cursor, span: Span | None) -> int:
    if span is None:
        return DEFAULT_ALIGNMENT
    alignment = int.from_bytes(cursor.data[span.start + 4 : span.start + 8], "little")
    if span.type != ValueType.UINT32 or alignment == 0 or alignment & (alignment - 1):
        raise cursor.error(f"{ALIGNMENT_KEY} is not a power of two of type UINT32", span.start)
    return alignment


def _read_layouts(cursor: Cursor, count: int) -> dict[str, _Layout]:
    cursor.require(count * MIN_TENSOR_BYTES, f"the description of {count} tensors")
    layouts: dict[str, _Layout] = {}
    for _ in range(count):
        start = cursor.position
        name = cursor.string("a tensor name")
        if name in layouts:
            raise cursor.error(f"there are two tensors named {quote(name)}", start)
        layouts[name] = _Layout(*_read_shape(cursor, f"tensor {quote(name)}"), cursor.u64("a tensor offset"), start)
    return layouts


def _read_shape(cursor: Cursor, what: str) -> tuple[TensorType, tuple[int, ...]]:
    n_dims = cursor.u32(what)
    if n_dims > MAX_DIMS:
        raise cursor.error(f"{what} has {n_dims} dimensions, more than {MAX_DIMS}", cursor.position - 4)
    ne = [cursor.u64(what) for _ in range(n_dims)]
    # Tensors lie within the file, so their sizes cannot overflow. But 0 times any number of weights takes no room.
    if prod(max(n, 1) for n in ne) >= 1 << 60:
        raise cursor.error(f"{what} has the impossible shape {tuple(ne)}")
    code = cursor.u32(what)
    try:
        type = TensorType(code)
    except ValueError:
        raise cursor.error(f"{what} has the unknown type {code}", cursor.position - 4) from None
    block_size, _ = BLOCK_SIZES[type]
    row = ne[0] if ne else 1
    if row % block_size:
        raise cursor.error(f"{what} has rows of {row} weights, not whole {type.name} blocks of {block_size}")
    return type, tuple(reversed(ne))
