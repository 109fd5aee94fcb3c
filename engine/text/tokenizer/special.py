"""Special pieces in a text: they are found by their spelling before anything else looks at the text."""

from collections.abc import Iterator

from qrun.engine.text.tokenizer.vocabulary import PieceType, Vocabulary

# What C's isspace() takes for white space.
_ASCII_SPACE = " \t\n\v\f\r"


class SpecialPieces:
    """always: user-defined pieces, which are found in any text. control: those that are found only if asked for."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._always = self._longest_first(PieceType.USER_DEFINED)
        self._all = self._longest_first(PieceType.USER_DEFINED, PieceType.CONTROL, PieceType.UNKNOWN)
        self.ids = frozenset(self._all.values())

    def _longest_first(self, *types: PieceType) -> dict[str, int]:
        pieces = self._vocabulary.pieces
        ids = sorted(self._vocabulary.ids_of(*types), key=lambda id: -len(pieces[id]))
        return {pieces[id].decode(errors="replace"): id for id in ids}

    def split(self, text: str, control: bool) -> list[str | int]:
        """The text as pieces of ordinary text (none empty) and ids of special pieces between them.

        A longer piece is found before a shorter one anywhere in the text, and equals from the left, as in llama.cpp.
        """
        parts: list[str | int] = [text] if text else []
        for piece, id in (self._all if control else self._always).items():
            if piece in text:
                parts = [part for old in parts for part in self._cut(old, piece, id)]
        return parts

    def _cut(self, part: str | int, piece: str, id: int) -> Iterator[str | int]:
        if isinstance(part, int):
            yield part
            return
        first, *others = part.split(piece)
        if first:
            yield first
        for other in others:
            yield id
            if self._vocabulary.strips_right(id):
                other = other.lstrip(_ASCII_SPACE)
            if other:
                yield other
