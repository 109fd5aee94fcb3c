"""A draft's guesses never change a text, whatever it guesses; and they cost little where they fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from engine_fakes import EOS, FakeRuntime, FakeTokenizer, ids_of, speaking
from tiny_model import PIECES, write_tiny_model

from qrun.cli.main import cli
from qrun.engine import Model
from qrun.engine.generation import draft as draft_module
from qrun.engine.generation.draft import Draft, DraftGuesser, ModelDrafter, Reading
from qrun.engine.generation.guesses import MAX_GUESSES, Account
from qrun.engine.generation.session import Host, Session
from qrun.engine.sampling.options import SamplingOptions
from qrun.formats import FormatError

ARCHITECTURES = Path(__file__).parents[1] / "data" / "arch"
FOX = ids_of("the quick brown fox jumps over the lazy dog. ")


# How many guesses, and whether any: by a clock that only the draft and the steps turn


@dataclass
class Clock:
    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(draft_module, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


class Oracle:
    """A drafter that says token 1 with some confidence, and takes its time."""

    def __init__(self, clock: Clock, step: float, confidence: float, token_seconds: float = 0.0) -> None:
        self.clock, self.step, self.token_seconds = clock, step, token_seconds
        self.logits = np.full(101, np.log((1 - confidence) / 100), np.float32)
        self.logits[1] = np.log(confidence)
        self.held = 0
        self.reads: list[int] = []

    def read(self, text: list[int], most: int, cancelled: Callable[[], bool]) -> Reading:
        count = min(len(text) - min(self.held, len(text) - 1), most)
        self.held = len(text)
        self.reads.append(count)
        self.clock.now += self.step if count <= MAX_GUESSES else self.token_seconds * count
        return Reading(self.logits, 100, count)

    def follow(self, token: int) -> np.ndarray:
        assert token == 1
        self.clock.now += self.step
        return self.logits

    def fork(self) -> Oracle:
        raise AssertionError

    def close(self) -> None:
        raise AssertionError


def seconds_of(rows: int) -> float:
    """What steps of a model take in these tests: panels of 1, 4, 8 and 16 rows."""
    return {1: 1.0, 4: 1.3, 8: 1.8, 16: 3.0}[next(size for size in (1, 4, 8, 16) if size >= rows)]


def generate(
    draft: Draft, clock: Clock, steps: int, right: float, rng: np.random.Generator, prompt: int = 1
) -> tuple[float, list[int]]:
    """How many times as fast a text comes with the draft, and how many guesses each step had."""
    guesser = DraftGuesser(draft, [5] * prompt)
    begin, tokens, sizes = clock.now, 0, []
    for _ in range(steps):
        guesses = guesser.guess(100, lambda: False)
        accepted = 0
        while accepted < len(guesses) and rng.random() < right:
            accepted += 1
        seconds = seconds_of(len(guesses) + 1)
        clock.now += seconds
        for _ in range(accepted + 1):
            guesser.push(7)
        guesser.learn(len(guesses), accepted, seconds)
        tokens += accepted + 1
        sizes.append(len(guesses))
    return tokens / (clock.now - begin), sizes


@pytest.mark.parametrize("step", [0.02, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("confidence", [0.2, 0.6, 0.99])
def test_a_draft_that_is_always_wrong_costs_little(
    clock: Clock, rng: np.random.Generator, step: float, confidence: float
) -> None:
    speed, sizes = generate(Draft(Oracle(clock, step, confidence), 100), clock, 1000, 0.0, rng)
    assert speed > 0.97
    assert sum(sizes) < 300


@pytest.mark.parametrize(("step", "right", "least"), [(0.05, 1.0, 3.5), (0.1, 0.9, 2.0), (0.1, 0.7, 1.4)])
def test_a_good_draft_gains(
    clock: Clock, rng: np.random.Generator, step: float, right: float, least: float
) -> None:
    speed, _ = generate(Draft(Oracle(clock, step, 0.8), 100), clock, 1000, right, rng)
    assert speed > least


@pytest.mark.parametrize("step", [0.02, 0.1, 0.3, 1.0, 1.5])
@pytest.mark.parametrize("right", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [48, 100, 250])
def test_short_texts_do_not_suffer_from_finding_out_what_a_draft_is_worth(
    clock: Clock, rng: np.random.Generator, step: float, right: float, length: int
) -> None:
    oracle = Oracle(clock, step, 0.9, token_seconds=step / 5)
    draft = Draft(oracle, 100, step)
    assert generate(draft, clock, length, right, rng, prompt=40)[0] > 0.95


def test_a_cheap_draft_is_tried_soon_and_a_dear_one_late(clock: Clock, rng: np.random.Generator) -> None:
    first = []
    for step in (0.05, 0.2, 1.0):
        _, sizes = generate(Draft(Oracle(clock, step, 0.9), 100, step), clock, 400, 0.5, rng)
        first.append(next(number for number, count in enumerate(sizes) if count))
    assert first == sorted(first) and first[0] < 25 and first[-1] > 60


def test_a_draft_as_slow_as_the_model_is_not_used_however_good_it_is(clock: Clock, rng: np.random.Generator) -> None:
    speed, sizes = generate(Draft(Oracle(clock, 1.0, 0.99), 100), clock, 1000, 1.0, rng)
    assert speed > 0.97
    assert sizes.count(0) > 900


def test_guesses_that_turn_bad_soon_end_and_begin_again_when_they_are_good(
    clock: Clock, rng: np.random.Generator
) -> None:
    draft = Draft(Oracle(clock, 0.1, 0.9), 100)
    assert generate(draft, clock, 300, 0.95, rng)[0] > 1.5
    assert generate(draft, clock, 1000, 0.0, rng)[0] > 0.95
    assert generate(draft, clock, 1000, 0.95, rng)[0] > 1.3


def test_steps_without_guesses_are_measured_again_and_again(clock: Clock, rng: np.random.Generator) -> None:
    _, sizes = generate(Draft(Oracle(clock, 0.05, 0.99), 100), clock, 500, 1.0, rng)
    assert sizes[:3] == [0, 0, 0]
    assert 5 <= sizes[50:].count(0) <= 10


def test_a_long_prompt_is_read_as_far_as_guesses_have_paid_for_it(clock: Clock, rng: np.random.Generator) -> None:
    useless = Oracle(clock, 0.1, 0.9, token_seconds=0.05)
    assert generate(Draft(useless, 100), clock, 300, 0.0, rng, prompt=10_000)[0] > 0.95
    assert max(useless.reads) < 200
    good = Oracle(clock, 0.1, 0.9, token_seconds=0.05)
    draft = Draft(good, 100)
    generate(draft, clock, 300, 1.0, rng, prompt=10_000)
    good.held = 0
    generate(draft, clock, 300, 1.0, rng, prompt=2_000)
    assert good.reads[0] == 32
    assert max(good.reads) > 1000


# The same text


def never(*_: object) -> bool:
    return False


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """Drafts guess whenever they can, as many tokens as a random number says."""
    monkeypatch.setattr(Account, "allows", lambda *_: True)
    monkeypatch.setattr(draft_module, "_PLAIN_FIRST", 1)
    monkeypatch.setattr(draft_module, "_PLAIN_EVERY", 1 << 30)
    monkeypatch.setattr(Draft, "_goes_on", lambda *_: rng.random() < 0.8)
    monkeypatch.setattr(Draft, "_best_count", lambda self, chances: len(chances))


def with_draft(
    runtime: FakeRuntime, draft: FakeRuntime, *, tokenizer: Any = None, **defaults: Any
) -> Session:
    n_vocab = min(runtime.n_vocab, draft.n_vocab)
    host = Host(
        runtime,  # type: ignore[arg-type]
        FakeTokenizer(),  # type: ignore[arg-type]
        SamplingOptions(**{"temperature": 0} | defaults),
        lambda: "model",
        lambda: Draft(ModelDrafter(draft), n_vocab),  # type: ignore[arg-type]
    )
    return Session(host)


def sometimes_wrong(rule: Callable[[list[int]], int], every: int) -> Callable[[list[int]], int]:
    return lambda held: rule(held) if len(held) % every else ids_of("?")[0]


@pytest.mark.parametrize("every", [1, 3, 1 << 30])
@pytest.mark.parametrize("limits", [{}, {"max_tokens": 50}, {"stop": ("jumps",)}, {"lookup": True}])
def test_texts_and_ends_are_the_same(eager: None, every: int, limits: dict[str, Any]) -> None:
    ends = []
    for use in (False, True):
        rule = speaking(*FOX * 5)
        drafting = FakeRuntime(sometimes_wrong(rule, every), context=150, batch=64)
        session = with_draft(FakeRuntime(rule, context=150, batch=64), drafting)
        generation = session.generate([*FOX, *ids_of(">")], draft=use, **limits)
        pieces = list(generation)
        ends.append((pieces, generation.tokens, generation.stop_reason, generation.stats.generated_tokens))
        stats = generation.stats
        assert (stats.guessed_tokens > 0) == (use or "lookup" in limits)
        if every > 1000 and not limits:
            assert stats.accepted_tokens >= stats.guessed_tokens - MAX_GUESSES  # but for those beyond the end
    assert ends[0] == ends[1]


def test_a_draft_that_knows_the_text_takes_fewer_evaluations(eager: None) -> None:
    runtime = FakeRuntime(speaking(*FOX), context=300, batch=64)
    generation = with_draft(runtime, FakeRuntime(speaking(*FOX), context=300)).generate(ids_of(">"))
    assert "".join(generation) == "the quick brown fox jumps over the lazy dog. "
    assert len(runtime.evaluated) < len(FOX) / 2


@pytest.mark.parametrize("context", [40, 60, 400])
@pytest.mark.parametrize("window", [None, 20])
def test_a_draft_with_a_small_context_reads_the_end_of_the_text(eager: None, context: int, window: int | None) -> None:
    rule = speaking(*FOX * 5)
    drafting = FakeRuntime(rule, context=context, batch=64, window=window)
    generation = with_draft(FakeRuntime(rule, context=400, batch=64), drafting).generate([*FOX * 2, *ids_of(">")])
    assert "".join(generation) == "the quick brown fox jumps over the lazy dog. " * 5
    assert generation.stats.accepted_tokens > 20


def test_a_text_that_is_shortened_goes_on_the_same(eager: None) -> None:
    texts = []
    for use in (False, True):
        rule = speaking(*FOX * 9)
        session = with_draft(FakeRuntime(rule, context=60, batch=64), FakeRuntime(rule, context=60, batch=64))
        generation = session.generate(
            [*FOX[:20], *ids_of(">")], on_full=lambda tokens: tokens[-30:], max_tokens=150, draft=use
        )
        texts.append("".join(generation))
        assert len(generation.tokens) == 150
    assert texts[0] == texts[1]


def test_cancelling_ends_a_draft_that_reads() -> None:
    drafting = FakeRuntime(speaking(*FOX), context=300, batch=8)
    drafter = ModelDrafter(drafting)  # type: ignore[arg-type]
    generation = with_draft(FakeRuntime(speaking(*FOX), context=300), drafting).generate(ids_of(">"))
    drafting.on_batch = generation.cancel
    next(generation)
    for piece in generation:
        assert piece
    assert generation.stop_reason in ("cancelled", "stop")
    assert drafter.read(ids_of("ab"), 10, never).evaluated == 2


def test_a_cancelled_text_ends_where_it_was(eager: None) -> None:
    rule = speaking(*FOX)
    session = with_draft(FakeRuntime(rule, batch=64), FakeRuntime(rule, batch=64))
    generation = session.generate(ids_of(">"))
    for _ in range(6):
        next(generation)
    generation.cancel()
    assert list(generation) == []
    assert (generation.text, generation.stop_reason) == ("the qu", "cancelled")
    assert "".join(session.generate([*ids_of(">"), *FOX[:6]])) == "ick brown fox jumps over the lazy dog. "


def test_forks_and_later_turns_have_drafts_that_know_the_text(eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_module, "_LEAST_READ", 300)  # whole texts from the first, whatever they have gained
    rule = speaking(*FOX)
    drafting = FakeRuntime(rule, context=300, batch=64)
    session = with_draft(FakeRuntime(rule, context=300, batch=64), drafting)
    "".join(session.generate([*FOX, *ids_of(">")]))
    fork = session.fork()
    drafting.evaluated.clear()
    prompt = [*FOX, *ids_of(">"), *FOX, EOS, *ids_of("?>")]
    assert "".join(fork.generate(prompt)) == "".join(session.generate(prompt))
    assert max(map(len, drafting.evaluated)) < 20
    for one in (fork, session):
        one.close()
    assert all(sequence.closed for sequence in drafting.sequences)


# Real models


@pytest.mark.parametrize("path", sorted(ARCHITECTURES.glob("*.gguf")), ids=lambda path: path.stem)
def test_texts_of_models_are_the_same_to_the_token(
    eager: None, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, path: Path
) -> None:
    """With the model as its own draft, whose guesses are spoilt at random: across windows and pages."""
    likeliest = draft_module.likeliest

    def spoilt(logits: np.ndarray) -> tuple[int, float]:
        token, confidence = likeliest(logits)
        return (token if rng.random() < 0.9 else int(rng.integers(len(logits)))), confidence

    with Model.load(path, threads=1, context=200, batch=64, draft=path) as model:
        prompt = rng.integers(0, model.graph.n_vocab, 20).tolist()
        for options in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 3, "repetition_penalty": 1.1}):
            plain = model.generate(prompt, draft=False, **options)
            expected = list(plain), plain.tokens, plain.stop_reason
            with monkeypatch.context() as patched:
                patched.setattr(draft_module, "likeliest", spoilt)
                guessed = model.session().generate(prompt, **options)
                assert (list(guessed), guessed.tokens, guessed.stop_reason) == expected
                assert guessed.stats.guessed_tokens > 50
            if options["temperature"] == 0:
                guessed = model.session().generate(prompt, **options)
                assert (list(guessed), guessed.tokens, guessed.stop_reason) == expected
                assert guessed.stats.accepted_tokens == guessed.stats.guessed_tokens > 50


def test_a_saved_session_goes_on_with_a_draft(eager: None, tmp_path: Path) -> None:
    path = ARCHITECTURES / "llama-dense.gguf"
    with Model.load(path, threads=1, context=128, draft=path) as model:
        first = model.session().generate([1, 2, 3], max_tokens=20, temperature=0)
        list(first)
        session = model.session()
        list(session.generate([1, 2, 3], max_tokens=10, temperature=0))
        session.save(tmp_path / "saved")
        loaded = model.session()
        loaded.load(tmp_path / "saved")
        rest = loaded.generate([1, 2, 3, *first.tokens[:10]], max_tokens=10, temperature=0)
        list(rest)
        assert rest.tokens == first.tokens[10:]
        assert rest.stats.accepted_tokens > 0
    with Model.load(path, threads=1, context=128) as other:
        session = other.session()
        session.load(tmp_path / "saved")
        assert len(session.tokens) > 10


def test_a_draft_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model.gguf")
    other = write_tiny_model(tmp_path / "other.gguf", pieces=[*PIECES[:5], "x!", *PIECES[6:]])
    with pytest.raises(FormatError) as refused:
        Model.load(model, draft=other, threads=1)
    assert str(refused.value).startswith(f"{other}: no draft for model.gguf, which has another vocabulary: token 5 is")
    with pytest.raises(FormatError, match=r"llama-dense\.gguf: no draft for model\.gguf, which has another vocabulary"):
        Model.load(model, draft=ARCHITECTURES / "llama-dense.gguf", threads=1)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.gguf"):
        Model.load(model, draft=tmp_path / "nowhere.gguf", threads=1)
    Model.load(model, draft=model, threads=1).close()


# The command line


def test_commands_take_a_draft(tmp_path: Path) -> None:
    model = str(write_tiny_model(tmp_path / "model.gguf"))
    outputs = []
    for draft in ([], ["--draft", model]):
        arguments = ["run", model, "It was", "--temperature", "0", "--max-tokens", "40", "-t", "1", *draft]
        outputs.append(CliRunner().invoke(cli, arguments))
        assert outputs[-1].exit_code == 0
    assert outputs[0].stdout == outputs[1].stdout
    result = CliRunner().invoke(
        cli, ["bench", model, "--draft", model, "-p", "0", "-n", "40", "-r", "1", "-t", "1", "--no-bandwidth", "--json"]
    )
    figures = json.loads(result.stdout)
    assert figures["text"] > 0 and figures["draft"] > 0
    assert figures["guessed"] >= figures["accepted"] >= 0
    result = CliRunner().invoke(cli, ["bench", model, "--draft", model, "--compare", "peer"])
    assert result.exit_code == 2 and "--draft does not go with --compare" in result.stderr


@pytest.mark.parametrize("command", [["run", "It was"], ["bench", "-n", "4"], ["chat"]])
def test_a_draft_that_does_not_fit_is_refused_at_once(tmp_path: Path, command: list[str]) -> None:
    model = write_tiny_model(tmp_path / "model.gguf")
    other = write_tiny_model(tmp_path / "other.gguf", pieces=[*PIECES[:5], "x!", *PIECES[6:]])
    for draft, problem in ((other, f"{other}: no draft for model.gguf"), ("mtp", f"{model}: it has no draft layers")):
        arguments = [command[0], str(model), *command[1:], "--draft", str(draft), "-t", "1"]
        result = CliRunner().invoke(cli, arguments, input="Hi\n")
        assert isinstance(result.exception, FormatError)
        assert str(result.exception).startswith(problem)
        assert result.stdout == ""
