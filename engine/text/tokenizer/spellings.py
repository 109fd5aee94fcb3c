"""Which strings of a vocabulary are spelt so: an index made by NumPy in some milliseconds, where a dict of a quarter of
a million bytes takes fifty.

A string's hash says its slot in a table. Those whose slot another one has go to the next table, a smaller one, and what
is left in the end to a dict, with all of those whose hashes are equal. What a table names is compared with what was
asked for, so that the hash may be a simple one.
"""

import numpy as np
from numpy.typing import NDArray

from qrun.formats.gguf.strings import Strings

_WORD = 8  # bytes that are hashed together
_HASHED = 8 * _WORD  # of a string, no more bytes than these: the few that go on are told apart by the dict
_ROOM = 4  # slots for each string
_FEW = 256  # so many are left to the dict
_SHIFTS = (42, 28, 14, 0)  # of a hash, for the tables one after the other
_LENGTH_FACTOR, _WORD_FACTOR = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93
_64_BITS = (1 << 64) - 1
_MASKS = np.array([(1 << 8 * n) - 1 for n in range(_WORD + 1)], np.uint64)

Hashes = NDArray[np.uint64]


def hashes_of(strings: Strings) -> Hashes:
    """The hash of each string."""
    n_bytes = len(strings.data)
    data = np.zeros(n_bytes + _HASHED, np.uint8)
    data[:n_bytes] = np.frombuffer(strings.data, np.uint8)
    words = np.ndarray((n_bytes + _HASHED - _WORD,), "<u8", data, 0, (1,))  # one from every byte on
    hashes = strings.lengths.astype(np.uint64) * np.uint64(_LENGTH_FACTOR)
    longer: NDArray[np.intp] | slice = slice(None)
    starts, lengths = strings.starts, strings.lengths
    for place in range(0, _HASHED, _WORD):
        if place:
            longer = np.flatnonzero(strings.lengths > place)
            starts, lengths = strings.starts[longer] + place, strings.lengths[longer] - place
        if not len(starts):
            break
        mixed = (hashes[longer] ^ (words[starts] & _MASKS[np.minimum(lengths, _WORD)])) * np.uint64(_WORD_FACTOR)
        hashes[longer] = mixed ^ (mixed >> np.uint64(32))
    return hashes


def hash_of(string: bytes) -> int:
    """The same of one string."""
    value = len(string) * _LENGTH_FACTOR & _64_BITS
    for place in range(0, max(min(len(string), _HASHED), 1), _WORD):
        word = int.from_bytes(string[place : place + _WORD], "little")
        value = (value ^ word) * _WORD_FACTOR & _64_BITS
        value ^= value >> 32
    return value


class Spellings:
    """Finds strings by how they are spelt."""

    def __init__(self, strings: Strings) -> None:
        self._strings = strings
        self._hashes = hashes_of(strings)
        self._tables: list[NDArray[np.int32]] = []  # an id + 1 for each slot; 0: none
        self._others: dict[bytes, list[int]] = {}
        left = np.arange(len(strings), dtype=np.int32)
        others = [left[:0]]
        for shift in _SHIFTS:
            if len(left) <= _FEW:
                break
            table = np.zeros(1 << (_ROOM * len(left)).bit_length(), np.int32)
            slots = _slots(self._hashes[left], table, shift)
            table[slots] = left + 1
            self._tables.append(table)
            winners = table[slots] - 1
            beaten = winners != left
            left, winners = left[beaten], winners[beaten]
            same = self._hashes[left] == self._hashes[winners]
            others += [left[same], winners[same]]
            left = left[~same]
        for id in sorted(set(np.concatenate([*others, left]).tolist())):  # np.unique would import numpy.ma
            self._others.setdefault(strings[id], []).append(id)

    def all(self, spelling: bytes) -> list[int]:
        """The ids of all strings that are spelt so, in rising order."""
        if spelling in self._others:
            return self._others[spelling]
        if not self._tables:
            return []
        value = hash_of(spelling)
        for shift, table in zip(_SHIFTS, self._tables, strict=False):
            id = table.item(value >> shift & len(table) - 1) - 1
            if id >= 0 and self._strings[id] == spelling:
                return [id]
        return []

    def first(self, spelling: bytes) -> int | None:
        """The first string that is spelt so, if there is one."""
        return found[0] if (found := self.all(spelling)) else None

    def last(self, spelling: bytes) -> int | None:
        return found[-1] if (found := self.all(spelling)) else None

    def have(self, strings: Strings) -> bool:
        """Whether all of these are among them: certainly, if not; and if so, but for chance (one in 2^64)."""
        hashes = hashes_of(strings)
        for shift, table in zip(_SHIFTS, self._tables, strict=False):
            ids = table[_slots(hashes, table, shift)] - 1
            hashes = hashes[(ids < 0) | (self._hashes[ids] != hashes)]
        known = {hash_of(spelling) for spelling in self._others}
        return known.issuperset(hashes.tolist())

    def last_ids(self, strings: Strings) -> NDArray[np.int64]:
        """The id of the last string that is spelt as each of these, which are all among them."""
        hashes = hashes_of(strings)
        found = np.full(len(hashes), -1)
        left: NDArray[np.intp] | slice = slice(None)
        for shift, table in zip(_SHIFTS, self._tables, strict=False):
            wanted = hashes[left]
            ids = table[_slots(wanted, table, shift)] - 1
            found[left] = np.where(self._hashes[ids] == wanted, ids, -1)
            left = np.flatnonzero(found < 0)
        # Of those in the dict a table has the first, or one that is spelt otherwise and has the same hash.
        others = sorted((hash_of(spelling), ids[-1]) for spelling, ids in self._others.items())
        if others:
            values = np.array([value for value, _ in others], np.uint64)
            nearest = np.minimum(values.searchsorted(hashes), len(values) - 1)
            places = np.flatnonzero(values[nearest] == hashes)
            found[places] = np.array([id for _, id in others])[nearest[places]]
            shared = set(values[1:][values[1:] == values[:-1]].tolist())
            for place in places.tolist() if shared else ():
                if hashes.item(place) in shared and (id := self.last(strings[place])) is not None:
                    found[place] = id
        return found


def _slots(hashes: Hashes, table: NDArray[np.int32], shift: int) -> NDArray[np.intp]:
    return (hashes >> np.uint64(shift) & np.uint64(len(table) - 1)).astype(np.intp)
