"""Locks that a child process (`os.fork`) finds free, though threads that it does not have held them in its parent."""

from __future__ import annotations

import os
import threading
import weakref


class ForkAwareLock:
    """A reentrant lock that is free in a child process, unless the very thread that forked held it.

    guarded: what must not be used again where a thread was left in the middle of changing it. There, taking the lock
    raises a RuntimeError that names this.
    """

    def __init__(self, guarded: str | None = None) -> None:
        self.abandoned = False
        """Whether this is a child process, and another thread held the lock when it came to be."""
        self._guarded = guarded
        self._lock = threading.RLock()
        _locks.add(self)

    def acquire(self, blocking: bool = True) -> bool:
        """Take the lock; False if it is taken and `blocking` is false."""
        if self.abandoned and self._guarded is not None:
            raise RuntimeError(f"{self._guarded} was in use by another thread when the process forked: begin another")
        return self._lock.acquire(blocking)

    def release(self) -> None:
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _renew(self) -> None:
        if self._lock.acquire(blocking=False):
            self._lock.release()
        else:
            self.abandoned = True
            self._lock = threading.RLock()


_locks: weakref.WeakSet[ForkAwareLock] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in list(_locks):
        lock._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
