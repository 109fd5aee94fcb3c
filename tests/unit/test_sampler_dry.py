"""DRY: the repeats that it finds, what they cost, and how breaker texts become tokens."""

import numpy as np
import pytest

from qrun.engine.sampling import dry


def naive_repeats(history: list[int], breakers: dry.Breakers, allowed: int, longest: int) -> dict[int, int]:
    """For each earlier position: how far back it reads like the end, up to the last breaker."""
    reach = len(history)
    for start in reversed(range(len(history))):
        ends = [
            start + 1 + len(tail)
            for tail in breakers.get(history[start], ())
            if tuple(history[start + 1 : start + 1 + len(tail)]) == tail
        ]
        if ends:
            reach = len(history) - max(ends)
            break
    found: dict[int, int] = {}
    for end in range(len(history) - 1):
        length = 0
        while length <= end and length < min(reach, longest) and history[end - length] == history[-1 - length]:
            length += 1
        if length >= allowed:
            found[history[end + 1]] = max(length, found.get(history[end + 1], 0))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_repeats_are_those_of_the_definition(seed: int) -> None:
    random = np.random.default_rng(seed)
    history = random.integers(0, random.integers(1, 6), random.integers(0, 80)).astype(np.int32)
    breakers: dry.Breakers = [{}, {4: [()]}, {3: [(1, 2), (1,)], 4: [()]}, {0: [(0, 0)]}][seed % 4]
    for allowed, longest in [(1, 100), (2, 5), (3, 3)]:
        expected = naive_repeats(history.tolist(), breakers, allowed, longest)
        assert dry.repeats(history, breakers, allowed, longest) == expected


def test_the_example_of_the_definition() -> None:
    history = np.array([ord(c) for c in "abccbcyabc"], np.int32)
    found = {chr(token): length for token, length in dry.repeats(history, {}, 1, 100).items()}
    assert found == {"c": 3, "b": 1, "y": 2}


def test_the_penalty_grows_with_the_repeat() -> None:
    history = np.array([5, 6, 7, 8, 9, 5, 6, 7, 8], np.int32)
    assert dry.penalties(history, {}, multiplier=0.8, base=2.0, allowed_length=2) == {9: 0.8 * 2.0**2}
    assert dry.penalties(history, {}, multiplier=0.8, base=2.0, allowed_length=5) == {}


def test_a_breaker_is_never_penalized_nor_reached_across() -> None:
    history = np.array([5, 6, 7, 1, 5, 6, 7], np.int32)
    assert dry.penalties(history, {1: [()]}, multiplier=1.0, base=2.0, allowed_length=1) == {}
    history = np.array([8, 5, 1, 6, 2, 8, 5, 1, 6], np.int32)
    assert dry.repeats(history, {1: [()]}, 1, 100) == {2: 1}
    assert dry.repeats(history, {5: [(1,)]}, 1, 100) == {2: 1}
    assert dry.repeats(history, {5: [(1, 6)]}, 1, 100) == {}


@pytest.mark.parametrize("base", [1.0, 1.0000001, 1.75, 50.0])
def test_a_long_repeat_costs_a_finite_penalty(base: float) -> None:
    history = np.zeros(5000, np.int32)
    cost = dry.penalties(history, {}, multiplier=1.0, base=base, allowed_length=2)[0]
    assert np.isfinite(np.float32(cost))


class Letters:
    """Tokens are the byte strings of a list; texts are encoded greedily, longest piece first."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = [piece.encode() for piece in pieces]
        self.look_ups = 0

    def all_bytes(self) -> list[bytes]:
        self.look_ups += 1
        return self.pieces

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        assert not add_special
        rest, ids = text.encode(), []
        while rest:
            best = max((p for p in self.pieces if rest.startswith(p)), key=len)
            ids.append(self.pieces.index(best))
            rest = rest[len(best) :]
        return ids


def test_breakers_are_tokens_that_contain_the_text() -> None:
    tokenizer = Letters("a", "\n", ".\n\n", ":", "b:c")
    assert dry.find_breakers(tokenizer, ("\n", ":")) == {1: {()}, 2: {()}, 3: {()}, 4: {()}}


def test_breakers_are_also_tokens_that_begin_the_text_before_those_that_end_it() -> None:
    tokenizer = Letters("E", "N", "D", "EN", "xE", "END!", "ND", "é")
    found = dry.find_breakers(tokenizer, ("END",))
    assert found == {0: {(6,)}, 3: {(2,)}, 4: {(6,)}, 5: {()}}
    # A beginning that ends within a character has no rest to encode.
    assert dry.find_breakers(tokenizer, ("Eé",)) == {0: {(7,)}, 4: {(7,)}}


def test_the_vocabulary_is_searched_once() -> None:
    tokenizer = Letters("a", "b")
    dry.find_breakers(tokenizer, ("a",))
    dry.find_breakers(tokenizer, ("a",))
    assert tokenizer.look_ups == 1
