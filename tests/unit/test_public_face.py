"""What an app imports from `qrun.engine`: its names, its errors, its options with types; counts of tokens and bytes."""

import copy
import importlib
import inspect
import pickle
import pkgutil
import subprocess
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_fakes import FakeRuntime, ids_of, speaking
from test_model import make_model
from tiny_model import write_tiny_model

import qrun.engine
from qrun.engine import (
    Conversation,
    Generation,
    GenerationArguments,
    Model,
    QrunError,
    SamplingOptions,
    Session,
    keep_newest,
)
from qrun.engine.sampling.options import SamplingArguments


def test_every_public_name_is_there_and_its_type_is_known() -> None:
    for name in qrun.engine.__all__:
        assert getattr(qrun.engine, name).__name__ == name
    assert set(qrun.engine.__all__) == set(qrun.engine._MODULES)
    assert set(qrun.engine.__all__) <= set(dir(qrun.engine))


def own_errors() -> Iterator[type[Exception]]:
    """Every error that is defined in a module of the library under a name without an underscore."""
    for top in ("formats", "models", "engine"):
        package = importlib.import_module(f"qrun.{top}")
        for found in pkgutil.walk_packages(package.__path__, f"qrun.{top}."):
            if ".huggingface." in found.name or found.name.endswith(".catalog"):
                continue
            for name, value in vars(importlib.import_module(found.name)).items():
                own = inspect.isclass(value) and value.__module__ == found.name and not name.startswith("_")
                if own and issubclass(value, Exception) and not issubclass(value, Warning):
                    yield value


INTERNAL = {"NormalizerError", "NotPrivate", "TooSlow", "Unanswered"}
"""They become one of the others before a caller sees them."""


def test_one_error_stands_above_all_others() -> None:
    errors = {error.__name__: error for error in own_errors() if error.__name__ not in INTERNAL}
    assert {name for name, error in errors.items() if not issubclass(error, QrunError)} == set()
    assert len(errors) >= 9


@pytest.mark.parametrize(
    ("name", "former"),
    [
        ("FormatError", ValueError), ("ContextOverflow", ValueError), ("ChatTemplateError", ValueError),
        ("NotPulled", LookupError), ("PullError", RuntimeError), ("CompileError", RuntimeError),
        ("Closed", RuntimeError),
    ],
)  # fmt: skip
def test_errors_are_still_what_they_were(name: str, former: type[Exception]) -> None:
    assert issubclass(getattr(qrun.engine, name), former)


def test_the_options_with_types_are_those_that_there_are() -> None:
    fields = typing.get_type_hints(SamplingOptions)
    arguments = typing.get_type_hints(SamplingArguments)
    assert list(arguments) == list(fields)
    for name, kind in fields.items():
        texts = typing.get_origin(kind) is tuple
        assert arguments[name] == (str | Iterable[str] | None if texts else kind | None), name
    assert set(typing.get_type_hints(GenerationArguments)) == set(fields) | {"on_full", "lora"}


@pytest.mark.parametrize("method", [Model.chat, Model.generate, Model.complete, Session.generate])
def test_editors_see_the_options(method: Any) -> None:
    (options,) = [p for p in inspect.signature(method).parameters.values() if p.kind is p.VAR_KEYWORD]
    assert typing.get_origin(options.annotation) is typing.Unpack


def prompt_of(model: Any, generation: Generation) -> int:
    next(generation)
    return generation.stats.prompt_tokens


def test_tokens_are_counted_as_generate_and_chat_would_take_them() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    tool = {"type": "function", "function": {"name": "t"}}
    given: list[dict[str, Any]] = [
        {},
        {"tools": [tool], "template_variables": {"a": 1}, "special_tokens_in_messages": True, "think": True},
    ]
    for options in given:
        model = make_model()
        assert model.count_tokens(iter(messages), **options) == prompt_of(model, model.chat(messages, **options))
    assert model.count_tokens("say>") == prompt_of(model, model.generate("say>")) == 4
    assert model.count_tokens("") == 1  # the beginning of a text
    assert model.count_tokens("x" * 3000) == 3000  # more than the context
    before = model.count_tokens(messages)
    model.chat_system = "be kind"
    assert model.count_tokens(messages) == before + len("system: be kind\n")
    with pytest.raises(ValueError, match="no messages"):
        model.count_tokens([])
    with pytest.raises(ValueError, match="has no tokenizer"):
        make_model(has_tokenizer=False).count_tokens("a")


def test_a_model_is_not_handed_to_other_processes(tmp_path: Path) -> None:
    with Model.load(write_tiny_model(tmp_path / "model.gguf"), threads=1) as model, model.session() as session:
        for thing in (model, session, session.generate([5], max_tokens=1), model.tokenizer, Conversation(model)):
            with pytest.raises(TypeError, match=r"^a [A-Z]\w+ cannot be pickled or copied: load the model in each"):
                pickle.dumps(thing)
        with pytest.raises(TypeError, match="a Model cannot be pickled or copied"):
            copy.deepcopy(model)


def test_chat_s_own_options_may_be_none() -> None:
    model = make_model()
    model.chat_sampling = {"max_tokens": 2, "reasoning_budget": 0}
    generation = model.chat("Hi", max_tokens=None, temperature=None)
    assert "".join(generation) == "he"
    assert "{'think': False}" in bytes(token - 2 for token in model._runtime.evaluated[0][1:]).decode()


@pytest.mark.parametrize(
    ("options", "left"),
    [({}, [6, 7, 8, 9, 10]), ({"first": 2}, [0, 1, 8, 9, 10]), ({"newest": 3}, [8, 9, 10]),
     ({"newest": 3, "first": 1}, [0, 8, 9, 10]), ({"first": 9}, [*range(9), 10]), ({"first": 10}, None),
     ({"newest": 11}, None), ({"newest": 3, "first": 8}, None)],
)  # fmt: skip
def test_the_newest_are_kept(options: dict[str, int], left: list[int] | None) -> None:
    assert keep_newest(**options)(list(range(11))) == left


def test_what_cannot_be_kept_is_refused() -> None:
    for options, message in (({"newest": 0}, "newest must be at least 1"), ({"first": -1}, "first must be at least 0")):
        with pytest.raises(ValueError, match=message):
            keep_newest(**options)


WRONG = {
    "whole number": [1.5, "2", b"2", [], {}, object(), np.float32(2), np.zeros((2, 2)), True, float("nan")],
    "path": ["", 1.5, 2, [], object(), "a\0b", "\ud800", np.zeros(2)],
    "list": [2, "a.gguf", Path("a.gguf"), {"a": "b"}],
    "dictionary with names": [2, "a", ["a"], {1: "a"}],
    "function": [2, "print", []],
    "text": [None, 2, b"a", ["a"]],
}
LOADING = {
    "whole number": ("threads", "context", "batch", "cache_bytes", "cache_disk_bytes"),
    "path": ("source", "cache_disk", "draft", "kernels"),
    "list": ("loras",),
    "dictionary with names": ("adapters",),
    "function": ("progress", "converting", "notice"),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in LOADING.items() for name in names])
def test_wrong_arguments_of_load_are_named(kind: str, name: str) -> None:
    for value in WRONG[kind]:
        with pytest.raises(ValueError, match=f"^{name} must be an? {kind}, not .*$"):
            Model.load(**{"source": "nothing.gguf", name: value})


def test_adapters_are_paths_or_pairs() -> None:
    for value in (2, ["a"], ("a",), ("a", "b"), ("a", "b", 1.0), None):
        with pytest.raises(ValueError, match="an adapter is a path, or a path and a scale, not "):
            Model.load("nothing.gguf", loras=[value])
    with pytest.raises(ValueError, match="the scale of an adapter is a finite number, not nan"):
        Model.load("nothing.gguf", loras=[("a.gguf", float("nan"))])


@pytest.mark.parametrize(
    ("name", "kind", "call"),
    [
        ("text", "text", lambda model, value: model.tokenize(value)),
        ("text", "text", lambda model, value: model.template_tokens(value)),
        ("query", "text", lambda model, value: model.pair_tokens(value, "b")),
        ("document", "text", lambda model, value: model.pair_tokens("a", value)),
        ("top", "whole number", lambda model, value: model.prompt_logprobs([3, 4], top=value)),
        ("template_variables", "dictionary with names", lambda model, value: model.chat("a", template_variables=value)),
        ("path", "path", lambda model, value: model.session().load(value)),
        ("path", "path", lambda model, value: model.session().save(value)),
        ("first", "whole number", lambda model, value: keep_newest(first=value)),
        ("newest", "whole number", lambda model, value: keep_newest(value)),
    ],
)
def test_wrong_arguments_are_named(name: str, kind: str, call: Callable[[Model, Any], object]) -> None:
    model = make_model()
    for value in WRONG[kind]:
        with pytest.raises(ValueError, match=f"^{name} must be an? {kind}, not .*$"):
            call(model, value)


def test_numbers_of_numpy_are_whole_numbers(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.gguf")
    with Model.load(path, threads=np.int64(1), context=np.int32(48), batch=np.uint8(16)) as model:
        assert (model.threads, model.context) == (1, 48)
        assert model.logits([1, 2]).shape == (2, 128)


def test_a_text_goes_on_beyond_the_context() -> None:
    runtime = FakeRuntime(lambda held: ids_of("abcdefgh")[len(held) % 8], context=20)
    generation = make_model(runtime).generate("a prompt", on_full=keep_newest(first=3), max_tokens=60)
    assert len("".join(generation)) == 60 and generation.stop_reason == "length"
    beginnings = [bytes(t - 2 for t in tokens) for tokens in runtime.evaluated if len(tokens) > 1]
    assert beginnings[0] == b"a prompt" and beginnings[1] == b"ghabcde"  # after "a p"
    model = make_model(FakeRuntime(speaking(*ids_of("hello there")), context=8))
    generation = model.generate("a prompt", on_full=keep_newest(first=100))
    list(generation)
    assert generation.stop_reason == "context"


def test_what_a_model_takes_of_memory(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf")
    with Model.load(path, threads=1, context=64, cache_bytes=1 << 24) as model:
        before = model.memory()
        assert before.file == path.stat().st_size
        assert 0 < before.weights <= before.file
        assert before.arena > 0 and before.cache_used == 0
        assert before.cache_limit == 1 << 24
        session = model.session()
        list(session.generate([1, 2, 3], max_tokens=4))
        during = model.memory()
        assert 0 < during.cache_used <= during.cache
        assert during.total == during.weights + during.arena + during.cache
        session.close()
        assert model.memory().cache_used == 0
        assert model.memory().cache == during.cache  # kept for the next
        alone = model.memory()
    with Model.load(path, threads=1, context=64, draft=path) as model:
        assert model.memory().weights == 2 * alone.weights


TYPED_RIGHT = """
from pathlib import Path
from qrun.engine import Conversation, Generation, Model, keep_newest

with Model.load(Path("m.gguf"), context=100, cache_type="q8_0", progress=lambda done, total: None) as model:
    generation: Generation = model.chat("Hi", temperature=0.5, stop="x", on_full=keep_newest(3), max_tokens=None)
    for piece in generation:
        text: str = piece
        channel: str = piece.channel
    model.chat([{"role": "user", "content": "Hi"}], tools=[{"type": "function"}], think=False, schema={})
    talk = Conversation(model, "Be kind.", {"temperature": 0.3, "stop": ["a", "b"]})
    answer: str = "".join(talk.answer("Why?")) + model.complete([1, 2], seed=1)
    total: int = model.memory().total + model.count_tokens("x")
"""
TYPED_WRONG = """
from qrun.engine import Conversation, Model, SamplingOptions

model = Model.load("x", contex=3)
model = Model.load(3)
model = Model.load("x", cache_type="f61")
model.chat("Hi", temprature=0.5)
model.chat("Hi", temperature="hot")
model.generate("Hi", stop=3)
model.complete("Hi", on_full=3)
count: str = model.count_tokens("x")
model.memory().totl
Conversation(model, "Be kind.", {"temprature": 0.3})
Conversation(model, "Be kind.", {"temperature": "hot"})
SamplingOptions(temprature=1)
model.session().generate([1], max_tokenss=3)
"""


@pytest.mark.slow  # the type checker reads the whole library
def test_a_type_checker_knows_right_from_wrong(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    root = Path(__file__).parents[2]
    for name, program in (("right", TYPED_RIGHT), ("wrong", TYPED_WRONG)):
        (tmp_path / f"{name}.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", "--follow-imports=silent",
         str(tmp_path / "right.py"), str(tmp_path / "wrong.py")],
        cwd=root, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    found = {int(line.split(":")[1]) for line in errors if "wrong.py:" in line}
    wrong = {number for number, line in enumerate(TYPED_WRONG.splitlines(), 1) if line and "import" not in line}
    assert not [line for line in errors if "wrong.py:" not in line] and not done.stderr
    assert found == wrong, wrong - found
