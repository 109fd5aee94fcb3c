"""Reading and mapping files that may be anything."""

import mmap
import os
import stat
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from qrun.formats.blocks.layout import U8Array
from qrun.formats.errors import FormatError

# What people hand over instead of a model file: how it begins, and what to tell them.
LOOKALIKES = {
    b"version https://git-lfs": "a Git LFS pointer: the file itself was not downloaded (try `git lfs pull`)",
    b"<": "a web page: the download did not give the file itself",
    b"PK": "a zip archive, such as PyTorch writes: get the model as GGUF or safetensors",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"\x80\x02": "a pickle, such as PyTorch wrote once: get the model as GGUF or safetensors",
    b"lmgg": "a GGML file, older than GGUF: get the model again as GGUF",
    b"tjgg": "a GGJT file, older than GGUF: get the model again as GGUF",
    b"GGUF": "a GGUF file",
}


class FileMap(mmap.mmap):
    """A mapped file, to be read only. `path`: its name."""

    path: Path

    def check(self) -> None:
        """Raises FormatError if the file is shorter by now than what is mapped: the system ends a process that reads
        where nothing is left."""
        if self.size() < len(self):
            raise FormatError(
                self.path, f"the file was {len(self)} bytes long and is cut to {self.size()}, while it was in use"
            )


class Copy(mmap.mmap):
    """A file that was read into memory of its own: what a map is where a file system has none (some of networks and of
    FUSE). It is used like a map, and like one it is there as long as somebody looks at it."""


def map_file(path: Path) -> mmap.mmap:
    """All of a file, to be read only. Raises FormatError if it is missing, empty, unreadable or no regular file."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise FormatError(path, "this is a folder: name the .gguf file in it")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            raise FormatError(path, "this is not a regular file")
        with open(path, "rb", buffering=0) as file:
            n_bytes = os.fstat(file.fileno()).st_size
            if n_bytes == 0:
                raise FormatError(path, "the file is empty: get it again")
            try:
                data = FileMap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as refusal:
                return _copy(path, file, n_bytes, refusal)
            data.path = path
            return data
    except FileNotFoundError:
        raise FormatError(path, "there is no such file") from None
    except OSError as error:
        raise FormatError(path, f"the file cannot be opened: {error.strerror}") from error


def _copy(path: Path, file: FileIO, n_bytes: int, refusal: OSError | ValueError) -> Copy:
    """The file in memory, page-aligned as a map is."""
    try:
        options: dict[str, Any] = {}
        if hasattr(mmap, "MAP_ANONYMOUS"):
            options["flags"] = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        copy = Copy(-1, n_bytes, **options)
    except (OSError, MemoryError):
        why = getattr(refusal, "strerror", None) or refusal
        reason = f"the file cannot be mapped ({why}), and memory has no room for its {n_bytes} bytes"
        raise FormatError(path, reason) from refusal
    done = 0
    with memoryview(copy) as view:
        # A read gives less than was asked for where that is much.
        while done < n_bytes and (n_read := file.readinto(view[done:])):
            done += n_read
    if done < n_bytes:
        copy.close()
        raise FormatError(path, f"the file ended at byte {done} of {n_bytes} while it was read", done)
    return copy


def bytes_of(data: mmap.mmap) -> U8Array:
    """All of a map, uint8 [n_bytes], read-only. The array, and every view of it, holds the map."""
    array = np.frombuffer(data, np.uint8)
    array.flags.writeable = False
    return array


def map_under(array: U8Array) -> FileMap | None:
    """The mapped file that an array is a view of; None if it is of none."""
    below: Any = array
    while isinstance(below, np.ndarray):
        below = below.base
    if isinstance(below, memoryview):
        below = below.obj
    return below if isinstance(below, FileMap) else None


def read_file(path: Path, max_bytes: int) -> bytes:
    """All of a file. Raises FormatError if it is missing, unreadable, no regular file, or has more than max_bytes."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, and a device have no end
            raise FormatError(path, "this is not a regular file")
        if status.st_size > max_bytes:
            raise FormatError(path, f"the file has more than {max_bytes} bytes")
        return path.read_bytes()
    except FileNotFoundError:
        raise FormatError(path, "there is no such file") from None
    except OSError as error:
        raise FormatError(path, f"the file cannot be read: {error.strerror}") from None


def read_text(path: Path, *, lenient: bool = False) -> str:
    """All of a text file, without the mark that it may begin with. Raises OSError, naming it, if it cannot be read, and
    FormatError for what is no UTF-8. lenient: single bytes that are none become U+FFFD; a file that is plainly no text
    is still an error."""
    with open(path, "rb") as file:
        raw = file.read(1 << 16)
        if (place := raw.find(b"\0")) < 0:  # a zero is in no text, and soon in all else
            try:
                return (raw + file.read()).decode("utf-8-sig", "replace" if lenient else "strict")
            except UnicodeDecodeError as error:
                place = error.start
    kind = "a text in UTF-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else lookalike(raw[:256])
    if kind:
        raise FormatError(path, f"it is no UTF-8 text: it is {kind}")
    raise FormatError(path, "it is no UTF-8 text", place)


def describe_start(start: bytes) -> str:
    """What a file that should begin otherwise is, as far as its first bytes tell."""
    if start[8:9] == b"{":  # after the length of its header
        return "it is a safetensors file: name the folder in which it lies"
    kind = lookalike(start)
    return f"it is {kind}" if kind else f"it begins with {start[:4]!r}"


def lookalike(start: bytes) -> str | None:
    """What a file is that was taken for another one, as far as its first bytes tell. None: nothing that is known."""
    return next((kind for begin, kind in LOOKALIKES.items() if start.startswith(begin)), None)


def text_lookalike(start: bytes) -> str | None:
    """The same of a file that should hold text, and may begin with a tag or with any letters."""
    start = start[:256].lstrip()
    certain = (b"version https://git-lfs", b"PK\x03\x04", b"\x1f\x8b")
    is_page = start[:15].lower().startswith((b"<!doctype html", b"<html"))
    return lookalike(start) if start.startswith(certain) or is_page else None


def forget_pages(data: mmap.mmap, offset: int, n_bytes: int) -> None:
    """Let the system take back the memory of these bytes of a map. They can still be read: then they come back."""
    if isinstance(data, Copy):  # they would not
        return
    if hasattr(mmap, "MADV_DONTNEED") and n_bytes:
        start = offset - offset % mmap.PAGESIZE
        with suppress(OSError, ValueError):
            data.madvise(mmap.MADV_DONTNEED, start, offset + n_bytes - start)
