"""Where qrun keeps what it can make again."""

import os
import sys
from pathlib import Path


def cache_root() -> Path:
    """QRUN_CACHE, or `qrun` in the platform's folder for caches; it may not exist yet."""
    if configured := os.environ.get("QRUN_CACHE"):
        return Path(configured)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "qrun"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "qrun"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qrun"
