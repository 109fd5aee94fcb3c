"""One block of memory for all intermediate values, laid out by lifetime."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

ALIGNMENT = 64


@dataclass(eq=False)
class Buffer:
    """`size` bytes that hold a value from operation `first` to `last`, inclusive. `offset` is set by the plan."""

    size: int
    first: int
    last: int
    offset: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.size


@dataclass(frozen=True)
class Place:
    """Rows of float32 (or packed columns) in a buffer: the bytes that they start at, and how far apart they are."""

    buffer: Buffer
    offset: int
    stride: int


class Arena:
    """Collects buffers, then places them: those whose lifetimes overlap do not overlap in memory."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.size = 0
        self._memory = np.empty(0, np.uint8)

    def buffer(self, size: int, first: int, last: int) -> Buffer:
        buffer = Buffer(-(-size // ALIGNMENT) * ALIGNMENT, first, last)
        self.buffers.append(buffer)
        return buffer

    def place(self, within: Arena | None = None) -> None:
        """Largest first, each at the lowest offset where nothing that lives at the same time is in the way.

        within: an arena of a program that never runs at the same time, whose memory will do if it is large enough."""
        alive: defaultdict[int, list[Buffer]] = defaultdict(list)  # at each operation, those that have been placed
        for buffer in sorted(self.buffers, key=lambda b: -b.size):
            lifetime = range(buffer.first, buffer.last + 1)
            others = {id(other): other for operation in lifetime for other in alive[operation]}
            offset = 0
            for other in sorted(others.values(), key=lambda b: b.offset):
                if offset + buffer.size <= other.offset:
                    break
                offset = max(offset, other.end)
            buffer.offset = offset
            for operation in lifetime:
                alive[operation].append(buffer)
        self.size = max((b.end for b in self.buffers), default=0)
        if within is not None and within.size >= self.size:
            self._memory = within._memory
        else:
            self._memory = np.empty(self.size + ALIGNMENT, np.uint8)

    @property
    def address(self) -> int:
        start = int(self._memory.ctypes.data)
        return start + -start % ALIGNMENT
