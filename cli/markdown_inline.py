"""Marks within a line of Markdown: emphasis, code and links, turned into styles."""

from __future__ import annotations

import re

from rich.text import Text

STYLES = {
    "code": "cyan",
    "heading": "bold",
    "link": "underline",
    "thought": "dim",
    "fence": "dim",
    "quote": "italic",
}

MAX_INLINE = 2000
"""Characters of a line in which marks are looked for."""

_LINK = re.compile(
    r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]"  # the text, or an image's
    r"\(\s*<?([^()\s<>]*(?:\([^()\s]*\)[^()\s]*)*)>?(?:\s+[\"'(][^)]*)?\)"  # the address, and a title
)
_ORDINARY = re.compile(r"[^\\`\[!*_~]+")
_ESCAPED = "*_`~#|>"
_MARKS = ("***", "**", "__", "~~", "*", "_")
_MARK_STYLES = {"***": "bold italic", "**": "bold", "__": "bold", "~~": "strike", "*": "italic", "_": "italic"}


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
