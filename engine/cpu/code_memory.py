"""Machine code in memory that may be run, and that nobody can write to any more.

No page is ever both to be written to and to be run, where the system lets a process have it so.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from typing import Any

_IS_ARM = os.name == "posix" and os.uname().machine in ("aarch64", "arm64")


class CodeMemory:
    """A copy of some machine code, at `address`, from a page's beginning on. OSError if the system refuses it.

    The memory goes with this object: whoever runs the code holds the object.
    """

    def __init__(self, code: bytes) -> None:
        if not code:
            raise ValueError("there is no code")
        allocate, release = (_allocate_windows, _release_windows) if sys.platform == "win32" else (_allocate, _release)
        self.size = -(-len(code) // mmap.PAGESIZE) * mmap.PAGESIZE
        """In bytes, whole pages."""
        self.address: int = allocate(code, self.size)
        # Not at exit: threads may be running it to the last.
        weakref.finalize(self, release, self.address, self.size).atexit = False


_NO_MEMORY = ctypes.c_void_p(-1).value
_MAP_JIT = 0x800  # macOS: pages that the thread may write to or run, in turns


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def _allocate(code: bytes, size: int) -> int:
    libc = _libc()
    address = _map(libc, size, mmap.PROT_READ | mmap.PROT_WRITE)
    try:
        ctypes.memmove(address, code, len(code))
        if libc.mprotect(address, size, mmap.PROT_READ | mmap.PROT_EXEC):
            raise _refused()
    except BaseException as error:
        libc.munmap(address, size)
        if not isinstance(error, OSError):
            raise
        if sys.platform == "darwin" and _IS_ARM:
            return _allocate_jit(libc, code, size)
        if not hasattr(os, "memfd_create"):
            raise
        return _allocate_file(libc, code, size, error)
    _forget_old_instructions(libc, address, size)
    return address


def _allocate_file(libc: Any, code: bytes, size: int, refusal: OSError) -> int:
    """Where no page that was written to may become one to run from (systemd's MemoryDenyWriteExecute, for one): the
    pages of a file in memory, of which this is the only map. Raises `refusal` if that is refused, too."""
    try:
        file = os.memfd_create("qrun kernels")
    except OSError:
        raise refusal from None
    try:
        os.truncate(file, size)
        if os.pwrite(file, code, 0) < len(code):
            raise refusal
        address = _map(libc, size, mmap.PROT_READ | mmap.PROT_EXEC, file=file)
    except OSError:
        raise refusal from None
    finally:
        os.close(file)
    _forget_old_instructions(libc, address, size)
    return address


def _map(libc: Any, size: int, protection: int, flags: int = 0, file: int = -1) -> int:
    flags |= mmap.MAP_PRIVATE | (mmap.MAP_ANONYMOUS if file < 0 else 0)
    address = libc.mmap(None, size, protection, flags, file, 0)
    if address is None or address == _NO_MEMORY:
        raise _refused()
    return int(address)


def _refused() -> OSError:
    code = ctypes.get_errno()
    return OSError(
        code,
        f"the system gives no memory that code may be run from: {os.strerror(code)} (SELinux, a sandbox or a service's "
        "settings can forbid it)",
    )


def _allocate_jit(libc: Any, code: bytes, size: int) -> int:
    """What macOS gives apps that are signed with the entitlement `allow-jit` alone. (Untried.)"""
    address = _map(libc, size, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC, _MAP_JIT)
    libc.pthread_jit_write_protect_np(0)
    try:
        ctypes.memmove(address, code, len(code))
    finally:
        libc.pthread_jit_write_protect_np(1)
    _forget_old_instructions(libc, address, size)
    return address


def _forget_old_instructions(libc: Any, address: int, size: int) -> None:
    """Have an Arm core see new code at once: its cache of instructions does not follow what is written as data. Linux
    sees to it itself when a page becomes one to run from; what compilers call for it is called where it is found."""
    if not _IS_ARM:
        return
    if sys.platform == "darwin":
        libc.sys_icache_invalidate(ctypes.c_void_p(address), ctypes.c_size_t(size))
        return
    try:
        clear = ctypes.CDLL("libgcc_s.so.1").__clear_cache
    except (OSError, AttributeError):
        return
    clear(ctypes.c_void_p(address), ctypes.c_void_p(address + size))


def _release(address: int, size: int) -> None:
    _libc().munmap(address, size)


_COMMIT_AND_RESERVE, _WRITE, _RUN, _RELEASE = 0x3000, 0x04, 0x20, 0x8000


def _kernel32() -> Any:
    kernel = getattr(ctypes, "WinDLL")("kernel32", use_last_error=True)  # noqa: B009 (mypy knows it on Windows only)
    kernel.VirtualAlloc.restype = ctypes.c_void_p
    kernel.VirtualAlloc.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_uint32]
    kernel.VirtualProtect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_void_p]
    kernel.VirtualFree.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32]
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    kernel.FlushInstructionCache.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return kernel


def _allocate_windows(code: bytes, size: int) -> int:
    """The same by the calls of Windows. (Untried.)"""
    kernel = _kernel32()
    address = kernel.VirtualAlloc(None, size, _COMMIT_AND_RESERVE, _WRITE)
    if not address:
        raise getattr(ctypes, "WinError")(getattr(ctypes, "get_last_error")())  # noqa: B009
    ctypes.memmove(address, code, len(code))
    before = ctypes.c_uint32()
    if not kernel.VirtualProtect(address, size, _RUN, ctypes.byref(before)):
        error = getattr(ctypes, "WinError")(getattr(ctypes, "get_last_error")())  # noqa: B009
        _release_windows(address, size)
        raise error
    kernel.FlushInstructionCache(kernel.GetCurrentProcess(), address, size)
    return int(address)


def _release_windows(address: int, size: int) -> None:
    _kernel32().VirtualFree(address, 0, _RELEASE)
