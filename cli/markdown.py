"""Answers at a terminal: Markdown as it is meant, wrapped at words, while it comes.

A line is shown as soon as it can be known what it is, and is finished with its end: models write a paragraph as one
line. Only tables are more than a line, since each row can make the columns wider.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.text import Text

from qrun.cli.console import printable, write_terminal
from qrun.cli.markdown_inline import MAX_INLINE, STYLES, inline
from qrun.cli.markdown_table import LEAST_COLUMN, TABLE_ROW, TABLE_RULE, cells_of, column_widths, side_of, table_row
from qrun.cli.painter import Painter, terminal_size
from qrun.cli.wrapping import after, columns_of, n_visible, wrap

FRAME = 1 / 30
"""The least seconds from one writing of an unfinished line to the next: a fast model would be held up."""

_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*$")
_ITEM = re.compile(r"([ \t]*)([-*+]|\d{1,9}[.)])([ \t]+)(?=\S)(.*)$", re.DOTALL)
_QUOTE = re.compile(r" {0,3}((?:>[ ]?)+)(.*)$")
_FENCE = re.compile(r"([ \t]*(?:[-*+][ \t]+)?)(`{3,}|~{3,})([^`]*)$")
_RULE = re.compile(r" {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,}|={3,}[ \t]*)$")
_UNDECIDED = re.compile(r"[ \t]*(?:[-*+_=>~`#| \t]*|\d{1,9}[.)]?)$")
"""The beginning of a line that may become several things."""


class MarkdownView:
    """Shows one answer at a terminal that can be rewritten. What a model wrote never steers the terminal."""

    def __init__(
        self,
        write: Callable[[str], None] = write_terminal,
        size: Callable[[], tuple[int, int]] = terminal_size,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._painter = Painter(write, size)
        self._size = size
        self._clock = clock
        self._console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
        self._escapes: dict[Any, str] = {}  # of rows drawn lately, most of which are drawn again as they are
        self._signs = _signs(sys.stdout.encoding)
        self._channel = ""
        self._line = ""  # the line under way
        self._fence: tuple[str, str] | None = None  # what closes a block of code, and its indentation
        self._table: list[str] = []
        self._settled: tuple[int, list[int], list[Text]] | None = None
        """Of a table that has outgrown the window: how many of its lines are drawn for good, how wide the columns are,
        and the rows."""
        self._blank = True  # whether an empty line would be one too many
        self._next_frame = 0.0
        self._width = 0  # for which the line under way was wrapped
        self._n_shown = 0  # characters of it, without white space, that are shown
        self._n_kept = 0  # of these, the ones above a change of the width

    def push(self, text: str, channel: str = "content") -> None:
        """Takes more of the answer, or of a thought."""
        if channel != self._channel:
            self._end_part()
            self._channel = channel
        self._line += printable(text)
        while "\n" in self._line:
            line, _, self._line = self._line.partition("\n")
            self._finish(line)
        now = self._clock()
        if self._line and now >= self._next_frame:
            self._draw()
            done = self._clock()
            self._next_frame = done + max(FRAME, 10 * (done - now))

    def make_way(self) -> None:
        """What is shown stays, and the rest of the answer stands below what is to be written now."""
        self._painter.keep()
        self._n_kept, self._settled = self._n_shown, None

    def end(self) -> None:
        """The answer is over; the cursor stands at the beginning of a line."""
        self._end_part()

    def _end_part(self) -> None:
        """Before something of another kind, or the end: an empty line between what was thought and the answer."""
        if self._line:
            line, self._line = self._line, ""
            self._finish(line)
        self._end_table()
        self._fence = None
        if self._channel == "reasoning" and not self._blank:
            self._finish("")

    # A line

    def _draw(self) -> None:
        """Shows the line under way, as far as it can be known what it is."""
        line = self._line
        if self._channel == "reasoning":
            self._show(self._wrapped(Text(line, STYLES["thought"]), 0))
        elif self._fence is not None:
            if not _may_close(line, self._fence[0]):
                self._show_code(line)
        elif _FENCE.match(line):
            self._end_table()
            self._show(self._wrapped(Text(line, STYLES["fence"]), 0))
        elif not self._table and not TABLE_ROW.match(line) and not _UNDECIDED.match(line):
            self._show(self._rows(line, is_finished=False))

    def _finish(self, line: str) -> None:
        """A line is complete."""
        if self._channel == "reasoning":
            self._print(self._wrapped(Text(line, STYLES["thought"]), 0) if line.strip() else [])
        elif self._fence is not None:
            close, indent = self._fence
            if _closes(line, close):
                self._fence = None
                self._print([Text(line.removeprefix(indent), STYLES["fence"])])
            else:
                self._show_code(line, is_finished=True)
                self._blank = False
        elif fence := _FENCE.match(line):
            self._end_table()
            self._fence = (fence[2], " " * len(fence[1]))
            self._print(self._wrapped(Text(line, STYLES["fence"]), 0))
        elif self._is_of_table(line):
            self._table.append(line)
            self._show_table()
        else:
            self._end_table()
            if self._is_of_table(line):  # the first row of another
                self._table.append(line)
            else:
                self._print(self._rows(line, is_finished=True) if line.strip() else [])

    def _print(self, rows: list[Text]) -> None:
        """Shows a finished line; none is an empty one, of which there are never two together."""
        if not rows and self._blank:
            return
        if rows:
            self._show(rows)
            self._painter.keep()
        else:
            self._painter.skip()
        self._blank = not rows
        self._n_kept = self._n_shown = self._width = 0

    def _show(self, rows: list[Text]) -> None:
        """Has these rows stand for the line under way. Where the window has become wider or narrower, nobody knows
        where its rows are now: those that are there stay, and the line goes on below them."""
        width = self._columns
        if self._width not in (0, width):
            self._painter.keep()
            self._n_kept = self._n_shown
        self._width = width
        self._n_shown = sum(n_visible(row) for row in rows)
        rows = after(rows, self._n_kept)
        if rows:
            self._painter.show([self._escaped(row) for row in rows])

    def _show_code(self, line: str, is_finished: bool = False) -> None:
        """A line of code is never wrapped and has nothing around it: it can be copied. A long one goes on where it
        stopped, so that the terminal may break it."""
        assert self._fence is not None
        indent = self._fence[1]
        start = next((i for i in range(len(indent)) if line[i : i + 1] != " "), len(indent))
        color, reset = self._code_color
        code = line[start:]
        if code:
            self._painter.show([color + code])
        if is_finished and code:
            self._painter.show([color + code + reset])
            self._painter.keep()
        elif is_finished:
            self._painter.skip()

    @property
    def _code_color(self) -> tuple[str, str]:
        before, _, after = self._escaped(Text("x", STYLES["code"])).partition("x")
        return before, after

    def _rows(self, line: str, is_finished: bool) -> list[Text]:
        """The line as it is shown, wrapped."""
        if heading := _HEADING.match(line):
            text = self._inline(heading[2], is_finished)
            text.stylize(STYLES["heading"] + (" underline" if len(heading[1]) == 1 else ""))
            return self._wrapped(text, 0)
        if is_finished and _RULE.match(line):
            return [Text(self._signs["rule"] * min(self._columns - 1, 40), "dim")]
        if quote := _QUOTE.match(line):
            text = self._inline(quote[2], is_finished)
            text.stylize(STYLES["quote"])
            bar = (self._signs["bar"] + " ") * min(quote[1].count(">"), self._columns // 8)
            return [Text(bar, "dim") + row for row in self._wrapped(text, 0, len(bar))] or [Text(bar, "dim")]
        if item := _ITEM.match(line):
            sign = item[2] if item[2][0].isdigit() else self._signs["bullet"]
            head = item[1] + sign + " "
            return self._wrapped(Text(head) + self._inline(item[4], is_finished), len(head))
        content = line.lstrip(" ")
        indent = " " * (len(line) - len(content))
        return self._wrapped(Text(indent) + self._inline(content, is_finished), len(indent))

    @property
    def _columns(self) -> int:
        return max(self._size()[0], 2)

    def _wrapped(self, text: Text, indent: int, reserved: int = 0) -> list[Text]:
        """In rows of the terminal but for a last column, in which the cursor would be neither here nor there. Rows
        after the first are indented."""
        width = max(self._columns - 1 - reserved, 1)
        if columns_of(text.plain) + 8 * text.plain.count("\t") <= width:
            return [text]
        text.expand_tabs(4)
        indent = indent if width - indent >= 4 else 0
        head, rest = text[:indent], text[indent:]
        rows = wrap(rest, width - indent)
        return [(head if i == 0 else Text(" " * indent)) + row for i, row in enumerate(rows)]

    def _inline(self, text: str, is_finished: bool) -> Text:
        if len(text) > MAX_INLINE:
            return Text(text)
        return inline(text, is_finished)

    def _escaped(self, row: Text) -> str:
        """With escape sequences, where the terminal has colours and the user wants them."""
        key = (row.plain, str(row.style), tuple(row.spans))
        if key not in self._escapes:
            with self._console.capture() as capture:
                self._console.print(row, end="", soft_wrap=True)
            if len(self._escapes) >= 100:
                self._escapes.clear()
            self._escapes[key] = capture.get()
        return self._escapes[key]

    # Tables

    def _is_of_table(self, line: str) -> bool:
        if len(self._table) == 1:
            return bool(TABLE_RULE.match(line)) and len(cells_of(line)) == len(cells_of(self._table[0]))
        return bool(TABLE_ROW.match(line))

    def _show_table(self) -> None:
        """Draws the table so far; its first row alone may be no table."""
        if self._width not in (0, self._columns):
            self._settled = None
        rows = self._table_rows() if len(self._table) > 1 else self._rows(self._table[0], is_finished=True)
        if self._width not in (0, self._columns):  # nobody knows where it is now: once more below
            self._painter.keep()
        self._width = self._columns
        self._painter.show([self._escaped(row) for row in rows])

    def _end_table(self) -> None:
        if self._table:
            self._show_table()
            self._painter.keep()
            self._table, self._settled, self._blank = [], None, False
            self._n_kept = self._width = 0

    def _table_rows(self) -> list[Text]:
        header, rule = (cells_of(line) for line in self._table[:2])
        n = len(header)
        gap = f" {self._signs['bar']} "
        room = self._columns - 1 - len(gap) * (n - 1)
        if room < LEAST_COLUMN * n:
            return [row for line in self._table for row in self._wrapped(Text(line), 0)]
        n_done, widths, rows = self._settled or (0, [1] * n, [])
        lines = [line for i, line in enumerate(self._table) if i >= n_done and i != 1]
        cells = [[inline(cell, True) for cell in (cells_of(line) + [""] * n)[:n]] for line in lines]
        widths = column_widths(cells, widths, room)
        sides = [side_of(mark) for mark in rule]
        rows = list(rows)
        for i, row in enumerate(cells, n_done):
            if i == 0:
                for cell in row:
                    cell.stylize("bold")
            rows += table_row(row, widths, sides, Text(gap, "dim"))
            if i == 0:
                crossing = self._signs["rule"] + self._signs["cross"] + self._signs["rule"]
                rows.append(Text(crossing.join(self._signs["rule"] * width for width in widths), "dim"))
        if len(rows) >= self._size()[1] - 1:  # the head leaves the window: what is there stays as it is
            self._settled = len(self._table), widths, rows
        return rows


def _closes(line: str, fence: str) -> bool:
    text = line.strip()
    return len(text) >= len(fence) and set(text) == {fence[0]}


def _may_close(line: str, fence: str) -> bool:
    text = line.strip()
    return fence.startswith(text) or _closes(line, fence)


def _signs(encoding: str | None) -> dict[str, str]:
    signs = {"bullet": "•", "rule": "─", "bar": "│", "cross": "┼"}
    try:
        "".join(signs.values()).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return {"bullet": "*", "rule": "-", "bar": "|", "cross": "+"}
    return signs
