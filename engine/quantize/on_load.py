"""Running a checkpoint folder: it is converted when it is first asked for, and the result kept in the cache.

A file in the cache is named by the folder, the type, and a digest of the names, sizes and times of the folder's files:
where one of these changes, the folder is converted anew, and what was made of it before goes.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from qrun.engine.native.cache_root import cache_root
from qrun.engine.native.object_cache import make_private, warn_not_kept
from qrun.models.store import files_below, folder_bytes

DEFAULT_TYPE = "Q8_0"
"""Half the size of the checkpoint, and nothing lost that could be noticed. Weights of four-bit floats stay so."""

VERSION = 3  # of what a conversion gives: one more than before when that changes

Progress = Callable[[int, int], None]


def converted(
    folder: Path,
    type: str | None = None,
    *,
    threads: int | None = None,
    progress: Progress | None = None,
    compiling: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> Path:
    """The GGUF file of a checkpoint, made now if it is not in the cache.

    type: as `qrun convert` takes it, by default DEFAULT_TYPE. progress, compiling: see `convert`. notice: called with
    lines about what of the folder is not used, or may be wrong, where it is converted. If the cache cannot be written
    to, it is a file that goes with this process, and a `CacheWarning` says so. Raises FormatError if
    the folder is no checkpoint that can be converted, ValueError for a type that does not exist, OSError if the disk is
    full.
    """
    from qrun.engine.quantize.mixes import COPY, Choice, file_type_name

    file_type = file_type_name(type or DEFAULT_TYPE)
    if file_type == COPY:
        raise ValueError("a model is not run as COPY: name a type such as BF16")
    folder = folder.resolve()
    # A type that is asked for is that of all weights, also of those that would be kept.
    keep = type is None and _is_packed(folder)
    place = f"{_safe(folder.name)}-{_digest(str(folder))}-{file_type}{'-kept' if keep else ''}"
    name = f"{place}-{_digest(_state(folder))}.gguf"
    for kept in _folders():
        if (kept / name).is_file():
            return kept / name
    from filelock import FileLock

    from qrun.engine.quantize.convert import convert, plan
    from qrun.engine.quantize.source import KEPT_TYPES, open_source

    target = _folder_to_write() / name
    lock = target.parent / f".{place}.lock"
    with FileLock(lock):
        if not target.is_file():  # another process may have made it meanwhile
            with closing(open_source(folder, keep=keep)) as source:
                if notice:
                    for text in source.notices:
                        notice(text)
                planned = plan(source, Choice(file_type, keep=KEPT_TYPES if keep else ()))
                convert(planned, target, threads=threads, progress=progress, compiling=compiling)
            for old in set(target.parent.glob(f"{place}-*.gguf")) - {target}:
                with suppress(OSError):  # on some systems not while another process has it open
                    old.unlink()
    return target


def _is_packed(folder: Path) -> bool:
    """Does its configuration say that weights are quantised?"""
    from qrun.models.huggingface.checkpoint import read_config
    from qrun.models.huggingface.quantization import read_quantization

    settings, _ = read_quantization(read_config(folder)[1])
    return settings is not None


def _folders() -> Iterator[Path]:
    """Where a converted checkpoint may lie."""
    with suppress(OSError):
        yield converted_folder()
    if _temporary is not None:
        yield Path(_temporary.name)


def _folder_to_write() -> Path:
    """The cache's folder; where it cannot be written to, one that goes with this process."""
    global _temporary
    try:
        folder = converted_folder()
        make_private(folder.parent)
        make_private(folder)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    except OSError as error:
        warn_not_kept("converted checkpoints are", error)
        with _making_temporary:
            if _temporary is None:
                _temporary = tempfile.TemporaryDirectory(prefix="qrun-converted-", ignore_cleanup_errors=True)
            return Path(_temporary.name)


_temporary: tempfile.TemporaryDirectory[str] | None = None
_making_temporary = threading.Lock()


def converted_folder() -> Path:
    """Where they are kept; it may not exist yet. OSError if there is no home."""
    return cache_root() / "converted"


def converted_bytes() -> int:
    """Bytes that they take."""
    try:
        return folder_bytes(converted_folder())
    except OSError:  # no home, and so none
        return 0


def remove_converted() -> int:
    """Delete them all, and what interrupted conversions left. Returns the bytes freed."""
    freed = converted_bytes()
    with suppress(OSError):
        for path in converted_folder().glob("*"):
            with suppress(OSError):
                path.unlink()
    return freed - converted_bytes()


def _state(folder: Path) -> str:
    """What the files of a folder were when it was converted. Models that were made of it and lie there do not count."""
    entries = []
    for path in sorted(files_below(folder)):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not hidden and path.suffix != ".gguf":
            with suppress(OSError):  # it has gone, or is a link to nothing
                status = os.stat(path)
                entries.append((str(path.relative_to(folder)), status.st_size, status.st_mtime_ns))
    return repr((VERSION, entries))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)[:60] or "model"
