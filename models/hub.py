"""Fetching models from Hugging Face, through its own library (which honours HF_ENDPOINT and the user's token)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qrun.models import store
from qrun.models.store import SHARD_NAME, Notice, Progress, PullError

SPEC = re.compile(
    r"^hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:\s]+))?(?::(?P<selector>\S.*))?$",
)
# what to take where the user does not say, best first: sizes at which little is lost
PREFERRED_QUANTS = ("Q4_K_M", "Q4_K_S", "Q5_K_M", "Q4_0", "Q4_1", "IQ4_XS", "IQ4_NL", "Q5_K_S", "Q6_K", "Q8_0", "F16")


@dataclass(frozen=True)
class HubSpec:
    """`hf:ORG/REPO[@REVISION][:FILE or quant]`, taken apart."""

    repo: str
    revision: str | None
    selector: str | None


def parse_spec(spec: str) -> HubSpec:
    """Takes a spec apart; raises PullError where it is not one."""
    match = SPEC.match(spec)
    if not match or ".." in match["repo"]:
        raise PullError(f"{spec}: expected hf:ORG/REPO[@REVISION][:FILE or quant]")
    return HubSpec(match["repo"], match["revision"], match["selector"])


def choose_files(names: list[str], selector: str | None) -> list[str]:
    """The files to fetch, in order: one, or all of a split set.

    `selector` is a file's name or a quant such as Q4_K_M; without it the best known quant is taken, or the only
    model there is. Raises PullError (without the repository's name) where nothing, or more than one model, fits.
    """
    models = [name for name in names if name.lower().endswith(".gguf") and _is_first(name)]
    if not models:
        raise PullError("there is no .gguf file")
    # projectors for images and importance matrices lie beside models but cannot be run
    candidates = [name for name in models if not re.match(r"(mmproj|imatrix)", PurePosixPath(name).name.lower())]
    if selector is None:
        chosen = candidates
        if len(candidates) > 1:
            chosen = next(filter(None, (_of_quant(candidates, quant) for quant in PREFERRED_QUANTS)), candidates)
    elif selector.lower().endswith(".gguf"):
        chosen = [name for name in models if selector in (name, PurePosixPath(name).name)]
    else:
        chosen = _of_quant(candidates, selector)
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


def _of_quant(names: list[str], quant: str) -> list[str]:
    pattern = re.compile(rf"(?:^|[-._/]){re.escape(quant)}(?=[-./]|$)", re.IGNORECASE)
    return [name for name in names if pattern.search(name)]


def _listing(names: list[str], limit: int = 12) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def pull_hub(spec: str, progress: Progress | None = None, notice: Notice | None = None) -> Path:
    """Fetches a model from Hugging Face into the store as ORG/REPO/FILE; what broke off is gone on with."""
    wanted = parse_spec(spec)
    folder = store.models_folder() / wanted.repo
    if wanted.selector and wanted.selector.lower().endswith(".gguf") and (folder / wanted.selector).is_file():
        return folder / wanted.selector

    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        info = huggingface_hub.HfApi().model_info(wanted.repo, revision=wanted.revision, files_metadata=True)
    except Exception as error:  # the library raises the errors of several transports; all mean that it is not to be had
        raise PullError(f"{spec}: {_one_line(error)}") from error
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
        with store.watch(lambda: store.folder_bytes(staged), total, progress):
            for name in files:
                try:
                    huggingface_hub.hf_hub_download(wanted.repo, name, revision=info.sha, local_dir=staged)
                except Exception as error:
                    raise PullError(f"{spec}: {name}: {_one_line(error)}") from error
        for name in files:
            store.check_magic(staged / name, f"{spec}: {name}")
            lfs = siblings[name].lfs
            if lfs and store.file_sha256(staged / name) != lfs.sha256:
                (staged / name).unlink()
                raise PullError(f"{spec}: {name}: what arrived does not have the SHA-256 that the repository names")
        store.install([(staged / name, folder / name) for name in files])
    return target


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
