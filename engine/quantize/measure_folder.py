"""The folder in which a calibration keeps what it finds: its files, whose they are, and which go when."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qrun.formats.whole_file import write_whole

# The file that says of what the others are: it comes first and goes last.
KEY = "key"
# What was found, and what only helps to go on with a result that was broken off.
FOUND = r"working\.gguf|imatrix\.gguf|slopes|probing|(rounded|scales)-[0-9a-f]{8}-\d+"
PASSING = r"rounded\.gguf|result\.gguf|named\.gguf|logits|entering-[0-9a-f]{8}-\d+"
OWN = re.compile(f"({FOUND}|{PASSING})")
# What is left of one that was not completed.
UNFINISHED = re.compile(rf"\.({KEY}|{OWN.pattern})\.[0-9a-f]{{8}}\.part")
# A folder of the same kind in it, of the model with scales.
SCALED = "scaled"


@dataclass(frozen=True)
class MeasureFolder:
    """A folder of measures. key: of all that is measured, 16 digits in base 16."""

    path: Path
    key: str

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The folder, with what an earlier run on the same left there, and is whole; within it it is no other run's.
        Raises ValueError if it is at work for another run, or holds what is not of this kind."""
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path):
            self.prepare()
            yield

    def prepare(self) -> None:
        """Has in the folder only what is of the same source and texts, and whole. Errors are those of `opened`."""
        mark = self.path / KEY
        key = mark.read_bytes() if mark.is_file() else None
        theirs = key is None and any(not UNFINISHED.fullmatch(path.name) for path in self.path.iterdir())
        if theirs or (key is not None and not re.fullmatch(rb"[0-9a-f]{16}", key)):
            raise ValueError(f"{self.path}: other things than measures lie here: name a new folder, or an empty one")
        for path in self.path.iterdir():
            if UNFINISHED.fullmatch(path.name):
                path.unlink()
        if key != self.key.encode():
            self._remove()
            write_whole(mark, self.key)
        probing = self.path / "probing"
        if probing.exists():  # a run that was killed may have left a tensor rounded
            (self.path / "working.gguf").unlink(missing_ok=True)
            probing.unlink()

    @property
    def has_any(self) -> bool:
        """Is there anything that a later run could use?"""
        return any(OWN.fullmatch(path.name) for path in self.path.iterdir())

    def forget_entering(self, but: str) -> None:
        """Removes what goes into bands, but for what is named by this digest."""
        for path in self.path.glob("entering-*"):
            if OWN.fullmatch(path.name) and not path.name.startswith(f"entering-{but}-"):
                path.unlink()

    def clean_up(self) -> None:
        """Once a result is complete: what only helps to go on with one that was broken off goes. What was found of the
        model stays, for other types."""
        for path in (*self.path.iterdir(), *self._of_scaled()):
            if re.fullmatch(PASSING, path.name) or UNFINISHED.fullmatch(path.name):
                path.unlink()

    def clean(self) -> None:
        """Once the result is complete, and no other is wished for."""
        self._remove()
        (self.path / KEY).unlink(missing_ok=True)
        with suppress(OSError):  # something of somebody else's is there
            self.path.rmdir()

    def _of_scaled(self) -> list[Path]:
        """What lies in the folder of the model with scales, if that is one of ours."""
        folder = self.path / SCALED
        return list(folder.iterdir()) if (folder / KEY).is_file() else []

    def _remove(self) -> None:
        if self._of_scaled():
            MeasureFolder(self.path / SCALED, self.key).clean()
        for path in self.path.iterdir():
            if OWN.fullmatch(path.name) or UNFINISHED.fullmatch(path.name):
                path.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within it no other process has the folder so. Raises ValueError if one has it now."""
    if os.name != "posix":  # no locks of folders
        with locked_beside(folder):
            yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _at_work(folder) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


@contextmanager
def locked_beside(folder: Path) -> Iterator[None]:
    """The same by a file beside the folder: one within would be taken for somebody else's."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder.absolute().with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise _at_work(folder) from None
    try:
        yield
    finally:
        lock.release()


def _at_work(folder: Path) -> ValueError:
    return ValueError(f"{folder}: another run is at work here: name another folder, or wait for it")
