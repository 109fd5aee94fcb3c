"""The public face: prompts in, text out, from any thread, until it is closed."""

import dataclasses
import hashlib
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_fakes import BOS, FakeRuntime, FakeTokenizer, ids_of, speaking

import qrun.engine
from qrun.engine.errors import Closed, ContextOverflow
from qrun.engine.generation.generation import Generation
from qrun.engine.generation.session_file import model_fingerprint
from qrun.engine.model import Model
from qrun.engine.text.response_formats import ResponseFormat
from qrun.formats.samples import samples
from qrun.models.catalog import CATALOG, DEFAULT_MODEL


class FakeTemplate:
    is_fallback = False
    format = ResponseFormat()

    def render(self, messages: list[dict[str, str]], tools: Any = None, **variables: Any) -> str:
        assert variables.pop("add_generation_prompt")
        extra = f"{tools or ''}{variables or ''}"
        return "<s>" + "".join(f"{m['role']}: {m['content']}\n" for m in messages) + extra + ">"

    def response(self, prompt: str, tools: Any = None) -> None:
        return None


class FakeReader:
    def __init__(self, metadata: dict[str, Any] | None = None, files: tuple[Path, ...] = ()) -> None:
        self.metadata = metadata or {}
        self.files = files
        self.tensors: dict[str, Any] = {}
        self.closed = False

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeGraph:
    architecture = "fake"
    encoder = None
    n_vocab = 266
    n_embd = 4
    cache_layers = ()
    context_length: int = 200
    operations: list[Any] = field(default_factory=lambda: ["one"])
    embeds: bool = False
    causal: bool = True
    encoder: None = None


def make_model(
    runtime: FakeRuntime | None = None,
    tokenizer: FakeTokenizer | None = None,
    metadata: dict[str, Any] | None = None,
    has_tokenizer: bool = True,
    path: Path = Path("/models/fake.gguf"),
) -> Any:
    model: Any = Model(
        path,
        FakeReader({"general.sampling.temp": 0.0} | (metadata or {})),  # type: ignore[arg-type]
        FakeGraph(),  # type: ignore[arg-type]
        runtime or FakeRuntime(speaking(*ids_of("hello there"))),  # type: ignore[arg-type]
        (tokenizer or FakeTokenizer()) if has_tokenizer else None,  # type: ignore[arg-type]
        None if has_tokenizer else "fake.gguf: the file has no tokenizer",
    )
    if has_tokenizer:
        model.chat_template = FakeTemplate()
    return model


def evaluated(model: Any) -> list[str]:
    return [bytes(token - 2 for token in tokens if token != BOS).decode() for tokens in model._runtime.evaluated]


def test_complete() -> None:
    assert make_model().complete("say>") == "hello there"
    assert make_model().complete(ids_of("say>"), max_tokens=5) == "hello"


def test_generate_streams() -> None:
    generation = make_model().generate("say>", max_tokens=2)
    assert isinstance(generation, Generation)
    assert list(generation) == ["h", "e"]


def test_defaults_come_from_the_file() -> None:
    assert make_model(metadata={"general.sampling.top_k": 7}).defaults.top_k == 7


def test_chat_renders_the_conversation() -> None:
    model = make_model()
    generation = model.chat([{"role": "user", "content": "Hi"}], tools=[{"name": "t"}], template_variables={"think": 1})
    assert "".join(generation) == "hello there"
    assert evaluated(model)[0] == "user: Hi\n[{'name': 't'}]{'think': 1}>"


def test_chat_with_a_text_is_a_question() -> None:
    model = make_model()
    assert "".join(model.chat("Hi")) == "hello there"
    assert evaluated(model)[0] == "user: Hi\n>"


def test_chat_says_what_messages_are() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="no messages"):
        model.chat([])
    with pytest.raises(TypeError, match=r"messages\[0\] is of type str"):
        model.chat(["Hi"])


def test_special_tokens_in_messages_are_an_option() -> None:
    model = make_model()
    assert "".join(model.chat("Hi", special_tokens_in_messages=True)) == "hello there"
    assert evaluated(model)[0] == "user: Hi\n{'special_tokens_in_messages': True}>"
def test_chat_begins_with_the_settings_of_the_catalog_where_the_caller_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "renamed.gguf"
    path.write_bytes(b"a model of the catalog")
    digest = hashlib.sha256(b"".join(samples(path))).hexdigest()
    entry = dataclasses.replace(
        CATALOG[DEFAULT_MODEL], size=path.stat().st_size, samples=digest, system="be kind", sampling={"max_tokens": 2}
    )
    monkeypatch.setitem(CATALOG, entry.name, entry)
    user, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": ""}
    model = make_model(path=path)
    assert "".join(model.chat([user])) == "he"
    assert evaluated(model)[0] == "system: be kind\nuser: Hi\n>"
    assert "".join(model.chat([user], max_tokens=None)) == "he"
    model = make_model(path=path)
    assert "".join(model.chat([system, user], max_tokens=3)) == "hel"
    assert evaluated(model)[0] == "system: \nuser: Hi\n>"
    assert model.complete("say>") == "hello there"
    path.write_bytes(b"another model altogethe")
    assert "".join(make_model(path=path).chat([user])) == "hello there"


def test_a_context_beyond_what_the_model_was_trained_for_has_a_notice() -> None:
    model = make_model(FakeRuntime(context=200))
    assert model.context_notice is None
    model.graph.context_length = 199
    assert "200 tokens" in model.context_notice and "trained for 199" in model.context_notice


@pytest.mark.parametrize("add_bos", [False, True])
def test_a_template_that_writes_bos_gets_no_second_one(add_bos: bool) -> None:
    tokenizer = FakeTokenizer()
    tokenizer.add_bos = add_bos
    model = make_model(tokenizer=tokenizer)
    assert model.template_tokens("<s>hi") == [BOS, *ids_of("hi")]
    assert model.template_tokens("hi") == [BOS] * add_bos + ids_of("hi")


def test_the_notice_of_a_missing_template() -> None:
    model = make_model()
    assert model.chat_notice is None
    model.chat_template.is_fallback = True
    assert model.chat_notice.startswith("fake.gguf has no chat template")
    assert make_model(has_tokenizer=False).chat_notice is None


def test_a_second_turn_computes_only_what_is_new() -> None:
    model = make_model()
    messages = [{"role": "user", "content": "Hi"}]
    answer = "".join(model.chat(messages))
    model._runtime.evaluated.clear()
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "More"}]
    generation = model.chat(messages)
    next(generation)
    assert evaluated(model) == ["assistant: hello there\nuser: More\n>"]


def test_generations_side_by_side_have_a_session_each() -> None:
    model = make_model()
    first, second = model.generate("a>"), model.generate("b>")
    pieces = [piece for pair in zip(first, second, strict=True) for piece in pair]
    assert "".join(pieces[::2]) == "".join(pieces[1::2]) == "hello there"
    # The next prompt takes what is known of its beginning.
    third = model.generate("a>hello there you>")
    next(third)
    assert third.stats.cached_tokens == len("a>hello there")


def test_a_generation_that_was_dropped_frees_its_session() -> None:
    model = make_model()
    for _ in range(3):
        for _ in model.generate("a>"):
            break
    assert len(model._pool) == 1


def test_a_generation_that_has_ended_frees_its_session_at_once() -> None:
    model = make_model()
    generation = model.generate("a>")
    assert "".join(generation) == "hello there"
    assert model._pool == set()


def test_completing_from_two_threads() -> None:
    model = make_model()
    results: list[str] = []
    threads = [
        threading.Thread(target=lambda name=name: results.extend(model.complete(f"{name}{i}>") for i in range(25)))
        for name in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["hello there"] * 50


def test_logits() -> None:
    runtime = FakeRuntime(batch=2)
    model = make_model(runtime)
    logits = model.logits(ids_of("abc"))
    assert (logits.shape, logits.dtype) == ((3, 266), np.float32)
    assert np.array_equal(logits[1], runtime.logits_after(ids_of("ab")))
    assert runtime.sequences[0].closed
    for tokens, message in [([], "empty"), ([266], "token 266"), ([1] * 201, "201 tokens, and the context holds 200")]:
        with pytest.raises(ValueError, match=message):
            model.logits(tokens)


def test_tokenize_and_detokenize() -> None:
    tokenizer = FakeTokenizer()
    tokenizer.add_bos = True
    model = make_model(tokenizer=tokenizer)
    assert model.tokenize("é") == [BOS, *ids_of("é")]
    assert model.tokenize("é", add_special=False) == ids_of("é")
    assert model.tokenize("<s>", add_special=False, parse_special=True) == [BOS]
    assert model.detokenize(np.array(ids_of("é"))) == "é"


def test_an_empty_prompt_begins_with_bos_if_there_is_one() -> None:
    tokenizer = FakeTokenizer()
    model = make_model(tokenizer=tokenizer)
    model.complete("", max_tokens=0)
    assert model._runtime.evaluated == [[BOS]]
    tokenizer.bos_id = None
    with pytest.raises(ValueError, match="the prompt is empty"):
        model.complete("")


def test_a_prompt_longer_than_the_context() -> None:
    with pytest.raises(ContextOverflow, match="201 tokens, and the context holds 200"):
        make_model().complete("a" * 201)


def test_unknown_options_are_type_errors() -> None:
    model = make_model()
    for call in (model.complete, model.generate):
        with pytest.raises(TypeError, match="unknown option 'topp'; did you mean 'top_p'"):
            call("a", topp=1)
    with pytest.raises(TypeError, match="did you mean 'max_tokens'"):
        model.chat([{"role": "user", "content": ""}], max_token=1)


def test_a_model_without_a_tokenizer_takes_token_ids() -> None:
    model = make_model(has_tokenizer=False)
    generation = model.generate(ids_of("a>"), max_tokens=3)
    assert list(generation) == ["", "", ""]
    assert generation.tokens == ids_of("hel")
    assert model.logits([1, 2]).shape == (2, 266)
    assert model.chat_template is None
    for call in (
        lambda: model.complete("a"),
        lambda: model.chat([]),
        lambda: model.tokenize("a"),
        lambda: model.detokenize([1]),
    ):
        with pytest.raises(ValueError, match=r"^fake.gguf: the file has no tokenizer$"):
            call()


def test_stop_ends_all_generations() -> None:
    model = make_model()
    session = model.session()
    generations = [model.generate("a>"), model.generate("b>"), session.fork().generate(ids_of("c>"))]
    for generation in generations:
        next(generation)
    model.stop()
    assert [list(generation) for generation in generations] == [[], [], []]
    assert {generation.stop_reason for generation in generations} == {"cancelled"}
    assert model.complete("a>") == "hello there"


def test_close_frees_everything_and_says_so_afterwards() -> None:
    model = make_model()
    session = model.session()
    fork = session.fork()
    model.complete("a>")
    generation = model.generate("b>")
    next(generation)
    model.close()
    model.close()
    model.stop()
    assert model._runtime.closed and model.reader.closed
    assert session.closed and fork.closed
    assert model.graph.operations == [], "the weights can go"
    assert model.tokenizer is None and model.chat_template is None
    assert model.graph.n_vocab == 266
    assert list(generation) == []
    for call in (
        lambda: model.complete("a"),
        lambda: model.generate([1]),
        lambda: model.chat([]),
        lambda: model.logits([1]),
        lambda: model.tokenize("a"),
        lambda: model.detokenize([1]),
        lambda: model.template_tokens("a"),
        lambda: model.count_tokens("a"),
        model.memory,
        model.session,
    ):
        with pytest.raises(Closed, match=r"^fake.gguf: the model is closed$"):
            call()
    with pytest.raises(RuntimeError, match="the session is closed, or its model"):
        session.generate([1])


def test_close_from_another_thread_waits_for_the_step_under_way() -> None:
    runtime = FakeRuntime(speaking(*ids_of("hello there")))
    model = make_model(runtime)
    in_step, closing = threading.Event(), threading.Event()
    closer = threading.Thread(target=lambda: (closing.set(), model.close()))

    def on_batch() -> None:
        if not in_step.is_set():
            in_step.set()
            closer.start()
            assert closing.wait(60)
            assert not runtime.closed

    generation = model.generate("a long prompt>")
    runtime.on_batch = on_batch
    assert list(generation) == []
    assert generation.stop_reason == "cancelled"
    closer.join(60)
    assert runtime.closed


def test_a_model_can_be_used_in_a_with_statement() -> None:
    with make_model() as model:
        assert model.complete("a>", max_tokens=1) == "h"
    assert model._runtime.closed


@pytest.mark.parametrize("argument", ["threads", "context", "batch"])
def test_load_refuses_wrong_numbers(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} must be at least 1, not 0"):
        Model.load("nothing.gguf", **{argument: 0})


def test_a_fingerprint_tells_files_apart_wherever_they_lie(tmp_path: Path) -> None:
    data = bytearray(np.random.default_rng(0).bytes(1_000_000))

    def fingerprint(name: str) -> str:
        (tmp_path / name).write_bytes(data)
        return model_fingerprint([tmp_path / name], "a model")

    first = fingerprint("a")
    assert fingerprint("b") == first
    assert model_fingerprint([tmp_path / "a"], "another model") != first
    data[500_000:520_000] = bytes(20_000)
    assert fingerprint("b") != first


def test_importing_the_engine_imports_nothing_heavy() -> None:
    program = (
        "import sys, qrun.engine; qrun.engine.SamplingOptions; from qrun.engine import ContextOverflow\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} & "
        "{'numpy', 'numba', 'jinja2', 'tokenizers', 'sentencepiece', 'rich', 'click'}))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_the_public_names_are_there() -> None:
    for name in ("Model", "Session", "Piece", "SamplingOptions", "Generation", "GenerationStats"):
        assert getattr(qrun.engine, name).__name__ == name
        assert name in dir(qrun.engine)
    with pytest.raises(AttributeError, match="no attribute 'Modle'"):
        qrun.engine.Modle  # type: ignore[attr-defined]  # noqa: B018
