"""The key-value pairs of a file: their types, and how a value is walked over, decoded and encoded.

A value is a number, a bool (one byte, 0 or 1), a string (uint64 length, then UTF-8 without a terminator), or an array
(uint32 type of its items, uint64 count, then the items without padding). An array may hold arrays.
"""

import mmap
import struct
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qrun.formats.errors import FormatError
from qrun.formats.gguf.cursor import Cursor, decode_text, quote
from qrun.formats.gguf.strings import Strings
from qrun.formats.mapping import FileMap


class ValueType(IntEnum):
    """A value's type as GGUF numbers it (`gguf_metadata_value_type`)."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


DTYPES: dict[ValueType, np.dtype[Any]] = {
    type: np.dtype(code)
    for type, code in {
        ValueType.UINT8: "u1",
        ValueType.INT8: "i1",
        ValueType.UINT16: "<u2",
        ValueType.INT16: "<i2",
        ValueType.UINT32: "<u4",
        ValueType.INT32: "<i4",
        ValueType.FLOAT32: "<f4",
        ValueType.BOOL: "?",
        ValueType.UINT64: "<u8",
        ValueType.INT64: "<i8",
        ValueType.FLOAT64: "<f8",
    }.items()
}

# Arrays within arrays, no deeper: files of today have none at all, and a hostile one must not exhaust the stack.
MAX_ARRAY_DEPTH = 16


# The least that they take in a file, so that a count can be checked before it is acted upon.
MIN_PAIR_BYTES = 8 + 4 + 1  # length of the key, type, value
MIN_ARRAY_BYTES = 4 + 8  # type of the items, count


class Span(NamedTuple):
    """Where a value lies: its type code at `start`, the value after it, up to `end`."""

    type: ValueType
    item_type: ValueType | None  # of an array
    start: int
    end: int


def read_span(cursor: Cursor, what: str) -> Span:
    """Step over a type code and its value, and check every part of it."""
    start = cursor.position
    type = _read_type(cursor, what)
    item_type = _skip_value(cursor, type, what)
    return Span(type, item_type, start, cursor.position)


def _read_type(cursor: Cursor, what: str) -> ValueType:
    code = cursor.u32(what)
    try:
        return ValueType(code)
    except ValueError:
        raise cursor.error(f"{what} has the unknown type {code}", cursor.position - 4) from None


def _skip_value(cursor: Cursor, type: ValueType, what: str, depth: int = 1) -> ValueType | None:
    if type == ValueType.STRING:
        cursor.skip(cursor.u64(what), what)
        return None
    if type != ValueType.ARRAY:
        _skip_numbers(cursor, type, 1, what)
        return None
    if depth > MAX_ARRAY_DEPTH:
        raise cursor.error(f"{what} nests arrays more than {MAX_ARRAY_DEPTH} deep")
    item_type = _read_type(cursor, what)
    count = cursor.u64(what)
    if item_type == ValueType.STRING:
        cursor.skip_strings(count, what)
    elif item_type == ValueType.ARRAY:
        cursor.require(count * MIN_ARRAY_BYTES, what)
        for _ in range(count):
            _skip_value(cursor, item_type, what, depth + 1)
    else:
        _skip_numbers(cursor, item_type, count, what)
    return item_type


def _skip_numbers(cursor: Cursor, type: ValueType, count: int, what: str) -> None:
    start = cursor.skip(count * DTYPES[type].itemsize, what)
    if type == ValueType.BOOL and (np.frombuffer(cursor.data, np.uint8, count, start) > 1).any():
        raise cursor.error(f"{what} is a bool that is neither 0 nor 1", start)


def _decode(cursor: Cursor, type: ValueType) -> Any:
    """The value at the cursor, which read_span has checked before."""
    if type == ValueType.STRING:
        return cursor.string("a string")
    if type != ValueType.ARRAY:
        start = cursor.skip(DTYPES[type].itemsize, "a number")
        return np.frombuffer(cursor.data, DTYPES[type], 1, start)[0].item()
    item_type, count = ValueType(cursor.u32("an array")), cursor.u64("an array")
    if item_type in DTYPES:
        start = cursor.skip(count * DTYPES[item_type].itemsize, "an array")
        # A copy: it is aligned, which the file need not be, and it outlives the map.
        array = np.frombuffer(cursor.data, DTYPES[item_type], count, start).copy()
        array.flags.writeable = False
        return array
    if item_type == ValueType.STRING:
        return [decode_text(raw) for raw in cursor.strings(count)]
    return [_decode(cursor, item_type) for _ in range(count)]


def encode_string(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def encode_value(value: Any, type: ValueType, item_type: ValueType | None = None) -> bytes:
    """The type code and the value. Raises ValueError if the value is not of that type or does not fit it."""
    if type == ValueType.STRING:
        encoded = encode_string(value)
    elif type == ValueType.ARRAY:
        if item_type is None:
            raise ValueError("an array needs the type of its items")
        encoded = _encode_array(value, item_type)
    else:
        encoded = _encode_numbers(value, type)
    return struct.pack("<I", type) + encoded


def _encode_array(items: Any, item_type: ValueType) -> bytes:
    if item_type == ValueType.STRING:
        encoded = b"".join(encode_string(item) for item in items)
    elif item_type == ValueType.ARRAY:
        encoded = b"".join(_encode_array(item, _infer_item_type(item)) for item in items)
    else:
        encoded = _encode_numbers(items, item_type)
    return struct.pack("<IQ", item_type, len(items)) + encoded


def _infer_item_type(items: Any) -> ValueType:
    """The type of the items of an array within an array, which a caller has no way to name."""
    if isinstance(items, np.ndarray):
        for type, dtype in DTYPES.items():
            if items.dtype == dtype:
                return type
    elif isinstance(items, list):
        return ValueType.STRING if all(isinstance(item, str | bytes) for item in items) else ValueType.ARRAY
    raise ValueError("an array within an array must be a NumPy array of numbers or bools, or a list")


def _encode_numbers(value: Any, type: ValueType) -> bytes:
    given = np.asarray(value)
    if given.dtype.kind not in "biuf":
        raise ValueError(f"a value of type {type.name} must be a number")
    encoded = given.astype(DTYPES[type])
    if encoded.dtype.kind != "f" and not np.array_equal(encoded, given):
        raise ValueError(f"a value does not fit {type.name}")
    return encoded.tobytes()


class Metadata(Mapping[str, Any]):
    """The key-value pairs of a file, each decoded when it is first asked for.

    Numbers, bools and strings are Python's own; an array of numbers or bools is a read-only NumPy array; an array of
    strings, or of arrays, is a list.
    """

    def __init__(self, path: Path, data: mmap.mmap, spans: Mapping[str, Span]) -> None:
        self._path = path
        self._data = data
        self._spans = spans
        self._values: dict[str, Any] = {}

    @property
    def types(self) -> dict[str, tuple[ValueType, ValueType | None]]:
        """The type of each value and, if that is an array, the type of its items."""
        return {key: (span.type, span.item_type) for key, span in self._spans.items()}

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            span = self._spans[key]
            self._values[key] = _decode(self._cursor(span), span.type)
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        return key in self._spans

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def strings(self, key: str) -> Strings:
        """The items of an array of strings, not decoded. Raises FormatError if the value is anything else."""
        span = self._spans[key]
        if span.item_type != ValueType.STRING:
            type = span.type if span.item_type is None else span.item_type
            raise FormatError(self._path, f"{quote(key)} is not an array of strings but of {type.name}", span.start)
        cursor = self._cursor(span)
        cursor.skip(4, "the type of the items")
        return cursor.strings(cursor.u64("an array"))

    def encoded(self, key: str) -> bytes:
        """The type code and value of a key, as they are in the file."""
        span = self._spans[key]
        self._check()
        return self._data[span.start : span.end]

    def _check(self) -> None:
        if isinstance(self._data, FileMap):
            self._data.check()

    def _cursor(self, span: Span) -> Cursor:
        self._check()
        cursor = Cursor(self._path, self._data)
        cursor.position = span.start + 4
        return cursor
