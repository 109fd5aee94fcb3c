"""Stepping through bytes that are not trusted."""

import mmap
import struct
from pathlib import Path

from qrun.formats.errors import FormatError

_read_u32 = struct.Struct("<I").unpack_from
_read_u64 = struct.Struct("<Q").unpack_from


def quote(name: str) -> str:
    """A name out of a file, fit for a message of one line."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def decode_text(raw: bytes) -> str:
    """Text out of a file. Bytes that are not UTF-8 become lone surrogates, so that nothing is lost (PEP 383)."""
    return raw.decode("utf-8", "surrogateescape")


class Cursor:
    """A position in a mapped file. No length is acted upon before it is checked against the bytes that remain.

    `what`, in the methods below, is what is being read, for the message of the FormatError.
    """

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0

    def error(self, reason: str, offset: int | None = None) -> FormatError:
        return FormatError(self.path, reason, self.position if offset is None else offset)

    def require(self, n_bytes: int, what: str) -> None:
        remaining = len(self.data) - self.position
        if n_bytes > remaining:
            raise self.error(f"{what} takes at least {n_bytes} bytes, but {remaining} remain in the file")

    def skip(self, n_bytes: int, what: str) -> int:
        """Step over n_bytes. Returns where they begin."""
        self.require(n_bytes, what)
        start = self.position
        self.position += n_bytes
        return start

    def u32(self, what: str) -> int:
        value: int = _read_u32(self.data, self.skip(4, what))[0]
        return value

    def u64(self, what: str) -> int:
        value: int = _read_u64(self.data, self.skip(8, what))[0]
        return value

    def string(self, what: str) -> str:
        length = self.u64(what)
        start = self.skip(length, what)
        return decode_text(self.data[start : self.position])

    def skip_strings(self, count: int, what: str) -> None:
        """Step over `count` strings. A vocabulary has hundreds of thousands, so this loop does as little as it can."""
        self.require(8 * count, what)
        data, position = self.data, self.position
        try:
            for _ in range(count):
                position += 8 + _read_u64(data, position)[0]
        except (struct.error, OverflowError):  # a length led past the end of the file, or of all addresses
            position = len(data) + 1
        if position > len(data):
            raise self.error(f"a string of {what} runs past the end of the file")
        self.position = position

    def strings(self, count: int) -> list[bytes]:
        """Read `count` strings, not decoded, which skip_strings has checked before."""
        data, position = self.data, self.position
        strings = []
        for _ in range(count):
            start = position + 8
            position = start + _read_u64(data, position)[0]
            strings.append(data[start:position])
        self.position = position
        return strings
