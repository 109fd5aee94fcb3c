"""Where images of machine code are kept between runs: by kernel, in a folder for all that their code depends on.

An image is code that this process will run. So what others could have written is passed over, and where nothing
can be kept, kernels are compiled all the same and held in memory. A file is written to a temporary name and renamed,
so that processes which compile at the same time do not harm each other.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

from qrun.engine.errors import CacheWarning
from qrun.engine.native.cache_root import cache_root

UNUSED_DAYS = 60
"""Compiled kernels that were not loaded for so long are removed when others are compiled."""

TEMPORARY = ".tmp"  # the end of the names of files that are being written

_in_memory: dict[tuple[str, str], bytes] = {}  # what could not be written, by digest and key
_said: set[str] = set()


class NotPrivate(PermissionError):
    """Others could have put code there."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(errno.EPERM, why, str(path))


class ObjectCache:
    """The images of one digest (see `codegen.code_digest`).

    must_keep: what cannot be kept is an OSError, not a warning.
    """

    def __init__(self, digest: str, must_keep: bool = False) -> None:
        self._digest = digest
        self._must_keep = must_keep
        self._folder: Path | None = None
        self._problem: OSError | None = None  # why there is no folder that can be used
        try:
            root = cache_root()
            folder = root / "kernels" / digest
            for path in (root, root / "kernels", folder):
                _check_private(path)
            self._folder = folder
        except OSError as error:
            self._problem = error

    def read(self, key: str) -> bytes | None:
        """The image of a kernel, or None if it is not there, or not as it was written."""
        if (self._digest, key) in _in_memory:
            return _in_memory[self._digest, key]
        if self._folder is None:
            return None
        try:
            whole = _read_private(self._folder / f"{key}.code")
        except NotPrivate as error:
            warn_once(f"compiled kernels in {self._folder} are not used, and compiled anew: {error.strerror}")
            return None
        except OSError:  # mostly because it is not there
            return None
        digest, code = whole[:32], whole[32:]
        return code if hashlib.sha256(code).digest() == digest else None

    def prepare(self) -> None:
        """Have the folder ready to be written to."""
        if self._folder is not None:
            try:
                for path in (self._folder.parents[1], self._folder.parent, self._folder):
                    make_private(path)
                _forget_old(self._folder)
            except OSError as error:
                self._problem, self._folder = error, None
        if self._problem is not None:
            self._not_kept(self._problem)

    def write(self, key: str, code: bytes) -> None:
        """Keep an image; in memory where that fails."""
        if self._folder is not None:
            try:
                _write_whole(self._folder / f"{key}.code", hashlib.sha256(code).digest() + code)
                return
            except OSError as error:
                self._folder = None  # the rest would fail, too
                self._not_kept(error)
        _in_memory[self._digest, key] = code

    def _not_kept(self, error: OSError) -> None:
        if self._must_keep:
            raise OSError(f"compiled kernels cannot be kept: {_with_hint(error)}") from error
        warn_not_kept("compiled kernels are", error)

    def touch(self) -> None:
        """Say that the folder is in use: see `_forget_old`."""
        if self._folder is not None:
            with contextlib.suppress(OSError):
                os.utime(self._folder)


def warn_not_kept(what: str, error: OSError) -> None:
    """A `CacheWarning`, once for each reason, that something cannot be kept and will be made again."""
    warn_once(f"{what} not kept: {_with_hint(error)}")


def warn_once(text: str) -> None:
    """A `CacheWarning`, once."""
    if text not in _said:
        _said.add(text)
        with contextlib.suppress(ValueError):  # an app has closed its standard error
            warnings.warn(text, CacheWarning, stacklevel=2 + _frames_of_ours())


def _frames_of_ours() -> int:
    """How many callers of `warn_once` are qrun's own: the next one's line is what a warning should show."""
    depth = 2
    with contextlib.suppress(ValueError):  # there are no more frames
        while sys._getframe(depth).f_globals.get("__name__", "").startswith("qrun."):
            depth += 1
    return depth - 2


def _with_hint(error: OSError) -> str:
    reason = _reason(error)
    return reason if "QRUN_CACHE" in reason else f"{reason}; QRUN_CACHE can name another folder"


def _reason(error: OSError) -> str:
    return f"{os.fspath(error.filename)}: {error.strerror}" if error.filename is not None else str(error)


def make_private(folder: Path) -> None:
    """Make a folder to which nobody else may write, whatever the umask says."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o755, exist_ok=True)


def _check_private(path: Path) -> None:
    """NotPrivate if others than this user (and root) own a folder or may write to it. It need not exist."""
    if os.name != "posix":
        return
    for status in (os.lstat, os.stat):
        try:
            _check_status(status(path), path)
        except FileNotFoundError:
            return


def _check_status(status: os.stat_result, path: Path) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise NotPrivate(path, "it belongs to another user")
    if stat.S_ISLNK(status.st_mode):
        return  # its own bits say nothing: those of what it leads to do
    sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX  # then only owners rename what lies there
    by_group = status.st_mode & stat.S_IWGRP and not _is_own_group(status.st_gid)
    if (by_group or status.st_mode & stat.S_IWOTH) and not sticky:
        raise NotPrivate(path, "other users may write to it (chmod go-w takes that from them)")


def _is_own_group(gid: int) -> bool:
    """Whether a group is that of this user alone, as many systems have one for each user."""
    import grp
    import pwd

    try:
        name, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(gid)
    except KeyError:
        return False
    return group.gr_name == name and set(group.gr_mem) <= {name}


def _read_private(path: Path) -> bytes:
    """The bytes of a file that nobody else may write to. NotPrivate for any other."""
    if os.name != "posix":
        return path.read_bytes()
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise NotPrivate(path, "it is no file")
        _check_status(status, path)
        return file.read()


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it. Nothing stays if that fails."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}{TEMPORARY}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(temporary, flags, 0o644)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # `write` does not say of what
        raise


def _forget_old(used: Path) -> None:
    """Remove what versions of qrun, Python or the CPU's features have left that nobody has used for long, and what
    processes left that were killed while they wrote."""
    now = time.time()
    with contextlib.suppress(OSError):
        for folder in _older(used.parent.iterdir(), now - UNUSED_DAYS * 86400):
            if folder != used:
                shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        for file in _older(used.glob(f".*{TEMPORARY}"), now - 3600):
            file.unlink()


def _older(paths: Iterable[Path], moment: float) -> list[Path]:
    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < moment:
                found.append(path)
    return found
