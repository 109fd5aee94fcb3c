"""Each command is imported when it is called."""

from PyInstaller.utils.hooks import collect_submodules

hiddenimports = collect_submodules("qrun.cli")
