"""The first texts of a process are encoded without a library, to the same tokens."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qrun.engine.text.tokenizer import bytepair, merging, pretokenizers, slices
from qrun.engine.text.tokenizer import spellings as module
from qrun.engine.text.tokenizer.merging import StagedEncoder, merged
from qrun.engine.text.tokenizer.pairs import LONGEST_WORD, Pairs
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
    assert spellings.last_ids(strings).tolist() == [places[piece][-1] for piece in pieces]


def test_equal_hashes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take an attacker, and then the vocabulary is a dict."""
    monkeypatch.setattr(module, "hashes_of", lambda strings: np.full(len(strings), 7, np.uint64))
    monkeypatch.setattr(module, "hash_of", lambda string: 7)
    pieces = [b"%d" % i for i in range(1000)]
    spellings = Spellings(Strings.of(pieces))
    assert all(spellings.all(piece) == [id] for id, piece in enumerate(pieces))
    assert spellings.all(b"1000") == []
    assert spellings.last_ids(Strings.of(pieces)).tolist() == list(range(1000))


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


class Ranks(dict[tuple[bytes, bytes], int]):
    def __call__(self, left: bytes, right: bytes) -> int | None:
        return self.get((left, right))


def test_many_words_at_once_give_what_each_gives_alone() -> None:
    draw = random.Random(5)
    for _ in range(60):
        letters = [bytes([letter]) for letter in b"abcd"[: draw.randint(1, 4)]]
        pieces, listed = [*letters], []
        for _ in range(draw.randint(1, 25)):
            left, right = draw.choice(pieces), draw.choice(pieces)
            listed += [(left, right)] * draw.choice((1, 1, 2))  # of two the first counts
            pieces += [left + right] if left + right not in pieces else []
        draw.shuffle(listed)
        rank = Ranks((pair, rank) for rank, pair in reversed(list(enumerate(listed))))
        ids = {piece: id for id, piece in enumerate(pieces)}
        table = np.array([(ids[left], ids[right], ids[left + right]) for left, right in listed])
        words = [draw.choices(letters, k=draw.randint(1, LONGEST_WORD)) for _ in range(40)]
        expected = [[ids[symbol] for symbol in merged(word, rank)] for word in words]
        symbols = [[ids[letter] for letter in word] for word in words]
        assert Pairs(*table.T, len(pieces)).merged(symbols) == expected
    assert Pairs(*table.T, len(pieces)).merged([]) == [] == Pairs(*table.T, len(pieces)).merged([[]])[0]


def test_words_are_merged_at_once_when_there_have_been_enough() -> None:
    def many(words: list[str]) -> list[list[int]] | None:
        return [[2] * len(word) for word in words] if all(map(str.isascii, words)) else None

    encode = merging._word_by_word(str.split, lambda word: [1] * len(word), many, 100)
    assert encode("a" * 30 + " b", 1000) == ([1] * 31, 31)
    assert encode("c" * 40 + " d", 1000) == ([1] * 41, 41)
    long = "e" * LONGEST_WORD + "e"
    short = [chr(102 + i) * 8 for i in range(10)]
    ids, n_new = encode(" ".join([*short, long, short[0], "b"]), 1000)
    assert ids == [2] * 80 + [1] * len(long) + [2] * 8 + [1] and n_new == 80 // merging._AT_ONCE + len(long)
    assert encode("x y", 1000) == ([1, 1], 2)  # too few
    assert encode("é" * 10 + " " + "z" * 31 + " " + "y" * 30, 1000)[0] is None
    assert encode(" ".join(f"{i:09}" for i in range(90)), 100) == (None, 0)


def test_the_library_is_made_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "first_characters", lambda n_strings: n_strings)
    made = 0

    def library() -> merging.Encoder:
        nonlocal made
        made += 1
        return lambda text: [2] * len(text)

    def word_ids(word: str) -> list[int] | None:
        return [1] * len(word) if word.isascii() else None

    def staged() -> StagedEncoder:
        return StagedEncoder(merging._word_by_word(str.split, word_ids), library, 10)

    encode = staged()
    assert encode("12345 67") == [1] * 7 and made == 0
    assert encode("67 12345 67 12345") == [1] * 14 and made == 0  # nothing new
    assert encode("67 8") == [1] * 3 and encode("9") == [1] and made == 0
    assert encode("ab") == [2] * 2 and encode("1") == [2] and made == 1
    encode = staged()
    assert encode("a é") == [2] * 3 and encode("e") == [2] and made == 2
    encode = staged()
    assert encode("a " * 41) == [2] * 82 and made == 3  # to cut it takes long too
    assert StagedEncoder(None, library, 10)("e") == [2]


def test_more_is_merged_here_the_longer_the_library_would_take() -> None:
    assert merging.first_characters(100) == merging.first_characters(30_000) < merging.first_characters(300_000)


def test_words_are_cut_at_spaces_unless_a_piece_goes_on_behind_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_LONG", 3)
    pieces = ["a", "b", "\u2581", "\u2581\u2581", "\u2581a", "ab", "b\u2581", "b\u2581a", "<0x41>"]
    strings = Strings.of([piece.encode() for piece in pieces])
    assert merging._spaced_pieces(strings) == ["b\u2581", "b\u2581a"]
    scores = -np.arange(len(pieces), dtype=np.float32)
    vocabulary: Any = SimpleNamespace(pieces=strings, spellings=Spellings(strings), scores=scores)
    long, cut = merging.first_scored(vocabulary, [8] * 256), []
    real = merged

    def noted(symbols: list[bytes], rank: merging.Rank) -> list[bytes]:
        cut.append(b"".join(symbols).decode().replace("\u2581", " "))
        return real(symbols, rank)

    monkeypatch.setattr(merging, "merged", noted)
    assert long(" a  a aa a", 99) == ([4, 3, 0, 4, 0, 4], 8) and sorted(cut) == ["  a", " a", " aa"]
    cut.clear()
    assert long("a b a b", 99)[0] == [0, 2, 7, 2, 1] and cut == ["a b a b"]


def test_random_texts_give_the_same_tokens_word_by_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_LONG", -1)
    draw = random.Random(3)
    for _ in range(50):
        letters = ["a", "b", "\u2581"]
        made = {"".join(draw.choices(letters, k=draw.randint(2, 4))) for _ in range(draw.randint(1, 12))}
        strings = Strings.of([piece.encode() for piece in [*letters, *sorted(made)]])
        scores = np.array([draw.random() for _ in range(len(strings))], np.float32)
        vocabulary: Any = SimpleNamespace(pieces=strings, spellings=Spellings(strings), scores=scores)
        text = "".join(draw.choices("ab ", k=40))
        found = merging.first_scored(vocabulary, [0] * 256)(text, 99)[0]
        with monkeypatch.context() as patch:
            patch.setattr(merging, "_LONG", 1 << 30)
            assert found == merging.first_scored(vocabulary, [0] * 256)(text, 99)[0], (text, made)


@pytest.mark.parametrize("pre", sorted({family for _, family in pretokenizers._FAMILIES}, key=repr), ids=str)
def test_long_texts_are_cut_where_words_end(pre: pretokenizers.PreTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE", 7)
    vocabulary: Any = SimpleNamespace(pre_tokenizer=pre)
    space = "\u2581" if pre.alphabet == "metaspace" else " "
    places, words_of = slices.safe_cuts(bytepair._pre_tokenizer(vocabulary), space), bytepair._words(vocabulary)
    draw, n_parts = random.Random(7), 0
    words = ["ab", "don't", "Dog", "x1", "1234567", "12", "0", " ", "  ", "\n", "\r\n", "\t", "...", "!", "'s", "é",
             "ü", "\u65e5\u672c", "\ud55c\uad6d", "\u0301", "\u3000", "(", "<|a|>", "camelCase", "HTTPServer", "½",
             "\u0663", "\U0001f600", "_", "-"]  # fmt: skip
    for _ in range(60):
        text = "".join(draw.choice(words) + draw.choice(("", "", " ")) for _ in range(80))
        parts = list(slices.slices(text, places))
        assert "".join(parts) == text
        found = [word for part in parts for word in words_of(part.replace(" ", space))]
        assert found == words_of(text.replace(" ", space)), text
        n_parts += len(parts)
    assert n_parts > 70  # of 60 texts
