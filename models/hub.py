"""Fetching models from Hugging Face, through its own library (which honours HF_ENDPOINT and the user's token)."""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from qrun.formats.dataclass import dataclass
from qrun.models import store
from qrun.models.store import SHARD_NAME, Notice, Progress, PullError

SPEC = re.compile(
    r"^hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:\s]+))?(?::(?P<selector>\S.*))?$",
)
# how other programs begin a spec
PREFIXES = re.compile(r"^(?:https?://)?(?:hf\.co|huggingface\.co)/(?=[\w.-]+/[\w.-]+(?:[@:]|$))")
# what to take where the user does not say, best first: sizes at which little is lost
PREFERRED_QUANTS = ("Q4_K_M", "Q4_K_XL", "Q4_K_S", "Q5_K_M", "Q4_0", "Q4_1", "IQ4_XS", "IQ4_NL", "Q5_K_S", "MXFP4",
                    "MXFP4_MOE", "Q6_K", "Q8_0", "F16")  # fmt: skip
# What lies beside models and cannot be run alone: projectors for images, importance matrices, drafters.
BESIDE = re.compile(r"(?:^|[-._])(?:mmproj|imatrix)(?:[-._]|$)|^(?:mtp|dflash\d?|eagle3|draft)[-._]", re.IGNORECASE)

RETRIES = 5  # of one file whose connection breaks
SLOW_TO_CHECK = 2_000_000_000  # bytes of which a checksum takes more than a second or two


@dataclass(frozen=True)
class HubSpec:
    """`hf:ORG/REPO[@REVISION][:FILE or quant]`, taken apart."""

    repo: str
    revision: str | None
    selector: str | None


def is_spec(text: str) -> bool:
    """Does this name a repository of the hub, as `hf:ORG/REPO` or, as others write it, `hf.co/ORG/REPO`?"""
    return _match(text) is not None


def _match(text: str) -> re.Match[str] | None:
    match = SPEC.match(PREFIXES.sub("hf:", text))
    return None if match is None or ".." in match["repo"] else match


def parse_spec(spec: str) -> HubSpec:
    """Takes a spec apart; raises PullError where it is not one."""
    match = _match(spec)
    if match is None:
        raise PullError(f"{spec}: expected hf:ORG/REPO[@REVISION][:FILE or quant]")
    return HubSpec(match["repo"], match["revision"], match["selector"])


def choose_files(names: list[str], selector: str | None) -> list[str]:
    """The files to fetch, in order: one, or all of a split set.

    `selector` is a file's name or a quant such as Q4_K_M; without it the best known quant is taken, or the only
    model there is. Raises PullError (without the repository's name) where nothing, or more than one model, fits.
    """
    models = [name for name in names if name.lower().endswith(".gguf") and _is_first(name) and _is_below(name)]
    if not models:
        raise PullError("there is no .gguf file")
    candidates = [name for name in models if not _is_beside(name)]
    if selector is None:
        chosen = candidates
        if len(candidates) > 1:
            chosen = next(filter(None, (_of_quant(candidates, quant) for quant in PREFERRED_QUANTS)), candidates)
    elif selector.lower().endswith(".gguf"):
        chosen = [name for name in models if selector in (name, PurePosixPath(name).name)]
    else:
        chosen = _of_quant(candidates, selector)
    if not chosen and selector is None:
        raise PullError(f"none of the files is a model: {_listing(models)}")
    if not chosen:
        raise PullError(f"no file fits {selector!r}; there are: {_listing(models)}")
    if len(chosen) > 1:
        raise PullError(f"several files fit; name one: {_listing(chosen)}")
    first = PurePosixPath(chosen[0])
    files = [str(first.with_name(name)) for name in store.shard_names(first.name)]
    if missing := [name for name in files if name not in names]:
        raise PullError(f"the split model lacks {_listing(missing)}")
    return files


def _is_first(name: str) -> bool:
    match = SHARD_NAME.match(PurePosixPath(name).name)
    return match is None or int(match["no"]) == 1


def _is_below(name: str) -> bool:
    """Does this stay within the folder that it is put into? Also, what begins with a dot is not listed in the store."""
    path = PurePosixPath(name)
    return not path.is_absolute() and "\\" not in name and not any(part.startswith(".") for part in path.parts)


def _is_beside(name: str) -> bool:
    path = PurePosixPath(name)
    return BESIDE.search(path.name) is not None or any(part.lower() == "mtp" for part in path.parts[:-1])


def _of_quant(names: list[str], quant: str) -> list[str]:
    """The files of this quant. Where several fit: those that end with it, as others may have it in their names too;
    those of the usual mix, not "UD-Q4_K_M"; those that are whole, not split."""
    pattern = re.compile(rf"(?:^|[-._/]){re.escape(quant)}(?=[-./]|$)", re.IGNORECASE)
    fitting = [name for name in names if pattern.search(name)]
    preferences: tuple[Callable[[str], bool], ...] = (
        lambda name: _stem(name).endswith(quant.lower()),
        lambda name: not re.search(rf"(?:^|[-._/])UD-{re.escape(quant)}", name, re.IGNORECASE),
        lambda name: SHARD_NAME.match(PurePosixPath(name).name) is None,
    )
    for preferred in preferences:
        if len(fitting) > 1:
            fitting = [name for name in fitting if preferred(name)] or fitting
    return fitting


def _stem(name: str) -> str:
    """The name of the model, of whatever file of it."""
    match = SHARD_NAME.match(PurePosixPath(name).name)
    return (match["stem"] if match else PurePosixPath(name).stem).lower()


def _listing(names: list[str], limit: int = 12) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def stored_file(wanted: HubSpec) -> Path | None:
    """The file in the store that a spec means, as far as that can be said without asking the hub."""
    try:
        folder = store.models_folder() / wanted.repo
    except OSError:  # no home, and so no store
        return None
    files = sorted(path for path in store.files_below(folder, ".gguf") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    try:
        return folder / choose_files(names, wanted.selector)[0]
    except PullError:
        return None


def pull_hub(spec: str, progress: Progress | None = None, notice: Notice | None = None) -> Path:
    """Fetches a model from Hugging Face into the store as ORG/REPO/FILE; what broke off is gone on with.

    notice: is told which files these are, their size and their licence, before anything is fetched.
    """
    wanted = parse_spec(spec)
    if wanted.selector and (path := stored_file(wanted)):
        return path
    folder = store.models_folder() / wanted.repo
    _find_home_for_library()

    try:
        import huggingface_hub
        from huggingface_hub.utils import disable_progress_bars, logging
    except ImportError as error:  # left out of a packed app
        raise PullError(f"{spec}: fetching from Hugging Face needs the package huggingface_hub: {error}") from error

    disable_progress_bars()
    logging.set_verbosity_error()  # it tells of every try; what came of them is told in the end
    try:
        info = huggingface_hub.HfApi().model_info(wanted.repo, revision=wanted.revision, files_metadata=True)
    except Exception as error:  # the library raises the errors of several transports; all mean that it is not to be had
        raise PullError(f"{spec}: {explain(error, wanted)}") from error
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    try:
        files = choose_files(list(siblings), wanted.selector)
    except PullError as error:
        raise PullError(f"{spec}: {error}") from error
    target = folder / files[0]
    if target.is_file():
        return target
    sizes = [siblings[name].size for name in files]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    with store.staging(target, notice) as staged:
        if target.is_file():
            return target
        if total is not None:
            store.check_space(total - store.folder_bytes(staged))
        if notice:
            notice(_announcement(files, total, info.card_data.to_dict() if info.card_data else {}))
        with store.watch(lambda: store.folder_bytes(staged), total, progress):
            for name in files:
                try:
                    _download(wanted.repo, name, info.sha, staged)
                except Exception as error:
                    raise PullError(f"{spec}: {name}: {explain(error, wanted)}") from error
        if notice and total and total > SLOW_TO_CHECK:
            notice("checking the SHA-256 of what has come")
        for name in files:
            store.check_magic(staged / name, f"{spec}: {name}")
            lfs = siblings[name].lfs
            if lfs and store.file_sha256(staged / name) != lfs.sha256:
                (staged / name).unlink()
                raise PullError(f"{spec}: {name}: what arrived does not have the SHA-256 that the repository names")
        store.install([(staged / name, folder / name) for name in files])
    return target


def _download(repo: str, name: str, revision: str | None, staged: Path) -> None:
    """Fetches one file. Where the connection breaks in a way that the library does not mend itself, it is gone on with,
    as long as more comes."""
    import huggingface_hub

    for attempt in range(RETRIES):
        before = store.folder_bytes(staged)
        try:
            huggingface_hub.hf_hub_download(repo, name, revision=revision, local_dir=staged)
            return
        except Exception as error:
            if not _is_broken_connection(error) or store.folder_bytes(staged) <= before:
                raise
        time.sleep(min(2**attempt * 0.1, 5))
    huggingface_hub.hf_hub_download(repo, name, revision=revision, local_dir=staged)


def _is_broken_connection(error: Exception) -> bool:
    """Of all errors of several transports, those that are neither the hub's answer nor the disk's."""
    if getattr(error, "response", None) is not None or isinstance(error, ValueError):
        return False
    return not isinstance(error, OSError) or isinstance(error, ConnectionError) or error.errno is None


def _announcement(files: list[str], total: int | None, card: Mapping[str, Any]) -> str:
    """What is going to be fetched, in one line."""
    what = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    size = "of unknown size" if total is None else f"{total / 1e9:.1f} GB" if total >= 1e9 else f"{total / 1e6:.0f} MB"
    licence = card.get("license_name") or card.get("license")
    return f"{what}, {size}, licence: {licence or 'not said'}"


def _find_home_for_library() -> None:
    """Gives the hub's library, which would make a folder called "~" here, a home where the user has none."""
    if not any(os.environ.get(name) for name in ("HF_HOME", "XDG_CACHE_HOME")) and os.path.expanduser("~") == "~":
        os.environ["HF_HOME"] = str(store.home() / "huggingface")


def explain(error: Exception, wanted: HubSpec) -> str:
    """Why the hub, or the way to it, does not give a model, in one line, and what the user can do."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{wanted.repo}"
    token = "another HF_TOKEN" if os.environ.get("HF_TOKEN") else "HF_TOKEN"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"the repository is gated: accept its licence at {page}, and set {token} to a token of your account"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {wanted.revision}"
    if status in (401, 404) or isinstance(error, errors.RepositoryNotFoundError):
        return f"there is nothing at {page}, or it is private or gated: then set {token} to a token of your account"
    if status == 403:
        return f"{page} does not let us in (403): set {token} to a token that may read it"
    if status == 429:
        return f"{constants.ENDPOINT} takes no more requests for now (429): {_when(error)}, or set {token}"
    if status is not None:
        return f"{constants.ENDPOINT} answers {status}: try again later"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the disk of {store.models_folder()}; what has come stays for the next try"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    return reason if isinstance(error, ValueError) else f"{reason} (from {constants.ENDPOINT})"


def _when(error: Exception) -> str:
    response: Any = getattr(error, "response", None)
    after = str(response.headers.get("Retry-After", ""))
    return f"try again in {after} s" if after.isdigit() else "try again later"
