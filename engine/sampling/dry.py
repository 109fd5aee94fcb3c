"""DRY ("don't repeat yourself"): which tokens would make a repeat longer, and by how much that counts.

Source: https://github.com/oobabooga/text-generation-webui/pull/5677, with the breakers of longer
text that https://github.com/LostRuins/koboldcpp/pull/982 added.
"""

import math
from collections.abc import Collection, Mapping
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np

Breakers = Mapping[int, Collection[tuple[int, ...]]]
"""First token of a breaker -> the token sequences that complete it; () where the token alone is a breaker."""

# A breaker is looked for in every token of the history, so its length is bounded.
_LONGEST_BREAKER_BYTES = 40
_LONGEST_BREAKER_TAIL = 20

# Beyond this the penalty would overflow float32.
_LOG_LARGEST_FLOAT = 88.7


class _Tokenizer(Protocol):
    def all_bytes(self) -> list[bytes]: ...
    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]: ...


def repeats(history: np.ndarray, breakers: Breakers, allowed_length: int, longest: int) -> dict[int, int]:
    """The tokens that would prolong a repeat, with the length of the longest repeat that each would prolong.

    A token prolongs a repeat of n tokens if it followed, somewhere in `history` (int32 [n_tokens], oldest first),
    n tokens that are also the last n. Repeats shorter than `allowed_length` (at least 1) are left out, longer ones
    than `longest` count as `longest`, and no repeat reaches across a breaker.
    """
    last = len(history) - 1
    longest = min(longest, tokens_since_breaker(history, breakers))
    # Positions whose last `length` tokens are those of the history's end; each round leaves fewer of them.
    ends = np.arange(last)
    found: dict[int, int] = {}
    for length in range(1, longest + 1):
        ends = ends[ends >= length - 1]
        ends = ends[history[ends - (length - 1)] == history[last - (length - 1)]]
        if ends.size == 0:
            break
        if length >= allowed_length:
            found.update(dict.fromkeys(history[ends + 1].tolist(), length))
    return found


def tokens_since_breaker(history: np.ndarray, breakers: Breakers) -> int:
    """How many tokens follow the last breaker in `history`; all of them if there is none."""
    n_tokens = len(history)
    heads = np.fromiter(breakers, np.int64, len(breakers))
    for start in np.flatnonzero(np.isin(history, heads))[::-1].tolist():
        ends = [
            start + 1 + len(tail)
            for tail in breakers[int(history[start])]
            if tuple(history[start + 1 : start + 1 + len(tail)].tolist()) == tail
        ]
        if ends:
            return n_tokens - max(ends)
    return n_tokens


def penalties(
    history: np.ndarray, breakers: Breakers, multiplier: float, base: float, allowed_length: int
) -> dict[int, float]:
    """What DRY subtracts from the logit of each token that it touches: multiplier * base ** (n - allowed_length).

    `history` is int32 [n_tokens], oldest first; `base` is at least 1. Tokens that are breakers themselves go free.
    """
    largest_power = int(_LOG_LARGEST_FLOAT / math.log(base)) if base > 1.000001 else 0
    found = repeats(history, breakers, allowed_length, allowed_length + largest_power)
    return {
        token: multiplier * base ** (length - allowed_length)
        for token, length in found.items()
        if () not in breakers.get(token, ())
    }


_MOST_KNOWN = 16  # of one tokenizer
_known_breakers: WeakKeyDictionary[_Tokenizer, dict[tuple[str, ...], Breakers]] = WeakKeyDictionary()


def find_breakers(tokenizer: _Tokenizer, texts: tuple[str, ...]) -> Breakers:
    """The ways in which tokens spell the given breaker texts.

    A token that contains a text breaks by itself. A token that ends with a text's beginning breaks together with the
    tokens of the text's rest. Goes through the whole vocabulary, once for each tokenizer and tuple of texts.
    """
    known = _known_breakers.setdefault(tokenizer, {})
    breakers = known.get(texts)
    if breakers is None:
        breakers = _search_vocabulary(tokenizer, texts)
        if len(known) >= _MOST_KNOWN:
            known.pop(next(iter(known)), None)
        known[texts] = breakers
    return breakers


class _Vocabulary:
    """The bytes of all tokens, one after the other, to look for some in."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._bytes = np.frombuffer(b"".join(pieces), np.uint8)
        self._lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
        self._ends = np.cumsum(self._lengths)

    def containing(self, wanted: bytes) -> set[int]:
        """The tokens in which these bytes are."""
        begins = np.flatnonzero(self._bytes[: max(len(self._bytes) - len(wanted) + 1, 0)] == wanted[0])
        for place, byte in enumerate(wanted):
            begins = begins[self._bytes[begins + place] == byte]
        tokens = np.searchsorted(self._ends, begins, side="right")
        return set(tokens[begins + len(wanted) <= self._ends[tokens]].tolist())

    def ending(self, wanted: bytes) -> set[int]:
        """The tokens that end with these bytes."""
        tokens = np.flatnonzero(self._lengths >= len(wanted))
        for place, byte in enumerate(reversed(wanted), 1):
            tokens = tokens[self._bytes[self._ends[tokens] - place] == byte]
        return set(tokens.tolist())


def _search_vocabulary(tokenizer: _Tokenizer, texts: tuple[str, ...]) -> Breakers:
    vocabulary = _Vocabulary(tokenizer.all_bytes())
    breakers: dict[int, set[tuple[int, ...]]] = {}
    for text in texts:
        wanted = text.encode("utf-8", "surrogatepass")[:_LONGEST_BREAKER_BYTES]
        whole = vocabulary.containing(wanted)
        for token in whole:
            breakers.setdefault(token, set()).add(())
        for split in range(1, len(wanted)):
            beginning, tail = wanted[:split], _tail(tokenizer, wanted[split:])
            if tail is None:
                continue
            for token in vocabulary.ending(beginning) - whole:
                breakers.setdefault(token, set()).add(tail)
    return breakers


def _tail(tokenizer: _Tokenizer, rest: bytes) -> tuple[int, ...] | None:
    """The tokens of the rest of a breaker; None if it begins within a character, so that it is no text."""
    try:
        text = rest.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return tuple(tokenizer.encode(text, add_special=False, parse_special=False)[:_LONGEST_BREAKER_TAIL])
