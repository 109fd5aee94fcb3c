"""Models with an encoder and a decoder: the encoder reads a prompt once, and the decoder answers it."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import matrices, merged_model, random_pair, write_adapter
from asgi_client import call
from click.testing import CliRunner
from tiny_model import write_tiny_model
from tiny_t5 import write_t5

from qrun.cli.main import cli
from qrun.engine import ContextOverflow, Conversation, Model
from qrun.engine.errors import GenerationCancelled
from qrun.engine.generation import session_file
from qrun.engine.generation.generation import Generation
from qrun.engine.kernels import records as R
from qrun.engine.program.kv_cache import KVSequence
from qrun.engine.program.runtime import Runtime
from qrun.formats import FormatError, GGUFReader
from qrun.models import build_graph
from qrun.models.t5 import buckets
from qrun.server import app
from tests.reference import forward
from tests.sketches import load
from tests.sketches import model as sketched
from tests.toys import error

PROMPT = "translate this: a cat sat"
CHOSEN = {"max_tokens": 12, "temperature": 1.0, "seed": 5}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_t5(tmp_path_factory.mktemp("models") / "t5.gguf", decoder_start_token_id=0)


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[Model]:
    with Model.load(path, threads=1) as loaded:
        yield loaded


def test_near_distances_have_a_bucket_each_and_far_ones_share_some() -> None:
    both = buckets(np.array([0, -1, 1, -7, 7, -8, 8, -15, -16, -127, -128, -5000, 5000]), 32, both_ways=True)
    assert both.tolist() == [0, 1, 17, 7, 23, 8, 24, 9, 10, 15, 15, 15, 31]
    before = buckets(np.array([1, 0, -1, -15, -16, -18, -19, -127, -5000]), 32, both_ways=False)
    assert before.tolist() == [0, 0, 1, 15, 16, 16, 17, 31, 31]


def test_an_answer_is_the_same_in_any_steps_from_a_fork_and_from_a_saved_state(path: Path) -> None:
    source = tuple(int(token) for token in np.random.default_rng(3).integers(3, 60, 40))
    answer = [0, *source[:20]]
    with GGUFReader(path) as reader:
        runtime = Runtime(build_graph(reader, 64), threads=2, context=64)
    sequence, other = runtime.sequence(), runtime.sequence()
    for one in (sequence, other):
        one.answer(source)
    whole = runtime.evaluate(sequence, answer, "all")
    assert whole is not None
    for token, row in zip(answer, whole, strict=True):
        assert np.array_equal(runtime.evaluate(other, [token]), row)
    assert sequence.truncate(3) == 3
    restored = runtime.sequence()
    restored.restore(sequence.state())
    for one in (sequence.fork(), restored):
        assert one.source == source and one.source_read
        assert np.array_equal(runtime.evaluate(one, answer[3:], "all"), whole[3:])
    # Of another source, nothing that was read counts.
    sequence.answer(source[::-1])
    assert sequence.n_past == 0 and not np.array_equal(runtime.evaluate(sequence, answer, "all"), whole)
    # What only the encoder needs is given back.
    encoder, *_ = (group for group, side in enumerate(sequence.layout.sides) if side == "encoder")
    assert runtime._pools[encoder].used_bytes == 0
    runtime.close()


@pytest.mark.parametrize("name", ["t5-dense", "t5-gated"])
def test_long_texts_have_the_logits_of_the_plain_forward_pass(name: str, rng: np.random.Generator) -> None:
    """Of distances that have a bias each, that share one, and that are farther than all of these."""
    graph = build_graph(sketched(load()[name]), 320)
    source, answer = (rng.integers(3, 120, n).tolist() for n in (300, 200))
    runtime = Runtime(graph, threads=1, context=320)
    sequence = runtime.sequence()
    sequence.answer(tuple(source))
    result = runtime.evaluate(sequence, answer, "all")
    runtime.close()
    assert result is not None and error(result, forward(graph, answer, source)) <= 1e-8


def test_a_long_source_can_be_cancelled_within_an_attention(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    graph = build_graph(sketched(load()["t5-dense"]), 700)
    source, answer = rng.integers(3, 120, 650).tolist(), [0, 5, 6]
    runtime = Runtime(graph, threads=1, context=700)
    team = runtime._team
    assert team is not None and runtime._encoder is not None
    attentions = {runtime._encoder.whole[index].ctypes.data for index in runtime._encoder.attentions}
    run = team.run
    tiles: list[int] = []

    def noted(operations: np.ndarray, step: np.ndarray) -> None:
        if operations.ctypes.data in attentions:
            assert len(operations) == 1
            tiles.append(int(step[R.N_TILES // 8]))
        run(operations, step)

    monkeypatch.setattr(team, "run", noted)
    sequence = runtime.sequence()
    sequence.answer(tuple(source))
    with pytest.raises(GenerationCancelled):
        runtime.read_source(sequence, lambda: len(tiles) == 1)
    assert len(tiles) == 1 and not sequence.source_read and runtime.cache_bytes == 0
    tiles.clear()
    result = runtime.evaluate(sequence, answer, "all")
    runtime.close()
    assert sum(tiles) == len(attentions) * -(-len(source) // R.TILE_SIZE) and len(tiles) > len(attentions)
    assert result is not None and error(result, forward(graph, answer, source)) <= 1e-8


def test_a_sequence_without_a_source_answers_nothing(path: Path) -> None:
    with GGUFReader(path) as reader:
        runtime = Runtime(build_graph(reader, 64), threads=1, context=64)
    with pytest.raises(ValueError, match="the model answers a text that it has read"):
        runtime.evaluate(runtime.sequence(), [0])
    runtime.close()


def test_the_prompt_goes_to_the_encoder_and_the_answer_begins_with_the_start_token(model: Model) -> None:
    source = model.tokenize(PROMPT)
    assert source[-1] == 1  # the end of the text
    generation = model.generate(PROMPT, max_tokens=6, temperature=0)
    text = "".join(generation)
    expected = [0]
    for _ in range(6):
        expected.append(int(model.logits(expected, source=source)[-1].argmax()))
    assert generation.tokens == expected[1:] and text == model.complete(PROMPT, max_tokens=6, temperature=0)
    assert generation.stats.prompt_tokens == len(source) + 1
    assert generation.prompt_progress == (len(source) + 1, len(source) + 1)


def test_a_source_that_was_read_is_not_read_again(model: Model) -> None:
    first = model.generate(PROMPT + " once", **CHOSEN)
    list(first)
    again = model.generate(PROMPT + " once", **CHOSEN)
    list(again)
    assert again.tokens == first.tokens and again.stats.cached_tokens == again.stats.prompt_tokens - 1
    other = model.generate(PROMPT + " twice", **CHOSEN)
    list(other)
    assert other.stats.cached_tokens == 0


def test_many_at_once_answer_as_each_does_alone(model: Model) -> None:
    prompts = [f"{PROMPT} {'x' * n}" for n in (0, 3, 30)]
    alone = [model.complete(prompt, **CHOSEN) for prompt in prompts]
    assert len(set(alone)) == 3
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        found[number] = model.complete(prompts[number % 3], lookup=number % 2 == 0, **CHOSEN)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(9)] == alone * 3


def test_sessions_are_forked_and_saved_with_what_they_answer(model: Model, tmp_path: Path) -> None:
    source = model.tokenize(PROMPT)
    session = model.session()
    text = "".join(session.generate(source, **CHOSEN))
    session.save(tmp_path / "s.npz")
    loaded = model.session()
    loaded.load(tmp_path / "s.npz")
    assert loaded.tokens == session.tokens and loaded.tokens[0] == 0
    for one in (loaded, session.fork()):
        generation = one.generate(source, **CHOSEN)
        assert "".join(generation) == text and generation.stats.cached_tokens == len(source)
    assert "".join(loaded.generate(model.tokenize("other"), **CHOSEN)) == model.complete("other", **CHOSEN)


def test_a_chat_is_what_was_said_one_below_the_other(model: Model) -> None:
    messages = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"},
                {"role": "user", "content": "d"}]  # fmt: skip
    assert model.chat_prompt(messages) == "a b\nc\nd"
    alone = "".join(model.chat(PROMPT, **CHOSEN))
    assert alone == model.complete(PROMPT, **CHOSEN)
    conversation = Conversation(model, sampling=dict(CHOSEN))
    assert "".join(map(str, conversation.answer(PROMPT))) == alone
    assert conversation.messages[-1]["content"] == alone
    list(conversation.answer("and now"))
    conversation.close()


def test_the_command_line_and_the_server_answer(model: Model, path: Path) -> None:
    expected = model.complete(PROMPT, **CHOSEN)
    arguments = ["run", str(path), PROMPT, "--max-tokens", "12", "--temperature", "1", "--seed", "5", "--threads", "1"]
    done = CliRunner().invoke(cli, [*arguments, "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["text"] == expected
    asked = {"prompt": PROMPT, "max_tokens": 12, "temperature": 1.0, "seed": 5}
    answer = call(app({"t5": model}), "POST", "/v1/completions", {"model": "t5", **asked})
    assert answer.status == 200 and answer.json()["choices"][0]["text"] == expected


def test_what_such_a_model_cannot_do_is_said_in_one_line(model: Model, path: Path, tmp_path: Path) -> None:
    for refused in (
        lambda: model.logits([0]), lambda: model.prompt_logprobs([0, 5]), lambda: model.embed("x"),
        lambda: model.chat([{"role": "assistant", "content": "a"}], continue_last=True),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^t5\.gguf: [^\n]*$"):
            refused()
    with pytest.raises(ContextOverflow, match="the context holds 64"):
        model.complete("a" * 100)
    with pytest.raises(ValueError, match="a draft for a model with an encoder"):
        Model.load(path, threads=1, draft=path)
    plain = write_tiny_model(tmp_path / "m.gguf")
    with pytest.raises(FormatError, match="it cannot be a draft"):
        Model.load(plain, threads=1, draft=path)
    with Model.load(plain, threads=1, context=64) as other, pytest.raises(ValueError, match="it has no encoder"):
        other.logits([1], source=[2])
    text = tmp_path / "text.txt"
    text.write_text("a cat sat " * 200)
    for problem, *command in (
        ("so that there is no perplexity of it", "perplexity", path, text),
        ("so that there is no importance matrix of it", "imatrix", path, text, "-o", tmp_path / "i.gguf"),
        ("has an encoder and a decoder", "bench", path),
    ):
        done = CliRunner().invoke(cli, list(map(str, command)))
        assert isinstance(done.exception, ValueError) and problem in str(done.exception)


def test_adapters_change_both_halves(path: Path, rng: np.random.Generator, tmp_path: Path) -> None:
    source, answer = [9, 8, 7, 1], [0, 5, 6]
    chosen = ("enc.blk.0.attn_q.weight", "enc.blk.1.ffn_up.weight", "dec.blk.1.cross_attn_k.weight",
              "dec.blk.0.cross_attn_q.weight", "dec.blk.1.ffn_down.weight")  # fmt: skip
    for name in chosen:
        pair = random_pair(rng, name, matrices(path)[name], 4)
        adapter = write_adapter(tmp_path / "a.gguf", {name: pair}, architecture="t5")
        merged = merged_model(path, tmp_path / "merged.gguf", [(adapter, 1.0)])
        with Model.load(path, threads=1, loras=[adapter]) as one, Model.load(merged, threads=1) as other:
            result, expected = (loaded.logits(answer, source=source) for loaded in (one, other))
        assert error(result, expected) <= 1e-7
    with pytest.raises(FormatError, match="adapters by name are not supported"):
        Model.load(path, threads=1, adapters={"a": adapter})


def test_logits_are_scaled_where_the_file_says_so(path: Path, tmp_path: Path) -> None:
    scaled = write_t5(tmp_path / "scaled.gguf", decoder_start_token_id=0, logit_scale=0.25)
    source, answer = [9, 8, 7, 1], [0, 5, 6]
    with Model.load(path, threads=1) as one, Model.load(scaled, threads=1) as other:
        assert np.array_equal(other.logits(answer, source=source), one.logits(answer, source=source) * np.float32(0.25))


LONG = {"max_tokens": 8, "temperature": 1.0, "seed": 5, "ignore_eos": True}


@pytest.fixture
def wide(tmp_path: Path) -> Iterator[Model]:
    """A model with room for long sources."""
    with Model.load(write_t5(tmp_path / "t5.gguf", decoder_start_token_id=0, context_length=700), threads=1) as loaded:
        yield loaded


def long_sources(rng: np.random.Generator, count: int) -> list[list[int]]:
    return [[*rng.integers(4, 60, 600).tolist(), 1] for _ in range(count)]


class Together:
    """Generations that all come while a step of another one is computed; `events` tells the reads and the steps from
    then on."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.ended: dict[int, threading.Event] = {}
        self.on_read: Callable[[], None] = lambda: None
        self.running = model.generate("a", max_tokens=600, temperature=1.0, seed=1, ignore_eos=True)
        self._gate, self._begun = threading.Event(), threading.Event()
        runtime = model._runtime
        step, read = runtime.step, runtime._read_source

        def noted_step(*arguments: Any) -> Any:
            if self._begun.is_set():
                self.events.append("step")
            self._begun.set()
            assert self._gate.wait(60)
            return step(*arguments)

        def noted_read(*arguments: Any) -> None:
            if not self._begun.is_set():  # what the one that writes answers
                read(*arguments)
                return
            self.events.append("read")
            self.on_read()
            read(*arguments)
            self.events.append("whole")

        monkeypatch.setattr(runtime, "step", noted_step)
        monkeypatch.setattr(runtime, "_read_source", noted_read)

    def put(self, generation: Any, pieces: list[Any], error: BaseException | None) -> None:
        if generation.stop_reason is not None:
            self.ended[id(generation)].set()

    def flush(self) -> None: ...

    def hurry(self, generation: Any) -> None: ...

    def run(self, generations: list[Generation]) -> None:
        for generation in (self.running, *generations):
            self.ended[id(generation)] = threading.Event()
            generation.start(self)
            assert self._begun.wait(60)
        self._gate.set()
        for generation in generations:
            assert self.ended[id(generation)].wait(60)
        self.running.cancel()
        assert self.ended[id(self.running)].wait(60)


def test_who_writes_goes_on_between_long_sources(
    wide: Model, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    sources = long_sources(rng, 4)
    alone = [wide.generate(source, **LONG) for source in sources]
    for generation in alone:
        list(generation)
    wide._host.prefixes.clear()
    together = Together(wide, monkeypatch)
    generations = [wide.generate(source, **LONG) for source in sources]
    learned: list[int] = []
    monkeypatch.setattr(wide._host.scheduler, "_learn", lambda n_decode, n_prompt, *_: learned.append(n_prompt))
    together.run(generations)
    assert [one.tokens for one in generations] == [one.tokens for one in alone]
    assert together.events.count("read") == 4 and "whole read" not in " ".join(together.events)
    assert max(learned) <= 4  # seconds of sources are none of rows


def test_a_source_is_read_as_long_as_its_own_generation_wants_it(
    wide: Model, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    together = Together(wide, monkeypatch)
    first, second = (wide.generate(source, **LONG) for source in long_sources(rng, 2))
    together.on_read = first.cancel
    together.run([first, second])
    assert [event for event in together.events if event != "step"] == ["read", "read", "whole"]
    assert first.stop_reason == "cancelled" and first.prompt_progress[0] == 0
    assert len(second.tokens) == 8
    wide._host.prefixes.clear()
    assert wide._runtime.cache_bytes == 0


def test_equal_requests_at_once_read_their_source_once(
    wide: Model, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    together = Together(wide, monkeypatch)
    (source,) = long_sources(rng, 1)
    generations = [wide.generate(source, **{**LONG, "seed": seed}) for seed in range(4)]
    together.run(generations)
    assert together.events.count("read") == 1
    assert sum(one.stats.cached_tokens for one in generations) == 3 * len(source)


def test_what_is_forgotten_has_no_source_either(wide: Model, rng: np.random.Generator) -> None:
    first, second = long_sources(rng, 2)
    session = wide.session()
    text = "".join(session.generate(first, **LONG))
    session.clear()
    assert wide._runtime.cache_bytes == 0
    assert "".join(session.generate(first, **LONG)) == text
    session.close()
    # Where there is no room for two, one waits, and the texts are the same.
    expected = [wide.complete(source, **LONG) for source in (first, second)]
    wide._host.prefixes.clear()
    wide._host.prefixes.limit = wide._runtime.bytes_of(64, 601) * 3 // 2
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        found[number] = wide.complete((first, second)[number], **LONG)

    threads = [threading.Thread(target=ask, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[0], found[1]] == expected


def test_a_source_whose_reading_is_cancelled_leaves_nothing(
    wide: Model, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    (source,) = long_sources(rng, 1)
    generation = wide.generate(source, **LONG)
    team = wide._runtime._team
    assert team is not None
    run = team.run

    def cancelling(*arguments: Any) -> None:
        generation.cancel()
        run(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(team, "run", cancelling)
        assert list(generation) == [] and generation.stop_reason == "cancelled"
    assert wide._runtime.cache_bytes == 0 and not wide._host.prefixes._kept
    assert len(list(wide.generate(source, **LONG))) == 8


def test_progress_does_not_sink_when_a_source_has_been_read(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = KVSequence.keep_source
    told: list[int] = []
    generation = model.generate(PROMPT + " and so on", **CHOSEN)

    def noted(self: KVSequence) -> None:
        told.append(generation.prompt_progress[0])
        keep(self)
        told.append(generation.prompt_progress[0])

    monkeypatch.setattr(KVSequence, "keep_source", noted)
    next(generation)
    n_source = generation.prompt_progress[1] - 1
    assert told == [n_source, n_source]


def test_what_answers_a_source_is_not_for_the_disk(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model._host.prefixes, "disk", object())
    model.complete(PROMPT + " on disk", **CHOSEN)
    assert not model._host.prefixes._unwritten


def test_a_decoder_that_sees_ahead_is_refused(tmp_path: Path) -> None:
    path = write_t5(tmp_path / "t5.gguf", decoder_start_token_id=0, attention__causal=False)
    with pytest.raises(FormatError, match=r"attention\.causal is False, which is not supported"):
        Model.load(path, threads=1)


@pytest.mark.parametrize("ids", [[2**62, 5, 6, 1], [5, -6, 7, 1], [5, 128, 7, 1]])
def test_a_saved_source_has_tokens_of_the_vocabulary(model: Model, tmp_path: Path, ids: list[int]) -> None:
    session = model.session()
    list(session.generate([5, 6, 7, 1], **CHOSEN))
    tokens = session.tokens
    session.save(tmp_path / "s")
    saved = session_file.read(tmp_path / "s")
    state = {**saved.state, "source": np.array(ids, np.int64)}
    session_file.write(tmp_path / "s", dataclasses.replace(saved, state=state))
    with pytest.raises(FormatError, match="is not in the vocabulary of 128"):
        session.load(tmp_path / "s")
    assert session.tokens == tokens


def test_a_saved_answer_without_its_source_is_refused(model: Model, tmp_path: Path) -> None:
    session = model.session()
    list(session.generate([5, 6, 7, 1], **CHOSEN))
    session.save(tmp_path / "s")
    saved = session_file.read(tmp_path / "s")
    for source in ({}, {"source": np.empty(0, np.int64)}):
        state = {name: values for name, values in saved.state.items() if name != "source"} | source
        session_file.write(tmp_path / "s", dataclasses.replace(saved, state=state))
        with pytest.raises(FormatError, match="has an answer, and no source"):
            session.load(tmp_path / "s")


def test_a_model_without_an_encoder_takes_no_source_from_a_file(tmp_path: Path) -> None:
    with Model.load(write_tiny_model(tmp_path / "m.gguf"), threads=1, context=64) as plain:
        session = plain.session()
        list(session.generate([5, 6, 7], max_tokens=3))
        session.save(tmp_path / "s")
        saved = session_file.read(tmp_path / "s")
        state = {**saved.state, "source": np.array([1, 2], np.int64)}
        session_file.write(tmp_path / "s", dataclasses.replace(saved, state=state))
        with pytest.raises(FormatError, match="has a source, and the model no encoder"):
            session.load(tmp_path / "s")
