"""The first texts of a process are encoded without a library, to the same tokens."""

import random

import numpy as np
import pytest

from qrun.engine.text.tokenizer import merging
from qrun.engine.text.tokenizer import spellings as module
from qrun.engine.text.tokenizer.merging import StagedEncoder, merged
from qrun.engine.text.tokenizer.spellings import Spellings, hash_of, hashes_of
from qrun.formats.gguf.strings import Strings


def test_spellings_are_found_among_many() -> None:
    draw = random.Random(1)
    pieces = [bytes(draw.choices(b"ab\0\xff", k=draw.randint(0, 12))) for _ in range(3000)]
    pieces += [b"x" * 70 + bytes([i % 256]) for i in range(300)]  # alike as far as they are hashed
    strings = Strings.of(pieces)
    assert hashes_of(strings).tolist() == [hash_of(piece) for piece in pieces]
    spellings = Spellings(strings)
    places: dict[bytes, list[int]] = {}
    for id, piece in enumerate(pieces):
        places.setdefault(piece, []).append(id)
    for piece, ids in places.items():
        assert spellings.all(piece) == ids
        assert (spellings.first(piece), spellings.last(piece)) == (ids[0], ids[-1])
    assert spellings.all(b"c") == [] and spellings.first(b"x" * 72) is None
    assert spellings.have(strings) and not spellings.have(Strings.of([b"a", b"c"]))


def test_equal_hashes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take an attacker, and then the vocabulary is a dict."""
    monkeypatch.setattr(module, "hashes_of", lambda strings: np.full(len(strings), 7, np.uint64))
    monkeypatch.setattr(module, "hash_of", lambda string: 7)
    pieces = [b"%d" % i for i in range(1000)]
    spellings = Spellings(Strings.of(pieces))
    assert all(spellings.all(piece) == [id] for id, piece in enumerate(pieces))
    assert spellings.all(b"1000") == []


def test_of_no_strings_none_is_found() -> None:
    assert Spellings(Strings.of([])).first(b"") is None


def test_neighbours_are_merged_by_rank_and_from_the_left() -> None:
    ranks = {(b"a", b"a"): 1, (b"b", b"c"): 0, (b"aa", b"a"): 2, (b"ab", b"c"): 3}

    def rank(left: bytes, right: bytes) -> int | None:
        return ranks.get((left, right))

    assert merged([b"a"] * 5, rank) == [b"aa", b"aaa"]
    assert merged([b"a", b"b", b"c"], rank) == [b"a", b"bc"]
    assert merged([b"a"] * 3, rank) == [b"aaa"]
    assert merged([], rank) == []


def test_the_library_is_made_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "FIRST_CHARACTERS", 10)
    made = 0

    def library() -> merging.Encoder:
        nonlocal made
        made += 1
        return lambda text: [2] * len(text)

    encode = StagedEncoder(lambda text: [1] * len(text) if text.isascii() else None, library)
    assert encode("12345") == [1] * 5 and encode("1234") == [1] * 4 and made == 0
    assert encode("12") == [2] * 2 and encode("1") == [2] and made == 1
    encode = StagedEncoder(lambda text: [1] * len(text) if text.isascii() else None, library)
    assert encode("é") == [2] and encode("e") == [2] and made == 2
    assert StagedEncoder(None, library)("e") == [2]
