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

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from qrun.cli.console import printable, write_terminal
from qrun.cli.painter import Painter, terminal_size

STYLES = {
    "code": "cyan",
    "heading": "bold",
    "link": "underline",
    "thought": "dim",
    "fence": "dim",
    "quote": "italic",
}

FRAME = 1 / 30
"""The least seconds from one writing of an unfinished line to the next: a fast model would be held up."""

_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*$")
_ITEM = re.compile(r"([ \t]*)([-*+]|\d{1,9}[.)])([ \t]+)(?=\S)(.*)$", re.DOTALL)
_QUOTE = re.compile(r" {0,3}((?:>[ ]?)+)(.*)$")
_FENCE = re.compile(r"([ \t]*(?:[-*+][ \t]+)?)(`{3,}|~{3,})([^`]*)$")
_RULE = re.compile(r" {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,}|={3,}[ \t]*)$")
_TABLE_ROW = re.compile(r"[ \t]*\|")
_TABLE_RULE = re.compile(r"[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$")
_UNDECIDED = re.compile(r"[ \t]*(?:[-*+_=>~`#| \t]*|\d{1,9}[.)]?)$")
"""The beginning of a line that may become several things."""
_LINK = re.compile(
    r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]"  # the text, or an image's
    r"\(\s*<?([^()\s<>]*(?:\([^()\s]*\)[^()\s]*)*)>?(?:\s+[\"'(][^)]*)?\)"  # the address, and a title
)
_ORDINARY = re.compile(r"[^\\`\[!*_~]+")
_ESCAPED = "*_`~#|>"
_MARKS = ("***", "**", "__", "~~", "*", "_")
_MARK_STYLES = {"***": "bold italic", "**": "bold", "__": "bold", "~~": "strike", "*": "italic", "_": "italic"}
# Of the characters from U+1100 on many are wide, and may stand in any row.
_UNIT = re.compile(r"[^\S\n]+|[!-\u10ff]+|.", re.DOTALL)
_NOT_FIRST = frozenset("、。，．：；？！）］｝」』】〉》〕〗’”…ー々゛゜ぁぃぅぇぉっゃゅょァィゥェォッャュョ～·%")  # noqa: RUF001
_NOT_LAST = frozenset("（［｛「『【〈《〔〖‘“")  # noqa: RUF001
_JOINER = "\u200d"  # of emoji
_MAX_INLINE = 2000  # characters of a line in which marks are looked for
_LEAST_COLUMN = 4  # of a table, in characters


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
            self._leave_table(line)
            self._show(self._wrapped(Text(line, STYLES["fence"]), 0))
        elif not self._table and not _TABLE_ROW.match(line) and not _UNDECIDED.match(line):
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
            self._leave_table(line)
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
        self._n_shown = sum(_n_visible(row) for row in rows)
        rows = _after(rows, self._n_kept)
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
        if _columns_of(text.plain) + 8 * text.plain.count("\t") <= width:
            return [text]
        text.expand_tabs(4)
        indent = indent if width - indent >= 4 else 0
        head, rest = text[:indent], text[indent:]
        rows = _wrap(rest, width - indent)
        return [(head if i == 0 else Text(" " * indent)) + row for i, row in enumerate(rows)]

    def _inline(self, text: str, is_finished: bool) -> Text:
        if len(text) > _MAX_INLINE:
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
            return bool(_TABLE_RULE.match(line)) and len(_cells(line)) == len(_cells(self._table[0]))
        return bool(_TABLE_ROW.match(line))

    def _leave_table(self, line: str) -> None:
        if self._table:
            self._end_table()

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
        header, rule = (_cells(line) for line in self._table[:2])
        n = len(header)
        gap = f" {self._signs['bar']} "
        room = self._columns - 1 - len(gap) * (n - 1)
        if room < _LEAST_COLUMN * n:
            return [row for line in self._table for row in self._wrapped(Text(line), 0)]
        n_done, widths, rows = self._settled or (0, [1] * n, [])
        lines = [line for i, line in enumerate(self._table) if i >= n_done and i != 1]
        cells = [[inline(cell, True) for cell in (_cells(line) + [""] * n)[:n]] for line in lines]
        widths = _column_widths(cells, widths, room)
        sides = [_side(mark) for mark in rule]
        rows = list(rows)
        for i, row in enumerate(cells, n_done):
            if i == 0:
                for cell in row:
                    cell.stylize("bold")
            rows += _table_row(row, widths, sides, Text(gap, "dim"))
            if i == 0:
                crossing = self._signs["rule"] + self._signs["cross"] + self._signs["rule"]
                rows.append(Text(crossing.join(self._signs["rule"] * width for width in widths), "dim"))
        if len(rows) >= self._size()[1] - 1:  # the head leaves the window: what is there stays as it is
            self._settled = len(self._table), widths, rows
        return rows


def inline(text: str, is_finished: bool, style: str = "") -> Text:
    """A line with its marks turned into styles. Of one that is under way, what has been opened counts as closed at the
    end, and marks at the very end are left out until it is known what they are."""
    if not is_finished:
        text = re.sub(r"(?<=[^\s*_~`])[*_~`]{1,3}$|(?<!\S)[*_~`]{1,3}$", "", text)
    out = Text(style=style)
    unclosed: set[str] = set()
    plain = ""
    i = 0

    def add(part: Text | str, part_style: str = "") -> None:
        nonlocal plain
        out.append(plain)
        plain = ""
        if isinstance(part, str):
            out.append(part, part_style)
        else:
            out.append_text(part)

    while i < len(text):
        char = text[i]
        if ordinary := _ORDINARY.match(text, i):
            plain += ordinary[0]
            i = ordinary.end()
        elif char == "\\" and text[i + 1 : i + 2] and text[i + 1] in _ESCAPED:
            plain += text[i + 1]
            i += 2
        elif char == "`":
            ticks = re.compile("`+").match(text, i)[0]  # type: ignore[index]
            close = re.compile(rf"(?<!`){ticks}(?!`)").search(text, i + len(ticks))
            if close or not is_finished:
                end = close.start() if close else len(text)
                code = text[i + len(ticks) : end]
                if code.startswith(" ") and code.endswith(" ") and code.strip():
                    code = code[1:-1]
                add(code, STYLES["code"])
                i = close.end() if close else len(text)
            else:
                plain += ticks
                i += len(ticks)
        elif char in "[!" and (link := _LINK.match(text, i)):
            label = inline(link[1], True)
            label.stylize(STYLES["link"])
            add(label)
            if link[2] and link[2] != label.plain:
                add(f" ({link[2]})", "dim")
            i = link.end()
        elif mark := next((mark for mark in _MARKS if text.startswith(mark, i) and _opens(text, i, mark)), None):
            end = -1 if mark in unclosed else _closing(text, i + len(mark), mark)
            if end < 0:
                unclosed.add(mark)  # nor is a later one
            is_name = mark == "__" and re.compile(r"\w*(__|$)").match(text, i + 2)  # of Python, such as __init__
            if (end >= 0 or not is_finished) and not is_name:
                inner = inline(text[i + len(mark) : end if end >= 0 else len(text)], is_finished or end >= 0)
                inner.stylize(_MARK_STYLES[mark])
                add(inner)
                i = end + len(mark) if end >= 0 else len(text)
            else:
                plain += mark
                i += len(mark)
        else:
            plain += char
            i += 1
    add("")
    return out


def _opens(text: str, at: int, mark: str) -> bool:
    """Whether a mark may begin something: text follows it at once, and within a word "_" means nothing."""
    before, after = text[at - 1 : at] if at else "", text[at + len(mark) : at + len(mark) + 1]
    if not after or after.isspace() or after == mark[0]:
        return False
    return mark[0] == "*" or not before.isalnum()


def _closing(text: str, start: int, mark: str) -> int:
    """Where the mark stands that closes what begins here; -1 for nowhere."""
    at = start
    while (at := text.find(mark, at)) >= 0:
        before, after = text[at - 1], text[at + len(mark) : at + len(mark) + 1]
        in_code = text.count("`", start, at) % 2
        length = len(text) - at - len(text[at:].lstrip(mark[0]))
        fits = length == len(mark) or length == 3 or (mark[0] == "_" and length == 1)
        within_word = mark[0] == "_" and after.isalnum()
        if at > start and not before.isspace() and not in_code and before != "\\" and fits and not within_word:
            return at + (length - len(mark) if length == 3 else 0)
        at += max(length, 1)
    return -1


def _wrap(text: Text, width: int) -> list[Text]:
    """In rows of this width, broken between words, and where there are none, as in Chinese and Japanese, between
    characters. (rich's own wrapping takes all up to the next space for a word.)"""
    rows = []
    for line in text.split("\n", allow_blank=True):
        parts = list(line.divide(_breaks(line.plain, width)))
        for part in parts:
            if part is not parts[-1] or _columns_of(part.plain) > width:  # white space may hang over
                part.rstrip()
        rows += parts
    return rows


def _columns_of(text: str) -> int:
    """Columns that a text takes. Of joined emoji, those that it takes where they are not joined, if that is more."""
    return cell_len(text) if text.isascii() else max(cell_len(text), sum(map(cell_len, text)))


def _breaks(text: str, width: int) -> list[int]:
    """Where rows after the first begin."""
    breaks = []
    x = 0
    for start, end in _units(text):
        unit = text[start:end]
        size = _columns_of(unit)
        if x and x + size > width and not unit.isspace():
            breaks.append(start)
            x = 0
        if size <= width or unit.isspace():
            x += size
            continue
        for i, char in enumerate(unit, start):  # a word that is longer than a row
            if x and x + _columns_of(char) > width:
                breaks.append(i)
                x = 0
            x += _columns_of(char)
    return breaks


def _units(text: str) -> list[tuple[int, int]]:
    """What is not to be broken: words, single wide characters with the punctuation that belongs to them, emoji of
    several; and the white space between."""
    units: list[tuple[int, int]] = []
    for found in _UNIT.finditer(text):
        start, end = found.span()
        char, before = text[start], text[start - 1] if start else " "
        is_joined = char in _NOT_FIRST or before in _NOT_LAST or before == _JOINER or not _columns_of(char)
        if is_joined and not before.isspace() and not char.isspace():
            start = units.pop()[0]
        units.append((start, end))
    return units


def _n_visible(text: Text) -> int:
    return sum(not char.isspace() for char in text.plain)


def _after(rows: list[Text], n: int) -> list[Text]:
    """What follows the first n characters that are no white space."""
    while rows and n:
        count = _n_visible(rows[0])
        if count > n:
            seen = 0
            for i, char in enumerate(rows[0].plain):
                seen += not char.isspace()
                if seen == n:
                    rest = rows[0][i + 1 :]
                    lead = len(rest.plain) - len(rest.plain.lstrip())
                    return [rest[lead:], *rows[1:]]
        rows, n = rows[1:], n - count
    return rows


def _closes(line: str, fence: str) -> bool:
    text = line.strip()
    return len(text) >= len(fence) and set(text) == {fence[0]}


def _may_close(line: str, fence: str) -> bool:
    text = line.strip()
    return fence.startswith(text) or _closes(line, fence)


def _cells(line: str) -> list[str]:
    """The cells of a row of a table."""
    text = line.strip()
    text = text[1:] if text.startswith("|") else text
    text = text[:-1] if text.endswith("|") and not text.endswith("\\|") else text
    # a bar within code is none, but to see that takes long in a long line
    between = r"(?<!\\)\|(?=(?:[^`]*`[^`]*`)*[^`]*$)" if len(text) <= _MAX_INLINE else r"(?<!\\)\|"
    cells = re.split(between, text)
    return [re.sub(r"<br\s*/?>", "\n", cell.strip()) for cell in cells]


def _side(rule: str) -> str:
    if rule.endswith(":"):
        return "center" if rule.startswith(":") else "right"
    return "left"


def _column_widths(cells: list[list[Text]], least: list[int], room: int) -> list[int]:
    """How wide each column is to be: as its cells want, or less for the widest ones where there is no room."""
    wanted = [
        max([least[i], *(_columns_of(line) for row in cells for line in row[i].plain.split("\n"))])
        for i in range(len(least))
    ]
    widths = wanted
    low, high = _LEAST_COLUMN, max(wanted)
    if sum(wanted) > room:
        while low < high:  # the largest bound that fits
            bound = (low + high + 1) // 2
            if sum(min(width, bound) for width in wanted) <= room:
                low = bound
            else:
                high = bound - 1
        widths = [min(width, low) for width in wanted]
        for i, width in enumerate(wanted):  # what is left over
            widths[i] += min(width - widths[i], max(room - sum(widths), 0))
    return widths


def _table_row(cells: list[Text], widths: list[int], sides: list[str], gap: Text) -> list[Text]:
    wrapped = [_wrap(cell, width) or [Text()] for cell, width in zip(cells, widths, strict=True)]
    rows = []
    for i in range(max(map(len, wrapped))):
        row = Text()
        for j, (lines, width) in enumerate(zip(wrapped, widths, strict=True)):
            cell = lines[i].copy() if i < len(lines) else Text()
            cell.rstrip()
            side = sides[j] if j < len(sides) else "left"
            free = max(width - _columns_of(cell.plain), 0)
            left = {"left": 0, "right": free, "center": free // 2}[side]
            row.append_text(gap if j else Text())
            row.append(" " * left).append_text(cell).append(" " * (free - left))
        row.rstrip()
        rows.append(row)
    return rows


def _signs(encoding: str | None) -> dict[str, str]:
    signs = {"bullet": "•", "rule": "─", "bar": "│", "cross": "┼"}
    try:
        "".join(signs.values()).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return {"bullet": "*", "rule": "-", "bar": "|", "cross": "+"}
    return signs
