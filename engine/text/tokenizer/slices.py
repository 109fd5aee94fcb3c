"""Long texts in slices, and in a way in which other threads can run meanwhile."""

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer

SLICE = 1 << 11
"""Characters, which are cut into words in some three milliseconds, in which nothing else can run."""
_CUTS = {
    r"(?<=[a-z])(?= [a-z])": ("ab", " cd"),
    r"(?<=[a-z])(?=[0-9])": ("ab", "12"),
    r"(?<=[a-z])(?=\n)": ("ab", "\ncd"),
    r"(?<=[0-9])(?=[0-9])": ("1", "2"),
}
"""Where words may end, and texts that show whether they do."""


def library_ids(tokenizer: "Tokenizer", text: str) -> list[int]:
    """Of a text as it is. The library lets other threads run while it encodes a batch, and not while it encodes a text;
    and where nobody asks for the places of tokens, a long text takes it no longer than many short ones."""
    (encoded,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
    ids: list[int] = encoded.ids
    return ids


def safe_cuts(pre_tokenizer: "PreTokenizer", space: str = " ") -> re.Pattern[str]:
    """Finds places where every text can be cut, to the same tokens: words end there, and no expression looks back, or
    further on than digits and spaces. space: how it is spelt for the pre-tokenizer."""

    def ends(word: str, further: str) -> bool:
        text = (word + further).replace(" ", space)
        return next(iter(pre_tokenizer.pre_tokenize_str(text)))[0] == word

    found = [place for place, (word, further) in _CUTS.items() if ends(word, further)]
    return re.compile("|".join(found) or "(?!)")


def slices(text: str, cut: re.Pattern[str]) -> Iterator[str]:
    """The text in parts, each of which ends at a place that `cut` finds."""
    start = 0
    while len(text) - start > SLICE and (place := cut.search(text, start + SLICE)) is not None:
        yield text[start : place.start()]
        start = place.start()
    yield text[start:]


def in_slices(encode: Callable[[str], list[int]], cuts: Callable[[], re.Pattern[str]]) -> Callable[[str], list[int]]:
    """The same encoder, for long texts. cuts: asked for when there is one."""
    cut: re.Pattern[str] | None = None

    def encode_slices(text: str) -> list[int]:
        nonlocal cut
        if len(text) < 2 * SLICE:
            return encode(text)
        if cut is None:
            cut = cuts()
        return [id for part in slices(text, cut) for id in encode(part)]

    return encode_slices
