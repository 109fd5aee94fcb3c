"""Blocks of memory that sequences share and give back: pages of the KV cache, and blocks of state beside it."""

from __future__ import annotations

from collections import deque
from dataclasses import field

import numpy as np
from numpy.typing import NDArray

from qrun.engine.program.arena import not_enough
from qrun.formats.dataclass import dataclass


@dataclass(eq=False)
class Page:
    memory: NDArray[np.uint8]
    references: int = 1

    @property
    def address(self) -> int:
        return int(self.memory.ctypes.data)


@dataclass
class PagePool:
    """Pages of one group. Those given back are kept for the next sequence.

    dropped: pages of sequences that went without `close`. The collector may take a sequence away at any time, in any
    thread, so nothing more is done then than to note its pages here.
    """

    page_bytes: int
    free: list[NDArray[np.uint8]] = field(default_factory=list)
    allocated: int = 0
    dropped: deque[Page] = field(default_factory=deque)

    @property
    def used_bytes(self) -> int:
        """What sequences hold."""
        return (self.allocated - len(self.free) - len(self.dropped)) * self.page_bytes

    def take(self) -> Page:
        while self.dropped:
            self.give_back(self.dropped.popleft())
        if self.free:
            return Page(self.free.pop())
        self.allocated += 1
        # Zeros: a position that was never written counts nothing in attention, but must be a finite number.
        try:
            whole = np.zeros(self.page_bytes + 64, np.uint8)
        except MemoryError:
            self.allocated -= 1
            raise not_enough(self.page_bytes, "what is kept of the next tokens") from None
        start = -int(whole.ctypes.data) % 64
        return Page(whole[start : start + self.page_bytes])

    def give_back(self, page: Page) -> None:
        page.references -= 1
        if page.references == 0:
            self.free.append(page.memory)
