"""What Ctrl-C does in a chat at a terminal."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupts:
    """Ctrl-C stops an answer. A second one, or one during a command, interrupts what goes on. Any other is only noted,
    for the answer that is about to begin.

    No threading.Event notes it: a handler that comes while another one sets an event would wait for it for ever.
    """

    def __init__(self) -> None:
        self.noted = False
        """Whether one came since the last line was finished."""
        self._stop: Callable[[], Any] | None = None
        self._raises = False

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """While the body runs, Ctrl-C does what this class says."""
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def stopping(self, stop: Callable[[], Any]) -> Iterator[None]:
        """While the body runs, the first one calls `stop`, and the next raises KeyboardInterrupt."""
        self._stop = stop
        try:
            yield
        finally:
            self._stop = None

    @contextmanager
    def raised(self) -> Iterator[None]:
        """While the body runs, each raises KeyboardInterrupt."""
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        again, self.noted = self.noted, True
        if self._raises or (self._stop is not None and again):
            self._raises, self._stop = False, None
            raise KeyboardInterrupt
        if self._stop is not None:
            self._stop()
