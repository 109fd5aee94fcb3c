"""Running a checkpoint folder: it is converted when it is first asked for, and the result kept in the cache.

A file in the cache is named by the folder, the type, and a digest of the names, sizes and times of the folder's files:
where one of these changes, the folder is converted anew, and what was made of it before goes.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from qrun.engine.native.cache_root import cache_root
from qrun.models.store import folder_bytes

DEFAULT_TYPE = "Q8_0"
"""Half the size of the checkpoint, and nothing lost that could be noticed."""

VERSION = 2  # of what a conversion gives: one more than before when that changes

Progress = Callable[[int, int], None]


def converted(
    folder: Path,
    type: str | None = None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    compiling: Progress | None = None,
) -> Path:
    """The GGUF file of a checkpoint, made now if it is not in the cache.

    type: as `qrun convert` takes it, by default DEFAULT_TYPE. progress, compiling: see `convert`. Raises FormatError if
    the folder is no checkpoint that can be converted, ValueError for a type that does not exist, OSError if the disk is
    full.
    """
    from qrun.engine.quantize.mixes import COPY, Choice, file_type_name

    file_type = file_type_name(type or DEFAULT_TYPE)
    if file_type == COPY:
        raise ValueError("a model is not run as COPY: name a type such as BF16")
    folder = folder.resolve()
    place = f"{_safe(folder.name)}-{_digest(str(folder))}-{file_type}"
    target = converted_folder() / f"{place}-{_digest(_state(folder))}.gguf"
    if target.is_file():
        return target
    from filelock import FileLock

    from qrun.engine.quantize.convert import convert, plan
    from qrun.engine.quantize.source import open_source

    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.parent / f".{place}.lock"
    with FileLock(lock):
        if not target.is_file():  # another process may have made it meanwhile
            with closing(open_source(folder)) as source:
                choice = Choice(file_type)
                convert(plan(source, choice), target, threads=threads, progress=progress, compiling=compiling)
            for old in set(target.parent.glob(f"{place}-*.gguf")) - {target}:
                with suppress(OSError):  # on some systems not while another process has it open
                    old.unlink()
    return target


def converted_folder() -> Path:
    """Where they are kept; it may not exist yet."""
    return cache_root() / "converted"


def converted_bytes() -> int:
    """Bytes that they take."""
    return folder_bytes(converted_folder())


def remove_converted() -> int:
    """Delete them all, and what interrupted conversions left. Returns the bytes freed."""
    freed = converted_bytes()
    for path in converted_folder().glob("*"):
        with suppress(OSError):
            path.unlink()
    return freed - converted_bytes()


def _state(folder: Path) -> str:
    """What the files of a folder were when it was converted. Models that were made of it and lie there do not count."""
    entries = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path.suffix != ".gguf":
            status = os.stat(path)
            entries.append((str(path.relative_to(folder)), status.st_size, status.st_mtime_ns))
    return repr((VERSION, entries))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)[:60] or "model"
