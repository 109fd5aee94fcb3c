"""The first texts of a process, merged here: the libraries that do it for all later ones first want to be handed the
whole vocabulary, which takes them from 0.1 s (50 thousand pieces) to a second.

The tokens are the same. What is out of the ordinary is left to the libraries: texts with characters that have no piece,
and vocabularies that contradict themselves, which they refuse.
"""

import re
from collections.abc import Callable, Sequence
from functools import cache
from heapq import heapify, heappop, heappush

import numpy as np

from qrun.engine.native.locks import ForkAwareLock
from qrun.engine.text.tokenizer.pairs import LONGEST_WORD, Pairs
from qrun.engine.text.tokenizer.spellings import Spellings
from qrun.engine.text.tokenizer.vocabulary import SPACE, Vocabulary
from qrun.formats.gguf.strings import LENGTH_BYTES, Strings

Encoder = Callable[[str], list[int]]
FirstEncoder = Callable[[str, int], tuple[list[int] | None, int]]
"""Takes a text, and how many characters of words it may merge that it has not met. Gives the ids, and how many
characters those words had; None for ids: the text is for the library."""
Rank = Callable[[bytes, bytes], float | None]

_FIRST_CHARACTERS = 4000
_STRINGS_A_CHARACTER = 8  # of a vocabulary, which a library takes in while one character is merged here
_AT_ONCE = 8  # characters of many words take as long as one of a word alone
_STRINGS_AT_ONCE = 256  # of a vocabulary, for one character of words before they are worth to be merged at once
_FEW = 60  # characters that are merged sooner word by word
_REPEATED = 8  # in long texts, words have so many times the characters of those that differ, or fewer


def first_characters(n_strings: int) -> int:
    """How many characters are merged here for a vocabulary of so many pieces and merges: as many as take as long as the
    library needs to begin. In its time no other thread can do anything, in this one all can."""
    return max(_FIRST_CHARACTERS, n_strings // _STRINGS_A_CHARACTER)


class StagedEncoder:
    """Encodes the first texts here, and has a library made when there are more. May be called from any thread."""

    def __init__(self, first: FirstEncoder | None, make_library: Callable[[], Encoder], n_strings: int) -> None:
        self._first = first
        self._left = first_characters(n_strings)
        self._make_library = make_library
        self._library: Encoder | None = None
        self._lock = ForkAwareLock()  # held while the library is made

    def __call__(self, text: str) -> list[int]:
        first = self._first
        if first is not None and len(text) <= self._left * _REPEATED:
            ids, n_new = first(text, self._left)
            self._left -= n_new
            if ids is not None:
                return ids
        if self._library is None:
            with self._lock:
                if self._library is None:
                    self._library = self._make_library()
                    self._first = None
        return self._library(text)


def _word_by_word(
    words: Callable[[str], Sequence[str]],
    word_ids: Callable[[str], list[int] | None],
    many: Callable[[list[str]], list[list[int]] | None] | None = None,
    many_from: int = 0,
) -> FirstEncoder:
    """words: cuts a text where nothing merges across. word_ids: encodes one, if it can be done here. many: encodes
    those that are no longer than LONGEST_WORD, if they can be, in a share of the time, once texts have had so many
    characters of new words."""
    known: dict[str, list[int]] = {}
    n_before = 0

    def encode(text: str, most: int) -> tuple[list[int] | None, int]:
        nonlocal n_before
        found = words(text)
        new = [word for word in dict.fromkeys(found) if word not in known]
        n_new = sum(map(len, new))
        n_before += n_new
        at_once = many if n_before >= many_from and n_new > _FEW else None
        short = [word for word in new if at_once and len(word) <= LONGEST_WORD]
        n_short = sum(map(len, short))
        n_new += n_short // _AT_ONCE - n_short
        if n_new > most:
            return None, 0
        if at_once and short:
            if (all_ids := at_once(short)) is None:
                return None, n_new
            known.update(zip(short, all_ids, strict=True))
        for word in new:
            if word in known:
                continue
            if (ids := word_ids(word)) is None:
                return None, n_new
            known[word] = ids
        return [id for word in found for id in known[word]], n_new

    return encode


def merged(symbols: list[bytes], rank: Rank) -> list[bytes]:
    """Neighbours merged, those of the lowest rank first, and of equals those that come first; None: never."""
    n = len(symbols)
    symbols = [*symbols]
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))
    # Of the place on the left, and the bytes of both: if they have others since, this is out of date.
    waiting = [
        (found, left, len(symbols[left]) + len(symbols[left + 1]))
        for left in range(n - 1)
        if (found := rank(symbols[left], symbols[left + 1])) is not None
    ]
    heapify(waiting)
    while waiting:
        _, left, n_bytes = heappop(waiting)
        right = after[left]
        if not symbols[left] or right >= n or len(symbols[left]) + len(symbols[right]) != n_bytes:
            continue
        if rank(symbols[left], symbols[right]) is None:  # the same bytes, cut elsewhere since
            continue
        symbols[left] += symbols[right]
        symbols[right] = b""
        further = after[left] = after[right]
        if further < n:
            before[further] = left
        for one, other in ((before[left], left), (left, further)):
            if one >= 0 and other < n and (found := rank(symbols[one], symbols[other])) is not None:
                heappush(waiting, (found, one, len(symbols[one]) + len(symbols[other])))
    return [symbol for symbol in symbols if symbol]


def first_byte_pairs(vocabulary: Vocabulary, words: Callable[[str], list[str]]) -> FirstEncoder | None:
    """By ranks of merges. words: cuts a text, and spells it as pieces are. None: this vocabulary is for the library."""
    merges = vocabulary.merges()
    parts = _parts(vocabulary, merges)
    if parts is None:
        return None
    pieces = vocabulary.spellings
    ignore_merges = vocabulary.pre_tokenizer.ignore_merges
    if vocabulary.pre_tokenizer.alphabet == "metaspace" and not ignore_merges:  # there a word may be a whole line
        lines, at_spaces = words, _cut_at_spaces(vocabulary)

        def words(text: str) -> list[str]:
            return [word for line in lines(text) for word in at_spaces(line)] if len(text) > _LONG else lines(text)

    @cache
    def ranks() -> Spellings:
        return Spellings(merges)

    @cache
    def pairs() -> Pairs:
        left, right, joined = (pieces.last_ids(part) for part in parts)
        return Pairs(left, right, joined, len(vocabulary))

    def rank(left: bytes, right: bytes) -> int | None:
        return None if b" " in left else ranks().first(left + b" " + right)  # the first space is what separates them

    def whole(word: str) -> list[int] | None:
        if ignore_merges and (id := pieces.last(word.encode())) is not None:
            return [id]
        return None

    def word_ids(word: str) -> list[int] | None:
        if (ids := whole(word)) is not None:
            return ids
        characters = [character.encode() for character in word]
        if any(pieces.last(character) is None for character in dict.fromkeys(characters)):
            return None
        found = [pieces.last(symbol) for symbol in merged(characters, rank)]
        return [id for id in found if id is not None] if None not in found else None

    def many(short: list[str]) -> list[list[int]] | None:
        found = {word: ids for word in short if (ids := whole(word)) is not None}
        rest = [word for word in short if word not in found]
        ids_of = {character: pieces.last(character.encode()) for character in set().union(*rest)}
        known = {character: id for character, id in ids_of.items() if id is not None}
        if len(known) < len(ids_of):
            return None
        joined = pairs().merged([[known[character] for character in word] for word in rest])
        found.update(zip(rest, joined, strict=True))
        return [found[word] for word in short]

    return _word_by_word(words, word_ids, many, (len(vocabulary) + len(merges)) // _STRINGS_AT_ONCE)


def _parts(vocabulary: Vocabulary, merges: Strings) -> tuple[Strings, Strings, Strings] | None:
    """Both parts of each merge, and what it makes of them, all of them pieces; None if they are not, or are no text."""
    if not len(merges) or not (_is_text(vocabulary.pieces) and _is_text(merges)):
        return None
    data = np.frombuffer(merges.data, np.uint8)
    spaces = np.append(np.flatnonzero(data == ord(" ")), len(data))
    space = spaces[spaces.searchsorted(merges.starts)]  # the first in each
    ends = merges.starts + merges.lengths
    if (space >= ends).any():
        return None
    kept = np.ones(len(data), bool)
    kept[space] = False
    joined = Strings(data[kept].tobytes(), merges.starts - np.arange(len(merges)), merges.lengths - 1)
    left = Strings(merges.data, merges.starts, space - merges.starts)
    right = Strings(merges.data, space + 1, ends - space - 1)
    parts = (left, right, joined)
    return parts if all(vocabulary.spellings.have(part) for part in parts) else None


def _is_text(strings: Strings) -> bool:
    """Whether all of them are UTF-8."""
    text = strings.data
    if (strings.lengths >= 0x80).any():  # shorter lengths are text too, and end what is before them
        data = np.frombuffer(text, np.uint8).copy()
        for place in range(1, LENGTH_BYTES + 1):
            data[strings.starts - place] = 0
        text = data.tobytes()
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def first_scored(vocabulary: Vocabulary, byte_ids: list[int]) -> FirstEncoder:
    """By scores of pieces, the highest first. byte_ids: of all bytes, for characters that have no piece."""
    pieces, scores = vocabulary.spellings, vocabulary.scores
    of_bytes = frozenset(byte_ids)  # which no text spells
    space = SPACE.encode()

    def rank(left: bytes, right: bytes) -> float | None:
        id = pieces.last(left + right)
        return None if id is None or id in of_bytes else -scores.item(id)

    def word_ids(word: str) -> list[int]:
        symbols = [space if character == " " else character.encode() for character in word]
        ids: list[int] = []
        for symbol in merged(symbols, rank):
            id = pieces.last(symbol)
            ids += [byte_ids[byte] for byte in symbol] if id is None else [id]
        return ids

    at_spaces = _cut_at_spaces(vocabulary)

    def words(text: str) -> list[str]:
        if len(text) > _LONG:
            return at_spaces(text.replace(" ", SPACE))
        return [text] if text else []

    return _word_by_word(words, word_ids)


def _cut_at_spaces(vocabulary: Vocabulary) -> Callable[[str], list[str]]:
    """Cuts a text before spaces (which are spelt SPACE), unless something could merge with one behind it."""

    @cache
    def spaced() -> list[str]:
        return _spaced_pieces(vocabulary.pieces)

    return lambda text: [text] if any(piece in text for piece in spaced()) else _WORDS.findall(text)


_LONG = 500  # characters of a text in which words come again
_WORDS = re.compile(f"{SPACE}*[^{SPACE}]+|{SPACE}+")


def _spaced_pieces(pieces: Strings) -> list[str]:
    """Those in which a space comes after something else: in a text without them nothing merges with the space after
    it. Of many, the space alone."""
    data = np.frombuffer(pieces.data, np.uint8)
    first, second, third = SPACE.encode()
    places = np.flatnonzero((data[:-2] == first) & (data[1:-1] == second) & (data[2:] == third))
    holders = pieces.starts.searchsorted(places, "right") - 1
    begins = pieces.starts[holders] == places
    begins[1:] |= places[1:] - places[:-1] == len(SPACE.encode())
    numbers = sorted(set(holders[~begins].tolist()))  # of few
    return [piece.decode(errors="replace") for piece in pieces.some(numbers)] if len(numbers) < 64 else [SPACE]
