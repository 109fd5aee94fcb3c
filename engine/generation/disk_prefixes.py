"""Beginnings of texts on disk, so that a long system prompt is read once, and not once in every process.

A folder holds files of saved sessions (see `session_file`), each named by what its bits depend on (the model, the
kernels, the type of the cache) and by its tokens. Several processes may share a folder: a file appears whole, under a
name that says what is in it, and whoever needs room deletes those that nobody has used for longest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qrun.engine.generation.token_cache import common_prefix
from qrun.engine.native.locks import ForkAwareLock
from qrun.formats import FormatError
from qrun.formats.whole_file import make_private_folder

if TYPE_CHECKING:
    from qrun.engine.generation.adapters import Chosen
    from qrun.engine.program.kv_cache import KVSequence
    from qrun.engine.program.runtime import Runtime

SUFFIX = ".prefix"
WORTH = 512  # tokens that have to be new on the disk, or in memory, for a file to be written, or read
MOST_BYTES, SHARE_OF_FREE = 10 << 30, 0.1  # what a folder holds unless somebody says otherwise: the less of the two
LEFT_SECONDS = 3600  # after so long, a file that is being written has been left behind


@dataclass(frozen=True)
class Stored:
    """A file in the folder."""

    path: Path
    tokens: list[int]


class DiskPrefixes:
    """What a folder has of one model. limit: bytes that all its files may take.

    key(adapters): a digest of all that the bits depend on beside the tokens, which begins alike for all adapters.
    notice: gets a line when something is wrong, once for each kind.
    """

    def __init__(
        self, folder: Path, limit: int | None, runtime: Runtime, key: Callable[[Chosen], str],
        notice: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.folder = prepare_folder(folder)
        self.limit = default_limit(self.folder) if limit is None else limit
        self.reading = ForkAwareLock()
        """Held by whoever loads, so that two who want the same load it once."""
        self._writing = ForkAwareLock()
        self._lock = ForkAwareLock()  # the three below
        self._index: dict[str, Stored] = {}
        self._seen = -1
        self._said: set[str] = set()
        self._runtime, self._key, self._notice = runtime, key, notice
        self.writes = True
        """False once writing has failed."""
        self.worth = WORTH

    def longest(self, tokens: list[int], adapters: Chosen) -> tuple[int, int, Stored | None]:
        """How much of the beginning of a text the disk has; how much of that can be gone on from, and which file that
        is."""
        longest, best, found = 0, 0, None
        for stored in self._entries(adapters):
            alike = common_prefix(stored.tokens, tokens)
            longest = max(longest, alike)
            if alike > best and self._runtime.returns(len(stored.tokens), alike):
                best, found = alike, stored
        return longest, best, found

    def load(self, stored: Stored, adapters: Chosen) -> KVSequence | None:
        """A new sequence with what a file holds; None where it is gone, or damaged: then it is deleted."""
        from qrun.engine.generation import session_file

        sequence = self._runtime.sequence()
        try:
            saved = session_file.read(stored.path)
            if saved.fingerprint != self._key(adapters) or saved.tokens != stored.tokens:
                raise ValueError("it is not what its name says")
            sequence.restore(saved.state)
            if sequence.n_past != len(saved.tokens):
                raise ValueError(f"it has {len(saved.tokens)} tokens and a cache of {sequence.n_past}")
            with suppress(OSError):
                os.utime(stored.path)
            return sequence
        except (ValueError, TypeError, KeyError, IndexError) as error:
            sequence.close()
            if stored.path.exists():
                self._drop(stored.path, error)
            else:  # another process needed the room
                self._forget(stored.path)
            return None

    def worth_writing(self, tokens: list[int], adapters: Chosen) -> bool:
        """Is there enough in a text that the disk does not have?"""
        if not self.writes or len(tokens) < self.worth:
            return False
        new = len(tokens) - self.longest(tokens, adapters)[1]
        # Where only whole files can be gone on from, a shorter one of a longer text is of use, too.
        return new >= (self.worth if self._goes_anywhere else 1)

    def write(self, sequence: KVSequence, tokens: list[int], adapters: Chosen) -> None:
        """Write a sequence that nobody changes meanwhile. Failing is told once, and harms nobody."""
        from qrun.engine.generation import session_file

        with self._writing:
            size = self._runtime.bytes_of(len(tokens))
            if not self.writes or size > self.limit or not self.worth_writing(tokens, adapters):
                return
            key = self._key(adapters)
            digest = hashlib.sha256(np.array(tokens, np.int32).tobytes()).hexdigest()[:24]
            path = self.folder / f"{key[:24]}-{digest}{SUFFIX}"
            try:
                self._make_room(size)
                saved = session_file.SavedSession(key, self._runtime.cache_type, tokens, sequence.parts())
                session_file.write(path, saved)
            except OSError as error:
                self.writes = False
                self._say("write", f"{error.filename or self.folder}: prefixes are not kept any more: {error.strerror}")
                return
            with self._lock:
                superseded = [
                    stored.path for stored in self._index.values()
                    if self._goes_anywhere and stored.path.name.startswith(key[:24])
                    and stored.path != path  # whoever looked into the folder just now has found it already
                    and len(stored.tokens) - common_prefix(stored.tokens, tokens) < min(self.worth, len(stored.tokens))
                ]  # fmt: skip
                self._index[path.name] = Stored(path, list(tokens))
            for old in superseded:
                self._forget(old)

    def finish(self) -> None:
        """Wait for what is being written; then nothing is any more."""
        with self._writing:
            self.writes = False

    @property
    def _goes_anywhere(self) -> bool:
        return self._runtime.goes_anywhere

    def _entries(self, adapters: Chosen) -> list[Stored]:
        """The files of this model that are there now."""
        with suppress(OSError), self._lock:
            changed = os.stat(self.folder).st_mtime_ns
            if changed != self._seen:
                self._look()
                # Clocks of file systems are coarse: what changes right after this may leave the same time.
                self._seen = changed if time.time_ns() - changed > 1_000_000_000 else -1
        begin = self._key(adapters)[:24]
        with self._lock:
            return [stored for name, stored in self._index.items() if name.startswith(begin)]

    def _look(self) -> None:
        from qrun.engine.generation import session_file

        begin = self._key(())[:12]  # which does not depend on the adapters
        names = {entry.name for entry in os.scandir(self.folder) if entry.name.startswith(begin)}
        for gone in self._index.keys() - names:
            del self._index[gone]
        for name in sorted(names - self._index.keys()):
            if not name.endswith(SUFFIX):
                continue
            path = self.folder / name
            try:
                saved = session_file.read_tokens(path)
                if not name.startswith(saved.fingerprint[:24]):
                    raise FormatError(path, "it is not what its name says")
            except FormatError as error:
                if path.exists():
                    self._drop(path, error)
                continue
            self._index[name] = Stored(path, saved.tokens)

    def _make_room(self, size: int) -> None:
        """Delete what was not used for longest until there is room for so many bytes."""
        files = sorted(_files(self.folder), key=lambda file: file[1].st_mtime)
        total = sum(status.st_size for _, status in files)
        for path, status in files:
            left_behind = path.suffix != SUFFIX
            if left_behind and status.st_mtime > time.time() - LEFT_SECONDS:
                continue
            if left_behind or total + size > self.limit:
                self._forget(path)
                total -= status.st_size

    def _drop(self, path: Path, error: Exception) -> None:
        reason = error.reason if isinstance(error, FormatError) else str(error)
        self._forget(path)
        self._say("damaged", f"{path}: a kept prefix was damaged, and has been deleted: {reason}")

    def _forget(self, path: Path) -> None:
        with suppress(OSError):  # another process was quicker
            path.unlink()
        with self._lock:
            self._index.pop(path.name, None)

    def _say(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._notice(text)


def prepare_folder(folder: Path) -> Path:
    """Make the folder, for its owner alone. PermissionError for one that others could write to."""
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(20, "is not a folder", str(folder))
    make_private_folder(folder)
    if os.name == "posix":
        status = os.stat(folder)
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            reason = "prefixes of texts are kept in a folder that nobody else may write to (chmod 700)"
            raise PermissionError(1, reason, str(folder))
    return folder


def default_limit(folder: Path) -> int:
    """What the files in a folder may take where nobody has said."""
    used = sum(status.st_size for _, status in _files(folder))
    return int(min(MOST_BYTES, SHARE_OF_FREE * (shutil.disk_usage(folder).free + used)))


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """All that was written here, also of other models, and what is being written."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.endswith(SUFFIX) or (SUFFIX in entry.name and entry.name.endswith(".part")):
                with suppress(OSError):
                    yield Path(entry.path), entry.stat()


def yield_to_others() -> None:
    """This thread is to run when nobody else wants the core, where the system knows such threads."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
