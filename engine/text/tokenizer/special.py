"""Special pieces in a text: they are found by their spelling before anything else looks at the text."""

import re
import unicodedata
from collections.abc import Iterator
from functools import cache

from qrun.engine.text.tokenizer.vocabulary import PieceType, Vocabulary

# What Unicode takes for white space (the property White_Space).
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LEADING_SPACE = re.compile(f"[{_WHITE_SPACE}]*")
_IS_SPACE = re.compile(f"[{_WHITE_SPACE}]")
# Letters in circles and squares: symbols by category, and alphabetic all the same.
_ENCLOSED = (range(0x24B6, 0x24EA), range(0x1F130, 0x1F14A), range(0x1F150, 0x1F16A), range(0x1F170, 0x1F18A))


class SpecialPieces:
    """Two kinds: those that are looked for in the text as it was given, and those that are looked for, in their own
    normal form, once it has been normalised. User-defined pieces are found in any text, control pieces and the unknown
    one only if asked for."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        ids = vocabulary.ids_of(PieceType.USER_DEFINED, PieceType.CONTROL, PieceType.UNKNOWN)
        user_defined = frozenset(vocabulary.ids_of(PieceType.USER_DEFINED))
        self.ids = frozenset(ids)
        normalized = vocabulary.normalized_ids
        spellings = [piece.decode(errors="replace") for piece in vocabulary.pieces.some(ids)]
        spelt = list(zip(spellings, ids, strict=True))
        raw = {spelling: id for spelling, id in spelt if id not in normalized}
        later = {vocabulary.normalizer(spelling): id for spelling, id in spelt if id in normalized}
        later.pop("", None)
        # By whether control pieces count; made when first asked for.
        self._raw = cache(lambda control: _Spellings(raw if control else _among(raw, user_defined)))
        self._normalized = cache(lambda control: _Spellings(later if control else _among(later, user_defined)))

    def split(self, text: str, control: bool) -> Iterator[str | int]:
        """The text as pieces of ordinary text (none empty) and ids of special pieces between them."""
        return self._split(text, self._raw(control))

    def split_normalized(self, text: str, control: bool) -> Iterator[str | int]:
        """The same of a text that has been normalised, with the pieces that are looked for only there."""
        return self._split(text, self._normalized(control))

    def _split(self, text: str, spellings: "_Spellings") -> Iterator[str | int]:
        """From the left, and of the pieces that begin at one place the longest, as Transformers finds them."""
        present = spellings.present(text)
        if not present:
            yield from [text] if text else []
            return
        vocabulary = self._vocabulary
        end = 0
        for match in re.finditer("|".join(map(re.escape, present)), text):
            start, stop = match.span()
            id = spellings.ids[match[0]]
            if id in vocabulary.single_word_ids and _within_word(text, start, stop):
                continue
            if id in vocabulary.lstrip_ids:
                while start > end and _IS_SPACE.match(text[start - 1]):
                    start -= 1
                start = max(start, end)
            if id in vocabulary.rstrip_ids and (space := _LEADING_SPACE.match(text, stop)):
                stop = space.end()
            if end < start:
                yield text[end:start]
            if start < stop:  # a piece of white space may be taken already
                yield id
            end = stop
        if end < len(text):
            yield text[end:]


class _Spellings:
    """Pieces to look for, by how they begin: a model can have thousands, and most texts have none of them."""

    def __init__(self, ids: dict[str, int]) -> None:
        self.ids = ids
        self._groups: dict[str, list[str]] = {}
        for piece in ids:
            self._groups.setdefault(piece[:4], []).append(piece)

    def present(self, text: str) -> list[str]:
        """Those that the text has anywhere, the longest first."""
        found = [piece for start, group in self._groups.items() if start in text for piece in group if piece in text]
        return sorted(found, key=lambda piece: -len(piece))


def _among(ids: dict[str, int], kept: frozenset[int]) -> dict[str, int]:
    return {piece: id for piece, id in ids.items() if id in kept}


def _within_word(text: str, start: int, stop: int) -> bool:
    return (start > 0 and _is_of_word(text[start - 1])) or (stop < len(text) and _is_of_word(text[stop]))


def _is_of_word(character: str) -> bool:
    r"""What \w matches by Unicode's rules for regular expressions (UTS #18, annex C)."""
    category = unicodedata.category(character)
    return (
        category[0] in "LM"
        or category in ("Nd", "Nl", "Pc")
        or character in "\u200c\u200d"
        or any(ord(character) in block for block in _ENCLOSED)
    )
