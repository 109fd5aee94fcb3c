"""Text in rows of a terminal: how wide it is, and where it may be broken."""

from __future__ import annotations

import re

from rich.cells import cell_len
from rich.text import Text

# Of the characters from U+1100 on many are wide, and may stand in any row.
_UNIT = re.compile(r"[^\S\n]+|[!-\u10ff]+|.", re.DOTALL)
_NOT_FIRST = frozenset("、。，．：；？！）］｝」』】〉》〕〗’”…ー々゛゜ぁぃぅぇぉっゃゅょァィゥェォッャュョ～·%")  # noqa: RUF001
_NOT_LAST = frozenset("（［｛「『【〈《〔〖‘“")  # noqa: RUF001
_JOINER = "\u200d"  # of emoji


def wrap(text: Text, width: int) -> list[Text]:
    """In rows of this width, broken between words, and where there are none, as in Chinese and Japanese, between
    characters. (rich's own wrapping takes all up to the next space for a word.)"""
    rows = []
    for line in text.split("\n", allow_blank=True):
        parts = list(line.divide(_breaks(line.plain, width)))
        for part in parts:
            if part is not parts[-1] or columns_of(part.plain) > width:  # white space may hang over
                part.rstrip()
        rows += parts
    return rows


def columns_of(text: str) -> int:
    """Columns that a text takes. Of joined emoji, those that it takes where they are not joined, if that is more."""
    return cell_len(text) if text.isascii() else max(cell_len(text), sum(map(cell_len, text)))


def _breaks(text: str, width: int) -> list[int]:
    """Where rows after the first begin."""
    breaks = []
    x = 0
    for start, end in _units(text):
        unit = text[start:end]
        size = columns_of(unit)
        if x and x + size > width and not unit.isspace():
            breaks.append(start)
            x = 0
        if size <= width or unit.isspace():
            x += size
            continue
        for i, char in enumerate(unit, start):  # a word that is longer than a row
            if x and x + columns_of(char) > width:
                breaks.append(i)
                x = 0
            x += columns_of(char)
    return breaks


def _units(text: str) -> list[tuple[int, int]]:
    """What is not to be broken: words, single wide characters with the punctuation that belongs to them, emoji of
    several; and the white space between."""
    units: list[tuple[int, int]] = []
    for found in _UNIT.finditer(text):
        start, end = found.span()
        char, before = text[start], text[start - 1] if start else " "
        is_joined = char in _NOT_FIRST or before in _NOT_LAST or before == _JOINER or not columns_of(char)
        if is_joined and not before.isspace() and not char.isspace():
            start = units.pop()[0]
        units.append((start, end))
    return units


def n_visible(text: Text) -> int:
    """Characters that are no white space."""
    return sum(not char.isspace() for char in text.plain)


def after(rows: list[Text], n: int) -> list[Text]:
    """What follows the first n characters that are no white space."""
    while rows and n:
        count = n_visible(rows[0])
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
