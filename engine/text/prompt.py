"""A rendered conversation that knows which spellings of special tokens its template wrote, and which stood in messages.

A user's text may spell "<|im_end|>", and the result of a tool may. If that were read as the token, it would end the
turn, and what follows could pose as anybody. So before a template sees such a text, a mark (a character for private
use) is put into each spelling, where it stops the tokenizer from finding it. It is taken out after the special tokens
have been found: what is left is encoded as ordinary text.
"""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from typing import Any, Self
from urllib.parse import quote

from qrun.engine.text.tokenizer import Tokenizer

_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


class Prompt(str):
    """The text that a template made. marked: the same with a mark in each spelling of a token that is to stay text.

    A text may be added to it. What else is made of it is an ordinary text, in which all spellings count.
    """

    marked: str
    mark: str

    def __new__(cls, marked: str, mark: str) -> Self:
        self = super().__new__(cls, marked.replace(mark, ""))
        self.marked, self.mark = marked, mark
        return self

    def __add__(self, other: str) -> "Prompt":
        """What is added is the caller's, as if the template had written it."""
        return Prompt(self.marked + other.replace(self.mark, ""), self.mark)


class Spellings:
    """Finds spellings of special tokens, and puts a mark into them."""

    def __init__(self, spellings: Iterable[str]) -> None:
        # no mark can be put into a single character
        self._spellings = frozenset(spelling for spelling in spellings if len(spelling) > 1)
        # Vocabularies have thousands: by their first two characters, the lengths of those that start so.
        self._lengths: dict[str, list[int]] = {}
        seconds: dict[str, str] = {}
        for head, length in sorted({(spelling[:2], len(spelling)) for spelling in self._spellings}):
            self._lengths.setdefault(head, []).append(length)
            seconds[head[0]] = seconds.get(head[0], "") + re.escape(head[1])
        heads = [f"{re.escape(first)}(?=[{rest}])" for first, rest in seconds.items()]
        self._heads = re.compile("|".join(heads)) if heads else None

    def are_in(self, texts: Iterable[str]) -> bool:
        return any(True for text in texts for _ in self._starts(text))

    def broken(self, value: Any, mark: str) -> Any:
        """A copy of a text, or of all texts in a container, in which the mark follows the first character of each."""
        if isinstance(value, str):
            starts = [0, *(start + 1 for start in self._starts(value)), len(value)]
            return mark.join(value[start:end] for start, end in pairwise(starts)) if len(starts) > 2 else value
        if isinstance(value, dict):
            return {self.broken(key, mark): self.broken(item, mark) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.broken(item, mark) for item in value]
        return value

    def _starts(self, text: str) -> Iterator[int]:
        """Where a spelling starts; they may overlap."""
        for head in self._heads.finditer(text) if self._heads else ():
            start = head.start()
            if any(
                text[start : start + length] in self._spellings for length in self._lengths[text[start : start + 2]]
            ):
                yield start


def texts_in(value: Any) -> Iterator[str]:
    """All texts in a container."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from texts_in(key)
            yield from texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_in(item)


def unused_mark(texts: Iterable[str]) -> str:
    """A character for private use that occurs in none of the texts, and is not spelt out there as an escape."""
    everything = "\n".join(texts)
    lower = everything.lower()
    for code in chain.from_iterable(_PRIVATE_USE):
        mark = chr(code)
        if mark not in everything and not any(form.lower() in lower for form in _escapes(mark)):
            return mark
    raise ValueError("the messages use every character for private use")


def with_mark(text: str, mark: str) -> Prompt:
    """What a template made of marked texts; it may have written the mark as an escape of JSON, Python or a URL."""
    escaped = "|".join(rf"\\*{re.escape(form)}" for form in _escapes(mark))
    return Prompt(re.sub(escaped, mark, text, flags=re.IGNORECASE), mark)


def _escapes(mark: str) -> list[str]:
    """Without the backslash in front, of which there may be several."""
    return [json.dumps(mark)[2:-1], repr(mark)[2:-1], quote(mark)]


def marked(text: str) -> str:
    """The text with its marks."""
    return text.marked if isinstance(text, Prompt) else text


def after(text: str, beginning: str) -> str | None:
    """What follows this beginning of the marked text; None if the text begins otherwise."""
    whole = marked(text)
    if not whole.startswith(beginning):
        return None
    rest = whole[len(beginning) :]
    return Prompt(rest, text.mark) if isinstance(text, Prompt) else rest


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of a prompt, or of any text whose spellings of special tokens all count."""
    if isinstance(text, Prompt):
        return tokenizer.encode(text.marked, add_special=False, parse_special=True, mark=text.mark)
    return tokenizer.encode(text, add_special=False, parse_special=True)
