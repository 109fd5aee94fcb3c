"""Reading a model's file into the page cache while the program is still busy otherwise.

A mapping is read as it is touched, and the threads that touch it wait meanwhile: each reads little ahead, and both of
them in turns look to the system like no order at all. Read in one go, a file of 800 MB that was not in the cache gave
its first token 0.15 s sooner (0.77 s instead of 0.92 s from the start of `Model.load`).
"""

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from qrun.engine.native.machine import memory

MIN_BYTES = 32_000_000
"""Less is read in no time."""
_CHUNK = 1 << 20
_SAMPLES = 32


def read_ahead(files: Sequence[Path], wanted: Callable[[], bool] = lambda: True) -> threading.Thread | None:
    """Begin to read files that are not in the page cache, in a thread that ends by itself, or once they are not wanted
    any more. None where they are in it, where they are small, where memory has no room for them all, or where the
    system does not tell or gives no thread."""
    if not hasattr(os, "RWF_NOWAIT"):  # Linux has it
        return None
    with suppress(OSError, RuntimeError):
        n_bytes = sum(os.path.getsize(file) for file in files)
        if n_bytes < MIN_BYTES or n_bytes > (memory().available or 0) or not any(map(_is_cold, files)):
            return None
        thread = threading.Thread(target=_read, args=(files, wanted), name="qrun-read-ahead", daemon=True)
        thread.start()
        return thread
    return None


def _is_cold(file: Path) -> bool:
    """Whether the page cache has less than half of a file. OSError where the file system cannot tell."""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        n_bytes = os.fstat(descriptor).st_size
        missing = 0
        for i in range(_SAMPLES):
            try:
                os.preadv(descriptor, [bytearray(1)], n_bytes * i // _SAMPLES, os.RWF_NOWAIT)
            except BlockingIOError:
                missing += 1
        return missing > _SAMPLES // 2
    finally:
        os.close(descriptor)


def _read(files: Sequence[Path], wanted: Callable[[], bool]) -> None:
    chunk = bytearray(_CHUNK)
    for file in files:
        with suppress(OSError), open(file, "rb", buffering=0) as opened:  # what is wrong with it, those find who use it
            while wanted() and opened.readinto(chunk):
                pass
