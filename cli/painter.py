"""Lines at the end of a terminal's text that can be written anew while they grow.

What is finished is written once and scrolls away. Of what is under way only the rows that changed are written again,
over the old ones, so that nothing flickers and nothing stands twice in what one can scroll back to.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

UP, CLEAR_LINE, CLEAR_BELOW = "\033[{}A", "\033[K", "\033[J"


def terminal_size() -> tuple[int, int]:
    """Columns and rows."""
    return shutil.get_terminal_size()


class Painter:
    """write: takes what is to be sent to the terminal, escape sequences included."""

    def __init__(self, write: Callable[[str], None], size: Callable[[], tuple[int, int]] = terminal_size) -> None:
        self._write = write
        self._size = size
        self._shown: list[str] = []
        """The rows under way; the cursor stands behind the last."""

    def show(self, rows: Sequence[str]) -> None:
        """Has these rows stand in place of those under way. Each fits into one row of the terminal, with a column to
        spare; only a last one that goes on where the one before it stopped may be longer."""
        shown, rows = self._shown, list(rows)
        if rows == shown:
            return
        first = next(
            (i for i, (old, new) in enumerate(zip(shown, rows, strict=False)) if old != new),
            min(len(shown), len(rows)),
        )
        if first >= len(shown):
            text = ("\n" if shown else "") + "\n".join(rows[first:])
        elif first == len(shown) - 1 and first < len(rows) and rows[first].startswith(shown[first]):
            text = "\n".join(rows[first:])[len(shown[first]) :]
        else:
            # Rows that have left the window cannot be reached.
            n_up = min(len(shown) - 1 - first, self._size()[1] - 1)
            first = len(shown) - 1 - n_up
            text = (UP.format(n_up) if n_up else "") + "\r"
            text += "\n".join(row + CLEAR_LINE for row in rows[first:]) + CLEAR_BELOW
        self._shown = rows
        self._write(text)

    def skip(self) -> None:
        """Leaves a line empty, below what is finished."""
        self._write("\n")

    def keep(self) -> None:
        """Finishes the rows under way; what is shown next stands below them."""
        if self._shown:
            self._shown = []
            self._write("\n")
