"""The generation loop: what it yields, when it ends, and that it can be stopped."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from engine_fakes import EOS, PIECES, FakeRuntime, ids_of, make_session, speaking

from qrun.engine import ContextOverflow
from qrun.engine.generation.generation import Generation, Piece
from qrun.engine.generation.session import Session

PROMPT = ids_of("say>")


def session_saying(*script: int, then: int = EOS, **defaults: object) -> Session:
    return make_session(FakeRuntime(speaking(*script, then=then)), **defaults)


def ids(*pieces: bytes) -> list[int]:
    return [PIECES.index(piece) for piece in pieces]


def run(generation: Generation) -> list[Piece]:
    """The rest of its pieces."""
    text, tokens = generation.text, list(generation.tokens)
    pieces = list(generation)
    assert text + "".join(pieces) == generation.text
    assert tokens + [piece.token for piece in pieces if piece.token is not None] == generation.tokens
    assert list(generation) == [], "an ended generation stays ended"
    return pieces


def test_pieces_are_text_with_token_and_log_probability() -> None:
    pieces = run(session_saying(*ids_of("hi")).generate(PROMPT))
    assert pieces == ["h", "i"]
    assert [piece.token for piece in pieces] == ids_of("hi")
    assert all(isinstance(piece, str) and piece.logprob is not None and -3 < piece.logprob < 0 for piece in pieces)


def test_a_stop_token_ends_it_and_has_no_piece() -> None:
    generation = session_saying(*ids_of("hi")).generate(PROMPT)
    run(generation)
    assert (generation.text, generation.tokens, generation.stop_reason) == ("hi", ids_of("hi"), "stop")
    assert generation.stats.generated_tokens == 3


def test_the_stop_reason_is_none_until_the_end() -> None:
    generation = session_saying(*ids_of("hi")).generate(PROMPT)
    assert generation.stop_reason is None
    assert next(generation) == "h"
    assert generation.stop_reason is None


@pytest.mark.parametrize("n", [1, 3])
def test_max_tokens(n: int) -> None:
    generation = session_saying(*ids_of("hello")).generate(PROMPT, max_tokens=n)
    run(generation)
    assert (generation.text, generation.stop_reason) == ("hello"[:n], "length")


def test_max_tokens_zero_only_reads_the_prompt() -> None:
    session = session_saying(*ids_of("hello"))
    generation = session.generate(PROMPT, max_tokens=0)
    assert run(generation) == []
    assert (generation.stop_reason, session.tokens) == ("length", PROMPT)


@pytest.mark.parametrize("context", [4, 5, 9])
def test_the_context_ends_it(context: int) -> None:
    session = make_session(FakeRuntime(speaking(then=ids_of("a")[0]), context=context))
    generation = session.generate(PROMPT)
    run(generation)
    # The last position gives one more token, which itself finds no place.
    assert (generation.text, generation.stop_reason) == ("a" * (context - 4 + 1), "context")
    assert len(session.tokens) == context


def run_shortened(script: list[int], context: int, **options: Any) -> tuple[Generation, list[list[int]]]:
    """A generation of the script after "OLD:>", of which the first four tokens go when the context is full; and what
    it was shortened from each time."""
    calls: list[list[int]] = []

    def forget(tokens: list[int]) -> list[int]:
        calls.append(tokens)
        return tokens[4:]  # the script goes on after the ">", which has to stay

    session = make_session(FakeRuntime(speaking(*script), context=context))
    generation = session.generate(ids_of("OLD:>"), on_full=forget, **options)
    run(generation)
    return generation, calls


def test_a_full_context_can_be_given_room_and_the_text_goes_on() -> None:
    generation, calls = run_shortened(ids_of("abcde"), context=8)
    assert (generation.text, generation.stop_reason) == ("abcde", "stop")
    assert calls == [ids_of("OLD:>abcd")]  # all of it, one more than there is room for
    assert generation.session._cache.tokens == ids_of(">abcde")


def test_without_more_room_the_context_ends_it_after_all() -> None:
    session = make_session(FakeRuntime(speaking(*ids_of("abcdefgh")), context=8))
    generation = session.generate(ids_of("OLD:>"), on_full=lambda tokens: None)
    run(generation)
    assert (generation.text, generation.stop_reason) == ("abcd", "context")


@pytest.mark.parametrize(
    ("shorter", "error"), [(ids_of("x" * 9), ContextOverflow), ([], ValueError), ([-1], ValueError)]
)
def test_a_text_that_is_no_shorter_ends_it_with_an_error(shorter: list[int], error: type[Exception]) -> None:
    session = make_session(FakeRuntime(speaking(*ids_of("abcdefgh")), context=8))
    generation = session.generate(ids_of("OLD:>"), on_full=lambda tokens: shorter)
    with pytest.raises(error):
        run(generation)
    assert (generation.text, generation.stop_reason) == ("abcd", "cancelled")
    assert run(session.generate(ids_of(">"), max_tokens=2)) == ["a", "b"]


def test_characters_stop_strings_and_counts_go_on_where_room_was_made() -> None:
    """The fourth token is the last before the gap: it is the middle of a character, or of what ends the text."""
    generation, calls = run_shortened(ids_of("aé€b"), context=8)  # a, two of "é", one of the three of "€"
    assert (generation.text, len(calls)) == ("aé€b", 1)
    generation, calls = run_shortened(ids_of("abEND"), context=8, stop="END")
    assert (generation.text, generation.stop_reason, len(calls)) == ("ab", "stop", 1)
    generation, calls = run_shortened(ids_of("abcdefgh"), context=8, max_tokens=6)
    assert (generation.text, generation.stop_reason, len(calls)) == ("abcdef", "length", 1)


def test_penalties_and_chance_go_on_where_room_was_made() -> None:
    """What a generation chooses does not depend on where its context was full, as long as the model sees no more."""
    options: dict[str, Any] = {"temperature": 5.0, "seed": 3, "presence_penalty": 2.0, "repetition_window": -1}
    texts = []
    for context in (8, 100):  # logits of the runtime depend on the last three tokens, and on the rule
        runtime = FakeRuntime(lambda held: ids_of("a")[0], context=context)
        generation = make_session(runtime).generate(
            ids_of("OLD:>"), on_full=lambda tokens: tokens[-4:], max_tokens=40, **options
        )
        run(generation)
        texts.append(generation.tokens)
    assert texts[0] == texts[1]


def test_guesses_go_on_where_room_was_made() -> None:
    script = ids_of("abcabcabcabcabcabcabc")
    plain, calls = run_shortened(script, context=25)
    guessed, calls_guessed = run_shortened(script, context=25, lookup=True)
    assert calls == calls_guessed and len(calls) == 1
    assert plain.text == guessed.text == "abcabcabcabcabcabcabc"


def test_a_generation_stopped_at_the_gap_makes_no_room() -> None:
    session = make_session(FakeRuntime(speaking(*ids_of("abcdefgh")), context=8))
    generation = session.generate(ids_of("OLD:>"), on_full=lambda tokens: pytest.fail("called"))
    for _ in range(4):
        next(generation)
    session.stop()
    assert run(generation) == []
    assert generation.stop_reason == "cancelled"


def test_the_tokens_of_a_shortened_text_are_counted_as_read_again() -> None:
    generation, _ = run_shortened(ids_of("abcde"), context=8)
    stats = generation.stats
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens) == (5 + 5, 0, 6)
    assert generation.prompt_progress == (5, 5)


def test_a_character_of_several_tokens_comes_whole() -> None:
    pieces = run(session_saying(*ids_of("aé€b")).generate(PROMPT))
    assert pieces == ["a", "", "é", "", "", "€", "b"]


@pytest.mark.parametrize(("end", "reason"), [({}, "stop"), ({"max_tokens": 2}, "length")])
def test_a_character_cut_off_at_the_end_shows_as_replacement(end: dict[str, int], reason: str) -> None:
    generation = session_saying(*ids_of("aé")[:2]).generate(PROMPT, **end)
    run(generation)
    assert (generation.text, generation.stop_reason) == ("a�", reason)


def test_stop_strings_never_leak_even_in_part() -> None:
    session = session_saying(*ids(b"the", b"xEN", b"D!", b"the"))
    generation = session.generate(PROMPT, stop=["END"])
    assert run(generation) == ["the", "x", ""]
    assert (generation.text, generation.stop_reason) == ("thex", "stop")
    assert generation.tokens == ids(b"the", b"xEN", b"D!")


def test_what_was_held_back_comes_when_the_model_stops() -> None:
    generation = session_saying(*ids(b"the", b"xEN")).generate(PROMPT, stop="END")
    pieces = run(generation)
    assert pieces == ["the", "x", "EN"]
    assert pieces[-1].token is None
    assert generation.stop_reason == "stop"


def test_what_was_held_back_comes_with_the_last_token_of_max_tokens() -> None:
    generation = session_saying(*ids(b"the", b"xEN", b"D!")).generate(PROMPT, stop="END", max_tokens=2)
    assert run(generation) == ["the", "xEN"]
    assert generation.stop_reason == "length"


def test_a_stop_string_across_a_split_character() -> None:
    generation = session_saying(*ids_of("a→b")).generate(PROMPT, stop="→b")
    assert run(generation) == ["a", "", "", "", ""]


def test_rows_beyond_the_vocabulary_are_never_chosen() -> None:
    generation = make_session(FakeRuntime(lambda held: len(PIECES) + 1)).generate(PROMPT, max_tokens=1)
    run(generation)
    assert generation.tokens[0] < len(PIECES)


def test_penalties_see_the_prompt_and_what_was_generated() -> None:
    a = ids_of("a")[0]
    generation = make_session(FakeRuntime(lambda held: a)).generate(PROMPT, max_tokens=4, presence_penalty=100)
    run(generation)
    assert len(set(generation.tokens)) == 4
    generation = make_session(FakeRuntime(lambda held: a)).generate(ids_of("a>"), max_tokens=1, presence_penalty=100)
    run(generation)
    assert generation.tokens != [a]


def test_dry_gets_its_breakers_from_the_tokenizer() -> None:
    prompt = ids_of("ab:cab:")
    rule = dict(zip("ab:c", ids_of("b:ca"), strict=True))
    runtime = FakeRuntime(lambda held: rule[chr(held[-1] - 2)])
    for breakers, expected in [(["?"], False), ([":"], True)]:
        generation = make_session(runtime).generate(
            prompt, max_tokens=1, dry_multiplier=100.0, dry_allowed_length=1, dry_breakers=breakers
        )
        run(generation)
        assert (generation.tokens == ids_of("c")) == expected


def test_progress_counts_the_tokens_of_the_prompt_that_are_read() -> None:
    runtime, seen = FakeRuntime(), list[tuple[int, int]]()
    runtime.on_batch = lambda: seen.append(generation.prompt_progress)
    generation = make_session(runtime).generate(ids_of("a" * 20), max_tokens=3)
    assert generation.prompt_progress == (0, 20)
    run(generation)
    assert seen[:3] == [(8, 20), (16, 20), (20, 20)]
    assert generation.prompt_progress == (20, 20)


def test_a_second_reader_is_refused_and_the_first_goes_on() -> None:
    runtime, refused = FakeRuntime(), list[str]()

    def read() -> None:
        try:
            next(generation)
        except RuntimeError as error:
            refused.append(str(error))

    def another_reader() -> None:
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()

    expected = run(make_session(FakeRuntime()).generate(PROMPT, max_tokens=6, temperature=0))
    runtime.on_batch = another_reader
    generation = make_session(runtime).generate(PROMPT, max_tokens=6, temperature=0)
    assert run(generation) == expected
    assert set(refused) == {"this generation is being read by another thread"}
    assert (len(generation.tokens), generation.stop_reason) == (6, "length")


def test_readers_may_take_turns() -> None:
    generation = make_session(FakeRuntime()).generate(PROMPT, max_tokens=6, temperature=0)
    expected = run(make_session(FakeRuntime()).generate(PROMPT, max_tokens=6, temperature=0))
    with ThreadPoolExecutor(3) as pool:
        pieces = [pool.submit(next, generation).result() for _ in expected]
    assert pieces == expected


def test_cancel_before_the_start_computes_nothing() -> None:
    runtime = FakeRuntime()
    generation = make_session(runtime).generate(PROMPT)
    generation.cancel()
    assert run(generation) == []
    assert (generation.stop_reason, runtime.evaluated) == ("cancelled", [])


def test_cancel_between_pieces() -> None:
    generation = session_saying(*ids_of("hello")).generate(PROMPT)
    assert [next(generation), next(generation)] == ["h", "e"]
    generation.cancel()
    assert run(generation) == []
    assert (generation.text, generation.stop_reason) == ("he", "cancelled")


def test_cancel_shows_held_back_text_but_no_broken_character() -> None:
    generation = session_saying(*ids(b"xEN"), ids_of("é")[0], ids_of("a")[0]).generate(PROMPT, stop="END")
    assert [next(generation), next(generation)] == ["x", ""]
    generation.cancel()
    assert run(generation) == ["EN"]


def test_stop_from_another_thread_ends_a_long_prompt() -> None:
    runtime = FakeRuntime(context=1000)
    session = make_session(runtime)
    in_prompt, stopped = threading.Event(), threading.Event()

    def on_batch() -> None:
        in_prompt.set()
        assert stopped.wait(60)

    runtime.on_batch = on_batch

    def stop() -> None:
        assert in_prompt.wait(60)
        session.stop()
        stopped.set()

    thread = threading.Thread(target=stop)
    thread.start()
    prompt = ids_of("a" * 500)
    generation = session.generate(prompt)
    assert run(generation) == []
    thread.join()
    assert generation.stop_reason == "cancelled"
    assert session.tokens == prompt[: runtime.batch], "what was computed is kept"
    # The session is of use afterwards, and does not compute that part again.
    again = session.generate(prompt, max_tokens=1)
    run(again)
    assert (again.stop_reason, again.stats.cached_tokens) == ("length", runtime.batch)


def test_stop_during_a_step_yields_no_further_piece() -> None:
    runtime = FakeRuntime(speaking(*ids_of("hello")))
    session = make_session(runtime)
    generation = session.generate(PROMPT)
    assert next(generation) == "h"
    runtime.on_batch = session.stop
    assert run(generation) == []
    assert generation.stop_reason == "cancelled"


def test_an_error_in_a_step_ends_it_and_leaves_the_session_usable() -> None:
    runtime = FakeRuntime(speaking(*ids_of("hello")))
    session = make_session(runtime)
    generation = session.generate(ids_of("a long prompt>"))

    def fail() -> None:
        raise KeyboardInterrupt

    runtime.on_batch = fail
    with pytest.raises(KeyboardInterrupt):
        next(generation)
    assert generation.stop_reason == "cancelled"
    assert session.tokens == ids_of("a long prompt>")[: runtime.batch]
    runtime.on_batch = lambda: None
    again = session.generate(ids_of("a long prompt>"))
    run(again)
    assert again.text == "hello"


def test_stats() -> None:
    session = session_saying(*ids_of("hello"))
    run(session.generate(PROMPT, max_tokens=2))
    generation = session.generate(PROMPT)
    run(generation)
    stats = generation.stats
    assert (stats.prompt_tokens, stats.cached_tokens, stats.generated_tokens) == (4, 3, 6)
    assert 0 < stats.prompt_seconds <= stats.first_token_seconds
    assert stats.generate_seconds > 0
    assert stats.generated_tokens_per_second == pytest.approx(5 / stats.generate_seconds)
    assert stats.prompt_tokens_per_second == pytest.approx(1 / stats.prompt_seconds)


def test_stats_before_the_start() -> None:
    stats = session_saying().generate(PROMPT).stats
    assert (stats.generated_tokens, stats.prompt_tokens_per_second, stats.generated_tokens_per_second) == (0, 0, 0)


def test_without_a_tokenizer_tokens_come_without_text() -> None:
    runtime = FakeRuntime(speaking(*ids_of("hello")))
    generation = make_session(runtime, tokenizer=False).generate(PROMPT, max_tokens=3)
    assert run(generation) == ["", "", ""]
    assert generation.tokens == ids_of("hel")
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        make_session(runtime, tokenizer=False).generate(PROMPT, stop="x")


def test_the_same_seed_gives_the_same_text() -> None:
    runtime = FakeRuntime(lambda held: len(held) % 7, context=100)
    first, second, other = (
        make_session(runtime).generate(PROMPT, temperature=2.0, seed=seed, max_tokens=30) for seed in (1, 1, 2)
    )
    for generation in (first, second, other):
        run(generation)
    assert first.tokens == second.tokens != other.tokens
    assert first.seed == 1
