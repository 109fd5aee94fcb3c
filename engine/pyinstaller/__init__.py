"""What PyInstaller has to know to pack an app that uses qrun. It finds this by itself, by an entry point of the
distribution: each `hook-NAME.py` beside this file is about the module NAME."""

from __future__ import annotations

import json
import os
from pathlib import Path

CUTTERS = ("sentencepiece", "tokenizers")
"""Packages that cut texts into tokens. A model needs one of them, or none."""


def hook_folders() -> list[str]:
    """Where the hooks lie: the entry point `hook-dirs` of the group `pyinstaller40`."""
    return [str(Path(__file__).parent)]


def pack() -> Path | None:
    """The pack of kernels that goes into the app: QRUN_KERNELS names it. SystemExit if it is none."""
    named = os.environ.get("QRUN_KERNELS")
    if not named:
        return None
    folder = Path(os.path.expanduser(named))
    if not (folder / "manifest.json").is_file():
        raise SystemExit(f"QRUN_KERNELS names {named}, where there is no pack of kernels (qrun pack makes one)")
    return folder


def unused_cutters() -> list[str]:
    """Those that no model of the pack needs."""
    folder = pack()
    used = CUTTERS if folder is None else json.loads((folder / "manifest.json").read_bytes()).get("packages", CUTTERS)
    return [name for name in CUTTERS if name not in used]
