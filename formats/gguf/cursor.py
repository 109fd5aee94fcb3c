"""Stepping through bytes that are not trusted."""

import mmap
import re
import struct
from pathlib import Path

import numpy as np

from qrun.formats.errors import FormatError
from qrun.formats.gguf.strings import LENGTH_BYTES, Places, Strings, find_strings

_read_u32 = struct.Struct("<I").unpack_from
_read_u64 = struct.Struct("<Q").unpack_from

_SURROGATES = re.compile("[\ud800-\udfff]")


def quote(name: str) -> str:
    """A name out of a file, fit for a message of one line. Bytes that are not UTF-8 show as U+FFFD."""
    name = _SURROGATES.sub("\ufffd", name)
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

    def skip_strings(self, count: int, what: str) -> Places:
        """Step over `count` strings. Returns where each begins, in the file."""
        self.require(LENGTH_BYTES * count, what)
        try:
            starts, self.position = find_strings(np.frombuffer(self.data, np.uint8), self.position, count)
        except ValueError:
            raise self.error(f"a string of {what} runs past the end of the file") from None
        return starts

    def strings(self, count: int) -> Strings:
        """Read `count` strings, not decoded."""
        start = self.position
        starts = self.skip_strings(count, "an array")
        ends = np.append(starts[1:] - LENGTH_BYTES, self.position)[:count]
        return Strings(self.data[start : self.position], starts - start, ends - starts)
