"""Getting a file to the disk while more of it is being made."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from concurrent.futures import Future

# So many bytes go to the disk at a time: few enough that the last part is soon done, and enough for any disk's pace.
PART_BYTES = 1 << 26

_sync = getattr(os, "fdatasync", os.fsync)  # not every system has the first


class WriteBehind:
    """Has a thread hand on to the disk what has been written, part by part, so that `finish` has little left to do.

    What fails there is an OSError of all later `wrote` and of `finish`.
    """

    def __init__(self) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._new = 0
        self._thread = ThreadPoolExecutor(1, "qrun-disk")
        self._running: Future[None] | None = None

    def wrote(self, file: BinaryIO, n_bytes: int) -> None:
        """Say that this many bytes more have been written to the file."""
        self._new += n_bytes
        if self._new >= PART_BYTES and (self._running is None or self._running.done()):
            self._take()
            self._new = 0
            file.flush()
            self._running = self._thread.submit(_sync, file.fileno())

    def finish(self, file: BinaryIO) -> None:
        """Return when all that has been written is on the disk."""
        self._take()
        file.flush()
        os.fsync(file.fileno())

    def stop(self) -> None:
        """End the thread, before the file is closed."""
        self._thread.shutdown()

    def _take(self) -> None:
        """Wait for the part that is under way. A failure stays: the system tells of it only once."""
        if self._running is not None:
            self._running.result()
            self._running = None
