"""A terminal for tests: it does what the command line asks of one, and fails at what it does not know."""

from __future__ import annotations

import re

from rich.cells import cell_len

_PART = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|([^\x1b])", re.DOTALL)


class Terminal:
    """Rows of text, of which the last `height` are the window: what is above can be read and not be changed."""

    def __init__(self, width: int = 40, height: int = 12) -> None:
        self.width, self.height = width, height
        self.rows: list[list[str]] = [[]]
        self.x = self.y = 0
        self.styles: set[str] = set()
        self.sent = ""

    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def write(self, text: str) -> None:
        self.sent += text
        end = 0
        for part in _PART.finditer(text):
            assert part.start() == end, f"not understood: {text[end:]!r}"
            end = part.end()
            if part[3]:
                self._type(part[3])
            else:
                self._obey(part[1], part[2])
        assert end == len(text), f"not understood: {text[end:]!r}"

    def _type(self, char: str) -> None:
        if char == "\n":
            self.x = 0
            self.y += 1
        elif char == "\r":
            self.x = 0
        else:
            width = cell_len(char)
            if not width and self.x:
                self._here()[self.x - 1] += char
                return
            if self.x + width > self.width:
                self.x = 0
                self.y += 1
            self._here()[self.x : self.x + width] = [char, *[""] * (width - 1)]
            self.x += width
        self._here()

    def _here(self) -> list[str]:
        while len(self.rows) <= self.y:
            self.rows.append([])
        row = self.rows[self.y]
        row += [" "] * (self.x - len(row))
        return row

    def _obey(self, arguments: str, command: str) -> None:
        if command == "m":
            self.styles.update(arguments.split(";"))
        elif command == "A":
            self.y -= int(arguments)
            assert self.y >= max(len(self.rows) - self.height, 0), "above the window"
        elif command == "K":
            del self._here()[self.x :]
        elif command == "J":
            del self._here()[self.x :]
            del self.rows[self.y + 1 :]
        else:
            raise AssertionError(f"not understood: {arguments}{command}")

    @property
    def text(self) -> list[str]:
        """All rows, those that have left the window too."""
        return ["".join(row).rstrip() for row in self.rows]
