"""What model files say of themselves, read without loading them."""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrun.formats import FormatError, GGUFReader
from qrun.formats.gguf.file_types import FILE_TYPES
from qrun.formats.tensors import n_weights
from qrun.models.catalog import resolve

if TYPE_CHECKING:
    from qrun.server.hub import Entry


@dataclass(frozen=True)
class Facts:
    """modified: seconds since 1970. digest: tells versions of a file apart; not of its contents, which may be large."""

    size: int = 0
    modified: float = 0.0
    digest: str = ""
    architecture: str = "unknown"
    parameters: int = 0
    quantization: str = "unknown"
    context_length: int = 0
    chat_template: str = ""
    info: tuple[tuple[str, Any], ...] = ()
    """Metadata without lists."""

    @property
    def parameter_size(self) -> str:
        """As in "1.2B"."""
        if self.parameters >= 1e9:
            return f"{self.parameters / 1e9:.1f}B"
        return f"{self.parameters / 1e6:.0f}M"


def facts_of(entry: Entry) -> Facts:
    """Those of a model's file; of one that cannot be read, none. Takes some milliseconds the first time."""
    try:
        path = resolve(entry.source)
        status = path.stat()
    except (OSError, LookupError):
        return Facts()
    return _read(path, status.st_size, status.st_mtime)


@functools.lru_cache(maxsize=256)
def _read(path: Path, size: int, modified: float) -> Facts:
    digest = hashlib.sha256(f"{path} {size} {modified}".encode()).hexdigest()
    try:
        with GGUFReader(path) as reader:
            metadata = reader.metadata
            architecture = str(metadata.get("general.architecture", "unknown"))
            kind = metadata.get("general.file_type")
            length = metadata.get(f"{architecture}.context_length")
            template = metadata.get("tokenizer.chat_template")
            info = [
                (key, value)
                for key, value in metadata.items()
                if isinstance(value, str | int | float | bool) and key != "tokenizer.chat_template"
                if not isinstance(value, float) or math.isfinite(value)
            ]
            return Facts(
                size=sum(one.stat().st_size for one in reader.files),
                modified=modified,
                digest=digest,
                architecture=architecture,
                parameters=n_weights(reader.tensors.values()),
                quantization=FILE_TYPES.get(kind, "unknown") if isinstance(kind, int) else "unknown",
                context_length=length if isinstance(length, int) else 0,
                chat_template=template if isinstance(template, str) else "",
                info=tuple(info),
            )
    except (FormatError, OSError):
        return Facts(size, modified, digest)
