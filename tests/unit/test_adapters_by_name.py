"""Adapters that each text asks for: as if they were merged, beside texts without, which keep their bits."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import matrices, merged_model, random_pair, write_adapter
from asgi_client import call
from test_adapter import LLAMA, error_of, random_adapter
from tiny_model import write_tiny_model

from qrun.engine import Model
from qrun.formats import FormatError
from qrun.server import app

ARCHITECTURES = Path(__file__).parents[1] / "data" / "arch"


def dense(model: Path) -> list[str]:
    """The matrices that can be changed for some texts."""
    return [name for name, shape in matrices(model).items() if len(shape) == 2 and name != "token_embd.weight"]


@pytest.fixture
def files(rng: np.random.Generator, tmp_path: Path) -> dict[str, Path]:
    names = dense(LLAMA)
    return {
        "poet": random_adapter(rng, LLAMA, tmp_path / "poet.gguf", names=names),
        "clerk": random_adapter(rng, LLAMA, tmp_path / "clerk.gguf", names=names[1::2]),
    }


@pytest.fixture
def model(files: dict[str, Path]) -> Iterator[Model]:
    with Model.load(LLAMA, threads=2, context=256, batch=64, adapters=files) as model:
        yield model


def random_tokens(rng: np.random.Generator, n: int) -> list[int]:
    found: list[int] = rng.integers(0, 100, n).tolist()
    return found


@pytest.mark.parametrize("stem", ["llama-dense", "gemma2-dense", "qwen2-dense", "phi3-dense"])
def test_logits_are_those_of_the_merged_model(stem: str, rng: np.random.Generator, tmp_path: Path) -> None:
    path = ARCHITECTURES / f"{stem}.gguf"
    adapters = {
        name: random_adapter(rng, path, tmp_path / f"{name}.gguf", names=dense(path)[i::2])
        for i, name in enumerate("ab")
    }
    tokens = random_tokens(rng, 40)
    with Model.load(path, threads=2, context=64, adapters=adapters) as model:
        plain = model.logits(tokens)
        for chosen in ({"a": 1.0}, {"b": -0.7}, {"a": 0.5, "b": 1.0}):
            files = [(adapters[name], scale) for name, scale in chosen.items()]
            with Model.load(merged_model(path, tmp_path / "merged.gguf", files), threads=1, context=64) as merged:
                expected = merged.logits(tokens)
            assert error_of(model.logits(tokens, lora=chosen), expected) <= 1e-6
            assert error_of(plain, expected) > 1e-4
        with Model.load(path, threads=1, context=64) as alone:
            assert np.array_equal(alone.logits(tokens), plain)


def test_bits_do_not_depend_on_who_else_is_in_the_step(model: Model, rng: np.random.Generator) -> None:
    choices: list[Any] = [None, "poet", "clerk", {"poet": 0.5, "clerk": 2.0}, None, ["clerk"]]
    jobs = [(random_tokens(rng, 10 + 7 * i), choice) for i, choice in enumerate(choices * 2)]

    def told(prompt: list[int], choice: Any, among: Model) -> tuple[list[int], list[float | None]]:
        generation = among.generate(prompt, lora=choice, max_tokens=12, temperature=1.0, seed=3)
        logprobs = [piece.logprob for piece in generation]
        return generation.tokens, logprobs

    alone = [told(*job, model) for job in jobs]
    model._host.prefixes.clear()
    together: list[Any] = [None] * len(jobs)

    def run(i: int) -> None:
        together[i] = told(*jobs[i], model)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    with Model.load(LLAMA, threads=1, context=256) as without:
        for (prompt, choice), expected in zip(jobs, alone, strict=True):
            assert choice is not None or told(prompt, None, without) == expected


def test_what_was_computed_with_others_is_not_gone_on_from(model: Model, rng: np.random.Generator) -> None:
    prompt = random_tokens(rng, 100)
    cached = {}
    for choice in (None, "poet", "clerk", {"poet": 0.5}, "poet", None, {"poet": 1.0, "clerk": 0.0}, ["poet", "clerk"]):
        generation = model.generate(prompt, lora=choice, max_tokens=2, temperature=0)
        list(generation)
        cached[repr(choice)] = generation.stats.cached_tokens
    assert cached == {
        "None": 99, "'poet'": 99, "'clerk'": 0, "{'poet': 0.5}": 0, "{'poet': 1.0, 'clerk': 0.0}": 99,
        "['poet', 'clerk']": 0,
    }  # fmt: skip


def test_a_session_changes_its_adapters(model: Model, rng: np.random.Generator, tmp_path: Path) -> None:
    prompt = random_tokens(rng, 50)

    def tokens(choice: Any, session: Any) -> list[int]:
        generation = session.generate(prompt, lora=choice, max_tokens=5, temperature=0, lookup=True)
        list(generation)
        return generation.tokens

    choices = (None, "poet", "clerk", None, "poet")
    with model.session() as session:
        first = [tokens(choice, session) for choice in choices]
        assert first == [tokens(choice, model) for choice in choices]
        session.save(tmp_path / "saved")
    with model.session() as session:
        session.load(tmp_path / "saved")
        again = session.generate(prompt, lora="poet", max_tokens=5, temperature=0)
        list(again)
        assert (again.tokens, again.stats.cached_tokens) == (first[1], 49)
    with Model.load(LLAMA, threads=1, context=256) as other:
        session = other.session()
        with pytest.raises(FormatError, match="adapters that are not loaded: poet"):
            session.load(tmp_path / "saved")


def test_prefixes_on_disk_are_kept_apart(files: dict[str, Path], tmp_path: Path, rng: np.random.Generator) -> None:
    prompt = random_tokens(rng, 200)
    for chosen in (None, "poet", "clerk"):
        for expected in (0, 199):
            names = dict(reversed(files.items())) if expected else files  # their numbers do not matter
            with Model.load(LLAMA, threads=1, context=256, adapters=names, cache_disk=tmp_path / "kept") as model:
                assert model._host.prefixes.disk is not None
                model._host.prefixes.disk.worth = 64
                generation = model.generate(prompt, lora=chosen, max_tokens=3, temperature=0)
                list(generation)
                assert generation.stats.cached_tokens == expected


@pytest.mark.parametrize("wrong", ["nobody", 2, -1, True, 1.5, {"poet": "x"}, {"poet": float("nan")}, {"poet": 1e300}])
def test_what_is_not_there_cannot_be_asked_for(model: Model, wrong: Any) -> None:
    with pytest.raises(ValueError, match="lora"):
        model.generate([1, 2, 3], lora=wrong)


@pytest.mark.parametrize("stem", ["llama-dense", "llama-moe"])
def test_what_cannot_be_switched_is_refused(stem: str, rng: np.random.Generator, tmp_path: Path) -> None:
    path = ARCHITECTURES / f"{stem}.gguf"
    name = "token_embd.weight" if stem == "llama-dense" else "blk.0.ffn_up_exps.weight"
    adapter = write_adapter(tmp_path / "a.gguf", {name: random_pair(rng, name, matrices(path)[name], 4)})
    with pytest.raises(FormatError, match=rf"a\.gguf: tensor '{name}' is changed.*for all texts alike only"):
        Model.load(path, threads=1, context=64, adapters={"a": adapter})
    other = write_adapter(tmp_path / "b.gguf", {"output.weight": random_pair(rng, "output.weight", (7, 9), 4)})
    with pytest.raises(FormatError, match=r"b\.gguf: .*adapter of another model"):
        Model.load(path, threads=1, context=64, adapters={"b": other})


# Over HTTP

SEED = 1


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Any]:
    rng = np.random.default_rng(SEED)  # adapters of which each changes the answer to everything that is asked here
    path = write_tiny_model(tmp_path / "tiny.gguf")
    names = ("poet", "clerk")
    files = {name: random_adapter(rng, path, tmp_path / f"{name}.gguf", names=dense(path)) for name in names}
    with Model.load(path, threads=1, context=128, adapters=files) as model:
        yield app(model), model


def complete(served: Any, path: str = "/v1/completions", **body: Any) -> Any:
    body = {"prompt": "a cold day", "max_tokens": 8, "temperature": 0, "logprobs": 0, "echo": True} | body
    return call(served, "POST", path, body)


def test_requests_name_an_adapter_or_its_number(served: Any) -> None:
    application, model = served
    tokens = model.tokenize("a cold day")

    def expected(lora: Any) -> list[float | None]:
        values = [one and one.logprob for one in model.prompt_logprobs(tokens, lora=lora)]
        generation = model.generate(tokens, lora=lora, max_tokens=8, temperature=0)
        return [*values, *(piece.logprob for piece in generation if piece.token is not None)]

    for body, lora in (
        ({}, None), ({"model": "tiny"}, None), ({"model": "poet"}, "poet"), ({"model": "clerk"}, "clerk"),
        ({"lora": [{"id": 0, "scale": 1.0}]}, "poet"), ({"lora": [{"id": 1}]}, "clerk"), ({"lora": "clerk"}, "clerk"),
        ({"lora": [{"id": 0, "scale": 0.5}, {"id": 1, "scale": -1}]}, {"poet": 0.5, "clerk": -1.0}),
        ({"lora": {"poet": 2}}, {"poet": 2.0}), ({"lora": [{"id": 0, "scale": 0}]}, None), ({"lora": []}, None),
        ({"model": "poet", "lora": [{"name": "clerk"}]}, "clerk"),
    ):  # fmt: skip
        told = complete(application, **body).json()["choices"][0]["logprobs"]["token_logprobs"]
        assert told == pytest.approx(expected(lora)), body
    assert expected(None) != expected("poet") != expected("clerk")


def test_every_interface_takes_adapters(served: Any) -> None:
    application, _ = served
    messages = [{"role": "user", "content": "a cold day"}]
    for path, body in {
        "/v1/chat/completions": {"messages": messages, "max_tokens": 8},
        "/v1/messages": {"messages": messages, "max_tokens": 8},
        "/v1/responses": {"input": "a cold day", "max_output_tokens": 8},
        "/api/chat": {"messages": messages, "options": {"num_predict": 8, "temperature": 0}, "stream": False},
        "/api/generate": {"prompt": "a cold day", "options": {"num_predict": 8, "temperature": 0}, "stream": False},
        "/completion": {"prompt": "a cold day", "n_predict": 8},
    }.items():
        said = []
        for model in ("tiny", "poet"):
            told = call(application, "POST", path, {"temperature": 0, "model": model} | body)
            assert told.status == 200, told.text
            parts = [told.json().get(name) for name in ("choices", "content", "output", "message", "response")]
            said.append(re.sub(r"'id': '[^']*'", "", repr(parts)))
        assert said[0] != said[1], path


def test_adapters_are_listed(served: Any) -> None:
    application, _ = served
    told = call(application, "GET", "/v1/models").json()["data"]
    assert [(one["id"], one.get("parent")) for one in told] == [("tiny", None), ("poet", "tiny"), ("clerk", "tiny")]
    assert all(one["max_model_len"] == 128 for one in told)
    assert call(application, "GET", "/v1/models/clerk").json()["id"] == "clerk"
    assert call(application, "GET", "/v1/models/nobody").status == 404
    found = call(application, "GET", "/lora-adapters").json()
    assert [(one["id"], one["name"], one["scale"]) for one in found] == [(0, "poet", 0.0), (1, "clerk", 0.0)]


@pytest.mark.parametrize("wrong", [7, [7], [{}], [{"id": 5}], [{"id": "x"}], [{"id": 0, "scale": "x"}], "x", {"x": 1}])
def test_wrong_adapters_are_the_clients_fault(served: Any, wrong: Any) -> None:
    answer = complete(served[0], lora=wrong)
    assert answer.status == 400 and "lora" in answer.json()["error"]["message"]
