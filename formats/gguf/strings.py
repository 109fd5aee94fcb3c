"""Arrays of strings: hundreds of thousands in a vocabulary, found and kept without a Python object for each.

Each is a uint64 length and then its bytes, so that where one begins follows from the one before it. But nearly every
length is below 256, seven zeros behind one byte, and what looks like that is found in all the bytes at once. Where each
such place leads to the next one, they are the strings, and nothing is left to chance.
"""

from collections.abc import Iterator, Sequence
from struct import Struct
from typing import overload

import numpy as np
from numpy.typing import NDArray

from qrun.formats.blocks.layout import U8Array

LENGTH_BYTES = 8
_read_length = Struct("<Q").unpack_from
_FEW = 64
"""So few are found one by one sooner."""
_WINDOW = 1 << 18
"""Bytes that are looked at together: a share of the second-level cache."""

Places = NDArray[np.int64]


class Strings(Sequence[bytes]):
    """The strings of an array. data: their bytes, with the lengths between them; starts, lengths: int64 [n], where in
    `data` each begins and how many bytes it has. In rising order; all share `data`."""

    def __init__(self, data: bytes, starts: Places, lengths: Places) -> None:
        self.data = data
        self.starts = starts
        self.lengths = lengths

    @classmethod
    def of(cls, strings: Sequence[bytes]) -> "Strings":
        lengths = np.fromiter(map(len, strings), np.int64, len(strings))
        starts = np.cumsum(lengths + LENGTH_BYTES) - lengths
        return cls(b"".join(part for string in strings for part in (bytes(LENGTH_BYTES), string)), starts, lengths)

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return self.some(index)
        start = int(self.starts[index])
        return self.data[start : start + int(self.lengths[index])]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.some(slice(None)))

    def some(self, which: Sequence[int] | slice) -> list[bytes]:
        """The strings of these numbers."""
        data, starts, lengths = self.data, self.starts[which], self.lengths[which]
        return [data[start:end] for start, end in zip(starts.tolist(), (starts + lengths).tolist(), strict=True)]


def find_strings(data: U8Array, position: int, count: int) -> tuple[Places, int]:
    """Where the bytes of `count` strings begin, of which the first length lies at `position`, and where the last ends.

    `data` has room for `count` lengths. Raises ValueError if a string runs past its end.
    """
    starts = np.empty(count, np.int64)
    found = 0
    while found < count:
        window = data[position : position + _WINDOW]
        if len(window) < LENGTH_BYTES:
            raise ValueError
        places = _short_lengths(window) if count - found > _FEW else np.empty(0, np.int64)
        follows = places + LENGTH_BYTES + window[places]
        # Places that lead from one to the next are a run, and each ends in one of these.
        run_ends = np.flatnonzero(np.append(follows[:-1] != places[1:], True)) if len(places) else places
        at = 0
        while found < count and at + LENGTH_BYTES <= len(window):
            first = int(places.searchsorted(at))
            if first < len(places) and places[first] == at:
                n = min(int(run_ends[run_ends.searchsorted(first)]) + 1 - first, count - found)
                starts[found : found + n] = places[first : first + n] + (position + LENGTH_BYTES)
                at = int(follows[first + n - 1])
                found += n
                if n >= _FEW:
                    continue
            # Long or empty strings, which a file may have very many of.
            plain_until = min(found + _FEW, count)
            while found < plain_until and at + LENGTH_BYTES <= len(window):
                starts[found] = position + at + LENGTH_BYTES
                at += LENGTH_BYTES + _read_length(window.data, at)[0]
                found += 1
        position += at
        if position > len(data):
            raise ValueError
    return starts, position


def _short_lengths(window: U8Array) -> Places:
    """Where a length below 256 may lie, in rising order."""
    zero = window == 0
    two = zero[1:-6] & zero[2:-5]
    four = two & (zero[3:-4] & zero[4:-3])
    return np.flatnonzero(four & (zero[5:-2] & zero[6:-1]) & zero[7:])
