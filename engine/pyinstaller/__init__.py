"""What PyInstaller has to know to pack an app that uses qrun. It finds this by itself, by an entry point of the
distribution: each `hook-NAME.py` beside this file is about the module NAME."""

from pathlib import Path


def hook_folders() -> list[str]:
    """Where the hooks lie: the entry point `hook-dirs` of the group `pyinstaller40`."""
    return [str(Path(__file__).parent)]
