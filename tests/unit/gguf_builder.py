"""Builds GGUF files byte by byte, right or wrong, with nothing of the code under test but its names for types."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from qrun.formats import TensorType, ValueType

FORMATS = {
    ValueType.UINT8: "<B",
    ValueType.INT8: "<b",
    ValueType.UINT16: "<H",
    ValueType.INT16: "<h",
    ValueType.UINT32: "<I",
    ValueType.INT32: "<i",
    ValueType.FLOAT32: "<f",
    ValueType.BOOL: "<B",
    ValueType.UINT64: "<Q",
    ValueType.INT64: "<q",
    ValueType.FLOAT64: "<d",
}


def string(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def scalar(type: ValueType, value: object) -> bytes:
    """A type code and a value."""
    encoded = string(value) if isinstance(value, str | bytes) else struct.pack(FORMATS[type], value)
    return struct.pack("<I", type) + encoded


def array(type: ValueType, items: Sequence[object]) -> bytes:
    """A type code and an array; the items of an array of arrays are what this function returns."""
    header = struct.pack("<IIQ", ValueType.ARRAY, type, len(items))
    return header + b"".join(
        item[4:] if type == ValueType.ARRAY and isinstance(item, bytes) else scalar(type, item)[4:] for item in items
    )


@dataclass
class Tensor:
    name: str | bytes
    type: TensorType | int
    ne: Sequence[int]  # the shortest stride first, as in the file
    data: bytes
    offset: int | None = None  # None: after the one before, aligned


def pad(data: bytes, alignment: int, filler: bytes) -> bytes:
    return data + filler * (-len(data) % alignment)


def build(
    pairs: Sequence[tuple[str | bytes, bytes]] = (),
    tensors: Sequence[Tensor] = (),
    *,
    version: int = 3,
    alignment: int = 32,
    filler: bytes = b"\0",
    n_pairs: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    """A file. `n_pairs` and `n_tensors` are what its header claims, if that is not to be the truth."""
    n_pairs = len(pairs) if n_pairs is None else n_pairs
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    header = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_pairs)
    for key, value in pairs:
        header += string(key) + value
    data = b""
    for tensor in tensors:
        offset = len(data) if tensor.offset is None else tensor.offset
        header += string(tensor.name) + struct.pack("<I", len(tensor.ne))
        header += struct.pack(f"<{len(tensor.ne)}QIQ", *tensor.ne, tensor.type, offset)
        data += pad(tensor.data, alignment, filler)
    return pad(header, alignment, filler) + data
