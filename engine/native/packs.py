"""Kernel packs: machine code that was compiled ahead, for apps that shall not compile anything where they run.

A pack is a folder with `manifest.json` and, for each kind of machine (see `simd.target.MACHINES`), a file of images one
after another. The manifest says of which sources they were made, where each image lies, and its digest; and which
packages cut the texts of the models that it was made for:

    {"format": "qrun kernels 1", "qrun": "0.1.0", "sources": "e57f...", "packages": ["tokenizers"], "targets": {
        "avx2": {"file": "avx2.code", "kernels": {"matmul-Q4_K": {"offset": 0, "bytes": 36096, "sha256": "..."}}}}}

A pack is trusted as a library is: it is named by the app (`using`), by whoever starts the process (QRUN_KERNELS), or
lies in the packed app's own folder. It is never looked for in the working directory. Digests keep out what is damaged.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from qrun.engine.native.linker import Image, LinkError
from qrun.engine.native.sources import sources_digest
from qrun.formats.dataclass import dataclass
from qrun.formats.errors import QrunError

FORMAT = "qrun kernels 1"
MANIFEST = "manifest.json"
FOLDER = "kernels"
"""The name of the folder that is looked for in a packed app."""


class PackError(QrunError, ValueError):
    """A folder is no pack of kernels, or is damaged. The message names it."""


@dataclass(frozen=True)
class _Place:
    offset: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Pack:
    """targets: by the names of machines, the file and where in it each kernel lies. problem: why it cannot be used."""

    folder: Path
    targets: Mapping[str, tuple[str, Mapping[str, _Place]]]
    problem: str | None = None

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Pack:
        """Reads the manifest. OSError if there is none, PackError if it is damaged."""
        path = Path(os.path.abspath(folder))
        status = (path / MANIFEST).stat()
        return _open(path, status.st_mtime_ns, status.st_size)

    def read(self, machine: str, key: str) -> bytes | None:
        """The image of a kernel; None if it is not there. OSError or PackError if it cannot be read."""
        name, places = self.targets.get(machine, ("", {}))
        place = places.get(key)
        if place is None:
            return None
        content = b""
        with open(self.folder / name, "rb") as file:
            if place.offset + place.size <= os.fstat(file.fileno()).st_size:
                file.seek(place.offset)
                content = file.read(place.size)
        if hashlib.sha256(content).hexdigest() != place.sha256:
            raise PackError(f"{self.folder / name}: the kernel {key} is damaged")
        return content


@functools.lru_cache(8)
def _open(folder: Path, modified: int, size: int) -> Pack:
    path = folder / MANIFEST
    try:
        manifest: Any = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            return Pack(folder, {}, f"{folder} was packed by another version of qrun, in another form, and is not used")
        if manifest["sources"] != sources_digest():
            by = f"{folder} was packed by qrun {manifest['qrun']}, whose kernels are others"
            return Pack(folder, {}, f"{by}, and is not used")
        targets = {str(name): _read_target(entry) for name, entry in manifest["targets"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PackError(f"{path}: this is no manifest of a pack of kernels, or it is damaged") from error
    return Pack(folder, targets)


def _read_target(entry: dict[str, Any]) -> tuple[str, dict[str, _Place]]:
    name = str(entry["file"])
    if name != os.path.basename(name):
        raise ValueError(name)
    places = {
        key: _Place(int(at["offset"]), int(at["bytes"]), str(at["sha256"])) for key, at in entry["kernels"].items()
    }
    if any(place.offset < 0 or place.size < 0 for place in places.values()):
        raise ValueError(name)
    return name, places


_named: ContextVar[tuple[Pack, ...]] = ContextVar("_named", default=())


@contextlib.contextmanager
def using(folder: str | os.PathLike[str] | None) -> Iterator[None]:
    """Has this thread search that pack first, while it loads a model. OSError or PackError if there is none."""
    if folder is None:
        yield
        return
    token = _named.set((_open_named(folder, f"no pack of kernels in {os.path.abspath(folder)}"),))
    try:
        yield
    finally:
        _named.reset(token)


def _open_named(folder: str | os.PathLike[str], error: str) -> Pack:
    try:
        return Pack.open(folder)
    except OSError as cause:
        raise OSError(f"{error}: {MANIFEST}: {cause.strerror}") from cause


def packs() -> list[Pack]:
    """The packs that there are for this thread, in the order in which they are searched. Also those with a problem."""
    found = [*_named.get()]
    if named := os.environ.get("QRUN_KERNELS"):
        found.append(_open_named(os.path.expanduser(named), f"QRUN_KERNELS names {named}, where there is no pack"))
    for folder in _folders_of_the_app():
        with contextlib.suppress(OSError, PackError):  # it may be something else of the app's
            found.append(Pack.open(folder))
    return found


def _folders_of_the_app() -> list[Path]:
    """Where a packed app has its pack: in the folder of its program, or of its data."""
    places = []
    program = sys.modules.get("__main__")
    compiled = getattr(program, "__compiled__", None)
    if compiled is not None:  # by Nuitka: data lie beside the modules, and a single file may have a folder beside it
        places += [os.path.dirname(getattr(program, "__file__", None) or ""), getattr(compiled, "containing_dir", None)]
    if getattr(sys, "frozen", False):
        places += [os.path.dirname(sys.executable), getattr(sys, "_MEIPASS", None)]
    return [Path(place) / FOLDER for place in places if place]


def write(folder: Path, version: str, images: Mapping[str, Mapping[str, bytes]], packages: Iterable[str] = ()) -> int:
    """Writes a pack: images by the names of machines and kernels. packages: those that cut the models' texts. A pack
    that was there before is replaced, as a whole; any other folder with something in it is not: FileExistsError.
    Returns the bytes written."""
    from qrun.formats.whole_file import naming_file  # no start needs it

    check_writable(folder)
    temporary, before = (folder.with_name(f".{folder.name}.{secrets.token_hex(6)}.tmp") for _ in range(2))
    try:
        with naming_file(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            size = _fill(temporary, version, images, packages)
            if folder.exists():
                os.replace(folder, before)
            os.replace(temporary, folder)
        return size
    except LinkError as error:
        raise PackError(str(error)) from error
    finally:
        for left in (temporary, before):
            shutil.rmtree(left, ignore_errors=True)


def _fill(folder: Path, version: str, images: Mapping[str, Mapping[str, bytes]], packages: Iterable[str]) -> int:
    targets = {}
    for machine, kernels in images.items():
        places, parts, offset = {}, [], 0
        for key, content in sorted(kernels.items()):
            Image.from_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            places[key] = {"offset": offset, "bytes": len(content), "sha256": digest}
            parts.append(content)
            offset += len(content)
        name = f"{machine}.code"
        (folder / name).write_bytes(b"".join(parts))
        targets[machine] = {"file": name, "kernels": places}
    about = {"format": FORMAT, "qrun": version, "sources": sources_digest(), "packages": sorted(set(packages))}
    manifest = {**about, "targets": targets}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
    return sum(path.stat().st_size for path in folder.iterdir())


def check_writable(folder: Path) -> None:
    """Raises FileExistsError if something is there that is no pack, OSError if it cannot be made."""
    if folder.is_dir():
        names = {path.name for path in folder.iterdir()}
        others = {name for name in names if name != MANIFEST and not name.endswith(".code")}
        if others or (names and MANIFEST not in names):
            raise FileExistsError(f"{folder} has files in it, and is no pack of kernels: name another folder")
    elif folder.exists() or folder.is_symlink():
        raise FileExistsError(f"{folder} is no folder: name another one")
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent))
    if not os.access(parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(parent))
