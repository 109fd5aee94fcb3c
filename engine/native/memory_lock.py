"""Keeping weights in memory: pages that the system may not take back, to read them from the disk again later."""

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Iterable

import numpy as np

from qrun.engine.native.machine import memory

PIECE = 1 << 26
"""Bytes that are locked at a time. They are read meanwhile, and Ctrl-C has to wait for that."""

Lock = Callable[[int, int], int]
"""Locks bytes from an address on. Returns 0, or the system's number of an error."""


def lock_in_memory(files: Iterable[mmap.mmap]) -> str | None:
    """Read mapped files whole, and keep them in memory for as long as they are mapped.

    Returns None, or in a line why not all of them are. What could be locked stays locked.
    """
    arrays = [np.frombuffer(file, np.uint8) for file in files]
    total, done = sum(array.size for array in arrays), 0
    room, lock = memory().room, system_lock()
    if lock is None:
        return "the weights are not locked in memory: not supported on this system"
    if room is not None and total > room:  # other programs, or this one, would be ended for it
        return f"the weights are not locked in memory: they take {_megabytes(total)}, and {_megabytes(room)} are free"
    for array in arrays:
        for start in range(0, array.size, PIECE):
            size = min(PIECE, array.size - start)
            if number := lock(int(array.ctypes.data) + start, size):
                what = f"{_megabytes(done)} of {_megabytes(total)} of the weights are locked in memory"
                return f"{what}: {os.strerror(number)}{_limit()}"
            done += size
    return None


def system_lock() -> Lock | None:
    """The system's own; None where it is not known how to ask for it."""
    if sys.platform == "win32":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    mlock = getattr(library, "mlock", None)
    if mlock is None:
        return None
    mlock.argtypes = ctypes.c_void_p, ctypes.c_size_t
    return lambda address, size: ctypes.get_errno() if mlock(address, size) else 0


def _limit() -> str:
    if sys.platform == "win32":
        return ""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "" if limit == resource.RLIM_INFINITY else f" (this user may lock {_megabytes(limit)}: see ulimit -l)"


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"
