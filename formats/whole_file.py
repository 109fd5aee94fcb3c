"""Files that appear whole or not at all, and those that are for their owner alone."""

import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EACCES, EISDIR, ENOENT, EXDEV
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: str | os.PathLike[str], *, private: bool = False) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` when the body is done and all of it is on the disk.

    Until then it has another name in the same folder; where anything goes wrong it is removed, and what was there
    before stays. It has the permissions of the file that it replaces, or those that new files have; with `private`,
    nobody but its owner may read it. A link stays one: the file that it points to is replaced. A device or a pipe is
    written to as it is. OSError names `path`.
    """
    target = Path(os.path.realpath(path))
    with naming_file(path):
        mode = _mode(target)
        if mode is not None and not stat.S_ISREG(mode):  # a folder says so itself
            with open(target, "wb") as file:
                yield file
            return
        temporary = temporary_name(target)
        descriptor = os.open(temporary, _WRITE_NEW, 0o600 if private else 0o666)
        try:
            with os.fdopen(descriptor, "w+b") as file:
                if mode is not None and not private:
                    with suppress(OSError):  # a file system that has no permissions
                        os.chmod(temporary, stat.S_IMODE(mode))
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


_WRITE_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


def write_whole(path: str | os.PathLike[str], content: bytes | str, *, private: bool = False) -> None:
    """Writes a file by `whole_file`; a text as UTF-8."""
    with whole_file(path, private=private) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def check_place(path: Path) -> None:
    """Raises OSError if no file can be written there, for who has much to compute before: it names the path, or the
    folder."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(EISDIR, "is a folder: name a file", str(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(ENOENT, "no such folder to write into", str(path.absolute().parent))
    mode = _mode(target)
    written = target.parent if mode is None or stat.S_ISREG(mode) else target
    if not os.access(written, os.W_OK):
        raise PermissionError(EACCES, os.strerror(EACCES), str(path))


def move_whole(source: Path, target: Path) -> None:
    """Gives a file that is complete the place of `target`. On another file system it is copied there, by
    `whole_file`."""
    try:
        os.replace(source, os.path.realpath(target))
    except OSError as error:
        if error.errno != EXDEV:
            raise
        with open(source, "rb") as complete, whole_file(target) as file:
            shutil.copyfileobj(complete, file, 1 << 22)
        os.unlink(source)


def temporary_name(target: Path) -> Path:
    """What a file that will be `target` is called while it grows: beside it, so that it can be renamed."""
    return target.with_name(f".{_short(target.name)}.{os.urandom(4).hex()}.part")


def remove_unfinished(target: Path) -> None:
    """Removes what a process that was killed left of a file. Nobody may be writing it now."""
    target = Path(os.path.realpath(target))
    part = re.compile(rf"\.{re.escape(_short(target.name))}\.[0-9a-f]{{8}}\.part")
    for path in target.parent.iterdir():
        if part.fullmatch(path.name):
            with suppress(OSError):
                path.unlink()


def _short(name: str) -> str:
    """A name that leaves room for more: the same for no two files."""
    if len(name) <= 60:
        return name
    return f"{name[:51]}.{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"


@contextmanager
def naming_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError of an open file does not say which file: the disk of this one is full, say. Others name the temporary
    file, of which nobody knows."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename, error.filename2 = os.fspath(path), None
        raise


def make_private_folder(folder: Path) -> None:
    """Makes a folder, and those in which it lies, for their owner alone. One that is there stays as it is.
    NotADirectoryError where something else is there."""
    if not folder.is_dir():
        make_private_folder(folder.parent)
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(20, "is not a folder", str(folder)) from None


def _mode(path: Path) -> int | None:
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return None
