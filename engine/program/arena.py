"""One block of memory for all intermediate values, laid out by lifetime; and how memory of such a size is had."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qrun.engine.errors import NotEnoughMemory
from qrun.engine.native.machine import memory
from qrun.formats.dataclass import dataclass

ALIGNMENT = 64
LARGE_BYTES = 1 << 30
"""From here on the machine is asked whether it has so much: most systems promise more than they have."""


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

    def place(self, within: Arena | None = None, *, path: Path | None = None, what: str = "a step") -> None:
        """Largest first, each at the lowest offset where nothing that lives at the same time is in the way.

        within: an arena of a program that never runs at the same time, whose memory will do if it is large enough.
        path, what: of which model and for what they are, as `reserve` says it where there is not enough memory.
        """
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
            self._memory = reserve(self.size + ALIGNMENT, what, path)

    @property
    def address(self) -> int:
        start = int(self._memory.ctypes.data)
        return start + -start % ALIGNMENT


def reserve(n_bytes: int, what: str, path: Path | None = None) -> NDArray[np.uint8]:
    """Memory, as it comes. Raises NotEnoughMemory, which names the model and `what` takes it, if this machine has not
    so much."""
    total = memory().total if n_bytes >= LARGE_BYTES else None
    try:
        if total is not None and n_bytes > total:
            raise MemoryError
        return np.empty(n_bytes, np.uint8)
    except MemoryError:
        raise not_enough(n_bytes, what, path) from None


def rows_of(n: int, width: int) -> NDArray[np.float32]:
    """Float32 [n, width], the first row on a cache line's beginning, as it comes."""
    memory = np.empty(4 * n * width + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + 4 * n * width].view(np.float32).reshape(n, width)


def not_enough(n_bytes: int, what: str, path: Path | None = None) -> NotEnoughMemory:
    """The error to raise."""
    room = memory().room
    free = "" if room is None else f", and {room / 1e9:.1f} GB are free"
    where = "" if path is None else f"{path}: "
    return NotEnoughMemory(f"{where}not enough memory: {what} takes {n_bytes / 1e9:.1f} GB{free}")
