"""Room on threads' stacks for kernels, which take up to 370 KB of one: programs may give their threads less."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NEEDED = 512 * 1024
"""Bytes. What systems give to a thread, if nobody asks for another size, is this or more."""
_GIVEN = 1 << 20  # to threads that run kernels, where a program gives less than is needed

_of_thread = threading.local()


def has_room() -> bool:
    """Whether this thread may run kernels."""
    known: bool | None = getattr(_of_thread, "has_room", None)
    if known is None:
        known = _of_thread.has_room = _stack_bytes() >= NEEDED
    return known


@contextmanager
def roomy_threads() -> Iterator[None]:
    """What is started meanwhile may run kernels."""
    before = threading.stack_size()
    if (before or _usual_bytes()) >= NEEDED:
        yield
        return
    threading.stack_size(_GIVEN)
    try:
        yield
    finally:
        threading.stack_size(before)


def _usual_bytes() -> int:
    """What a thread has if nobody says how much, and the first thread of a process: on Linux, the user's limit."""
    if sys.platform != "linux":
        return NEEDED
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return NEEDED if limit == resource.RLIM_INFINITY else limit


def _stack_bytes() -> int:
    """Of this thread, which may be another language's. Enough where the system does not say."""
    if threading.get_ident() == threading.main_thread().ident:
        return _usual_bytes()
    try:
        if sys.platform == "win32":
            return _windows()
        library: Any = ctypes.CDLL(None)
        library.pthread_self.restype = ctypes.c_void_p
        thread = ctypes.c_void_p(library.pthread_self())
        if sys.platform == "darwin":
            library.pthread_get_stacksize_np.restype = ctypes.c_size_t
            return int(library.pthread_get_stacksize_np(thread))
        return _linux(library, thread)
    except (OSError, AttributeError):
        return NEEDED


def _linux(library: Any, thread: ctypes.c_void_p) -> int:
    attributes = ctypes.create_string_buffer(256)  # pthread_attr_t has 56 bytes, or 64
    start, size = ctypes.c_void_p(), ctypes.c_size_t()
    if library.pthread_getattr_np(thread, attributes):
        return NEEDED
    failed = library.pthread_attr_getstack(attributes, ctypes.byref(start), ctypes.byref(size))
    library.pthread_attr_destroy(attributes)
    return NEEDED if failed else size.value


def _windows() -> int:
    low, high = ctypes.c_size_t(), ctypes.c_size_t()
    getattr(ctypes, "windll").kernel32.GetCurrentThreadStackLimits(  # noqa: B009 (mypy knows this name on Windows only)
        ctypes.byref(low), ctypes.byref(high)
    )
    return high.value - low.value
