"""RWKV's tokenizer: from the left, always the longest piece that the text goes on with, byte by byte.

Pieces are spelt as Python spells bytes: `\\t`, `\\n`, `\\r`, `\\xff`; any other character behind a backslash is itself.
"""

from collections.abc import Callable

from qrun.engine.text.tokenizer.vocabulary import PieceType, Vocabulary

BEGINNING = 2
"""Pieces are looked up by so many bytes first."""


def longest_match_encoder(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """Text to ids. Bytes that no piece has are the unknown token, or nothing if there is none."""
    ids: dict[bytes, int] = {}
    for id in vocabulary.ids_of(PieceType.NORMAL, PieceType.USER_DEFINED):
        ids[vocabulary.text(id)] = id
    lengths: dict[bytes, set[int]] = {}
    for piece in ids:
        lengths.setdefault(piece[:BEGINNING], set()).add(len(piece))
    longest_first = {beginning: sorted(found, reverse=True) for beginning, found in lengths.items()}
    unknown = vocabulary.unknown_id

    def encode(text: str) -> list[int]:
        data, found, place = text.encode(), [], 0
        while place < len(data):
            beginning = data[place : place + BEGINNING]
            for length in (*longest_first.get(beginning, ()), 1):
                id = ids.get(data[place : place + length])
                if id is not None:
                    found.append(id)
                    place += length
                    break
            else:
                found += [unknown] if unknown is not None else []
                place += 1
        return found

    return encode
