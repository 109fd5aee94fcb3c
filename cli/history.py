"""The turns that were typed at the terminal, kept for the next time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qrun.cli.console import notice
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
                    super().store_string(string)
                except OSError as error:
                    self.kept = False
                    _not_kept(error)

    try:
        path = home() / "history"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):  # made, if it was not there; and read below
            pass
        with path.open("rb"):
            pass
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
