"""The turns that were typed at the terminal, kept for the next time, in a file that only its owner can read."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qrun.cli.console import notice
from qrun.formats.whole_file import make_private_folder
from qrun.models.store import home

if TYPE_CHECKING:
    from prompt_toolkit.history import History


def chat_history() -> History:
    """The history file in the user's data folder. Where it cannot be used, a notice says so once, and the history ends
    with the process."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class KeptHistory(FileHistory):
        """A file that may stop being writable, as on a full disk."""

        kept = True

        def store_string(self, string: str) -> None:
            if self.kept:
                try:
                    os.chmod(self.filename, 0o600)  # one of an older version
                    super().store_string(string)
                except OSError as error:
                    self.kept = False
                    _not_kept(error)

    try:
        path = home() / "history"
        make_private_folder(path.parent)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        _not_kept(error)
        return InMemoryHistory()
    return KeptHistory(str(path))


def _not_kept(error: OSError) -> None:
    reason = str(error) if error.strerror is None else error.strerror
    if error.filename is not None:
        reason = f"{error.filename}: {reason}"
    hint = "" if "QRUN_HOME" in reason else " (QRUN_HOME can name another folder)"
    notice(f"what is typed is not kept as history: {reason}{hint}")
