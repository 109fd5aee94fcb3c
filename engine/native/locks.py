"""What a child process (`os.fork`) does about the threads of its parent, which it does not have: locks that they held
are free in it, and what else they left is put right."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol


class Forked(Protocol):
    """What has to be told of a fork."""

    def leave_parent(self) -> None:
        """This is a child process now, which has one thread yet. Must be quick, take no lock, and not raise."""


def tell_of_forks(one: Forked) -> None:
    """Have `leave_parent` called in each child process, as long as it lives."""
    _told.add(one)


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
        tell_of_forks(self)

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

    def leave_parent(self) -> None:
        if self._lock.acquire(blocking=False):
            self._lock.release()
        else:
            self.abandoned = True
            self._lock = threading.RLock()


_told: weakref.WeakSet[Forked] = weakref.WeakSet()


def _leave_parent() -> None:
    for one in list(_told):
        one.leave_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_parent)
