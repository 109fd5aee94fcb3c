"""Where qrun keeps what it can make again."""

import os
from pathlib import Path

from qrun.models.store import platform_folder


def cache_root() -> Path:
    """QRUN_CACHE, or `qrun` in the platform's folder for caches; it may not exist yet. OSError if there is no home."""
    if configured := os.environ.get("QRUN_CACHE"):
        return Path(os.path.abspath(os.path.expanduser(configured)))
    return platform_folder("QRUN_CACHE", "Library/Caches", "XDG_CACHE_HOME", ".cache")
