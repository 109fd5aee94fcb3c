"""Lookup decoding guesses well, gives up where it does not pay, and never changes a text."""

import threading
from pathlib import Path

import numpy as np
import pytest
from engine_fakes import FakeRuntime, ids_of, make_session, speaking

from qrun.engine import Model
from qrun.engine.generation.lookup import MAX_GUESSES, Lookup
from qrun.engine.program.kv_cache import CacheLayout, KVSequence
from qrun.engine.program.pages import PagePool
from qrun.models.graph import CacheLayer

A = (11, 12, 13)  # with the next three tokens, enough to agree in
MODELS = sorted((Path(__file__).parents[1] / "data" / "arch").glob("*.gguf"))


def warm(tokens: list[int]) -> Lookup:
    """A lookup that knows what a step takes: a second."""
    lookup = Lookup(tokens)
    lookup.learn(0, 0, 1.0)
    return lookup


def test_what_followed_the_longest_agreement_is_guessed() -> None:
    assert warm([9, *A, 1, 2, 3, 4, 5, 6, 8, 1, 2, 3, 7, 7, *A, 1, 2, 3]).guess(3) == [4, 5, 6]


def test_of_equal_agreements_the_latest_counts() -> None:
    assert warm([*A, 1, 2, 3, 4, 0, *A, 1, 2, 3, 8, 0, *A, 1, 2, 3]).guess(2) == [8, 0]


def test_a_text_that_goes_round_is_guessed_to_go_on_so() -> None:
    assert warm([1, 2, 3] * 3).guess(3) == [1, 2, 3]
    assert warm([4] * 7).guess(3) == [4, 4, 4]


def test_nothing_is_guessed_without_an_agreement_or_room_or_a_measured_step() -> None:
    assert warm([1, 2, 3, 4, 5]).guess(3) == []
    assert warm([1, 2, 3] * 3).guess(0) == []
    assert Lookup([1, 2, 3] * 3).guess(3) == []


def test_a_short_agreement_is_good_enough_only_while_guesses_pay() -> None:
    lookup = warm([1, 2, 3, 9, 8, 1, 2])
    assert lookup.guess(3) == []
    lookup.learn(3, 3, 1.5)
    assert lookup.guess(3) == [3, 9, 8]


def test_right_guesses_make_for_more_and_wrong_ones_for_fewer() -> None:
    lookup = warm([1, 2, 3] * 10)
    sizes = []
    for _ in range(4):
        sizes.append(len(lookup.guess(100)))
        lookup.learn(sizes[-1], sizes[-1], 1.5)
    assert sizes == [3, 7, 15, MAX_GUESSES]
    lookup.learn(15, 0, 1.5)
    assert len(lookup.guess(100)) == 3


def test_guesses_that_fail_cost_little_in_all() -> None:
    lookup = warm([1, 2, 3] * 10)
    guessing = plain = 1.0
    for _ in range(1000):
        count = len(lookup.guess(100))
        seconds = 1.0 + 0.1 * count
        lookup.learn(count, 0, seconds)
        guessing, plain = guessing + seconds, plain + 1.0
    assert plain / guessing > 0.97


def test_a_text_with_lookup_takes_fewer_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    learn = Lookup.learn
    monkeypatch.setattr(Lookup, "learn", lambda self, guessed, accepted, _: learn(self, guessed, accepted, 1.0))
    text = ids_of("the quick brown fox jumps over the lazy dog. ")
    runtime = FakeRuntime(speaking(*text, *text), context=300, batch=64)
    generation = make_session(runtime).generate([*text, *ids_of(">")], lookup=True)
    assert "".join(generation) == "the quick brown fox jumps over the lazy dog. " * 2
    assert generation.stop_reason == "stop"
    assert generation.stats.generated_tokens == 2 * len(text) + 1
    assert len(runtime.evaluated) < len(text)


@pytest.mark.parametrize("limits", [{"max_tokens": 50}, {"stop": ("jumps",)}, {}])
def test_ends_are_the_same(limits: dict[str, object]) -> None:
    text = ids_of("the quick brown fox jumps over the lazy dog. ")
    ends = []
    for lookup in (False, True):
        session = make_session(FakeRuntime(speaking(*text * 5), context=120, batch=64))
        generation = session.generate([*text, *ids_of(">")], lookup=lookup, **limits)
        pieces = list(generation)
        ends.append((pieces, generation.tokens, generation.stop_reason, generation.stats.generated_tokens))
        assert len(session.tokens) <= 120
    assert ends[0] == ends[1]


def test_cancelling_drops_what_was_sampled_ahead() -> None:
    text = ids_of("abcdefgh" * 8)
    generation = make_session(FakeRuntime(speaking(*text), batch=64)).generate([*text, *ids_of(">")], lookup=True)
    for _ in range(9):
        next(generation)
    generation.cancel()
    assert list(generation) == []
    assert (generation.text, generation.stop_reason) == ("abcdefgha", "cancelled")


@pytest.mark.parametrize("window", [1, 60, 64, 65, 130])
def test_guesses_can_always_be_taken_back(window: int) -> None:
    layout = CacheLayout([CacheLayer(1, 1, 32, 32, window), CacheLayer(1, 1, 32, 32, None)], "f16")
    sequence = KVSequence(layout, [PagePool(size) for size in layout.page_bytes], 400, threading.RLock())
    rooms = []
    for n in range(400):
        room = sequence.returnable()
        rooms.append(room)
        assert room <= 400 - n - 1
        sequence.reserve(1 + room)
        sequence.advance(1 + room)
        assert sequence.truncate(n + 1) == n + 1
    assert sum(room >= MAX_GUESSES for room in rooms[:300]) > 200


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_texts_of_a_model_are_the_same_to_the_token(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    """Guesses that are right at random, on both sides of windows and pages, for the likeliest token and for seeds."""
    with Model.load(path, threads=1, context=256, batch=64) as model:
        prompt = rng.integers(0, model.graph.n_vocab, 20).tolist()
        for options in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.1}):
            plain = model.generate(prompt, max_tokens=180, **options)
            expected = list(plain), plain.tokens
            truth = [*prompt, *plain.tokens]

            def guess(self: Lookup, room: int, truth: list[int] = truth) -> list[int]:
                count = min(int(rng.integers(0, MAX_GUESSES + 1)), room) if self._single else 0
                known = truth[len(self._tokens) :][:count]
                return [token if rng.random() < 0.9 else (token + 1) % model.graph.n_vocab for token in known]

            with monkeypatch.context() as patched:
                patched.setattr(Lookup, "guess", guess)
                session = model.session()
                guessed = session.generate(prompt, max_tokens=180, lookup=True, **options)
                assert (list(guessed), guessed.tokens) == expected
            by_lookup = model.session().generate(prompt, max_tokens=180, lookup=True, **options)
            assert (list(by_lookup), by_lookup.tokens) == expected
