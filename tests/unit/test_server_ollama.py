"""Ollama's interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from asgi_client import Answer, call
from server_fakes import make_model
from tiny_model import write_tiny_model

from qrun.engine import Model
from qrun.models import store
from qrun.server import app

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


def ask(model: Any = None, path: str = "/api/chat", **body: Any) -> Answer:
    given: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
    if path == "/api/generate":
        given = {"model": "m", "prompt": "Hi"}
    return call(app(model or make_model()), "POST", path, given | body)


def test_a_chat_is_a_stream_of_lines() -> None:
    answer = ask()
    assert answer.headers["content-type"] == "application/x-ndjson"
    *lines, last = answer.lines
    assert "".join(line["message"]["content"] for line in lines) == "Hello there."
    assert not any(line["done"] for line in lines)
    assert last["done"] and last["done_reason"] == "stop" and last["message"]["content"] == ""
    assert last["prompt_eval_count"] == len("(u)Hi~") and last["eval_count"] == len("Hello there.")
    assert isinstance(last["total_duration"], int) and last["created_at"].endswith("Z")


def test_a_chat_in_one() -> None:
    told = ask(stream=False, options={"num_predict": 5, "num_ctx": 2048}).json()
    assert (told["message"]["content"], told["done"], told["done_reason"]) == ("Hello", True, "length")


def test_calls_and_thoughts() -> None:
    told = ask(make_model(f"<think>Hm.</think>{CALL}"), stream=False, tools=[TOOL]).json()["message"]
    assert told["thinking"] == "Hm."
    assert told["tool_calls"][0]["function"]["arguments"] == {"city": "Köln"}
    lines = ask(make_model(f"<think>Hm.</think>{CALL}"), tools=[TOOL]).lines
    assert "".join(line["message"].get("thinking", "") for line in lines) == "Hm."
    calls = [one for line in lines for one in line["message"].get("tool_calls", ())]
    assert [one["function"]["name"] for one in calls] == ["weather"]


def test_think() -> None:
    model = make_model(lambda before: "off" if "</think>" in before else "on")
    assert ask(model, stream=False, think=False).json()["message"]["content"] == "off"
    assert ask(model, stream=False, think="high").json()["message"]["content"] == "on"


def test_conversations_of_theirs() -> None:
    messages = [
        {"role": "system", "content": "S"}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {"x": 1}}}]},
        {"role": "tool", "tool_name": "weather", "content": "rain"}, {"role": "user", "content": "b"},
    ]  # fmt: skip
    told = ask(make_model(lambda before: before), messages=messages, stream=False).json()
    call = '<tool_call>\n{"name": "weather", "arguments": {"x": 1}}\n</tool_call>'
    assert told["message"]["content"] == f"(s)S(u)a(a){call}(t)rain(u)b"


def test_generate() -> None:
    model = make_model(lambda before: before.upper())
    told = ask(model, "/api/generate", stream=False, system="s").json()
    assert told["response"] == "(S)S(U)HI" and told["done"] and "message" not in told
    assert ask(model, "/api/generate", stream=False, raw=True, prompt="ab~").json()["response"] == "AB"
    lines = ask(model, "/api/generate").lines
    assert "".join(line["response"] for line in lines) == "(U)HI"


def test_a_question_for_nothing_loads_the_model() -> None:
    for path, field in (("/api/chat", "messages"), ("/api/generate", "prompt")):
        told = ask(None, path, **{field: None}).json()
        assert told["done"] and told["done_reason"] == "load"


@pytest.mark.parametrize(
    "body",
    [{"messages": [{"role": "user", "content": "x", "images": ["AAAA"]}]}, {"format": "xml"},
     {"format": {"type": "nothing"}}, {"options": 3}, {"options": {"temperature": "hot"}}, {"keep_alive": "soon"},
     {"messages": [3]}, {"messages": [{"role": "user", "content": "x" * 500}]}],
)  # fmt: skip
def test_errors_are_one_text(body: dict[str, Any]) -> None:
    answer = ask(**body)
    assert answer.status == 400 and isinstance(answer.json()["error"], str)


def test_what_is_not_here() -> None:
    for path in ("/api/create", "/api/push", "/api/copy"):
        assert ask(None, path).status == 501


def test_who_asks_whether_it_runs() -> None:
    served = app(make_model())
    assert call(served, "GET", "/").text == "Ollama is running"
    answer = call(served, "HEAD", "/")
    assert answer.status == 200 and answer.body == b""
    major, minor, _ = call(served, "GET", "/api/version").json()["version"].split(".")
    assert (int(major), int(minor)) >= (0, 6)


# Models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_model(tmp_path / "one.gguf")
    (tmp_path / "sub").mkdir()
    write_tiny_model(tmp_path / "sub" / "two.gguf")
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF?")
    return tmp_path


def load(source: Any) -> Model:
    return Model.load(source, threads=1, context=64)


def test_what_there_is(folder: Path) -> None:
    served = app(models_dir=folder, load=load)
    models = {one["name"]: one for one in call(served, "GET", "/api/tags").json()["models"]}
    assert set(models) == {"one", "sub/two", "damaged"}
    assert models["one"]["details"]["family"] == "llama" and models["one"]["size"] > 1000
    assert models["one"]["digest"] != models["sub/two"]["digest"]
    told = call(served, "POST", "/api/show", {"model": "one:latest"}).json()
    assert told["model_info"]["general.architecture"] == "llama" and told["model_info"]["llama.context_length"] > 0
    assert "completion" in told["capabilities"]
    assert call(served, "GET", "/api/ps").json() == {"models": []}
    told = call(served, "GET", "/api/v0/models").json()["data"]
    assert {one["id"] for one in told} == set(models) and told[0]["state"] == "not-loaded"
    assert call(served, "POST", "/api/show", {"model": "three"}).status == 404


def test_the_store_is_closed_unless_it_was_opened(folder: Path) -> None:
    served = app(models_dir=folder, load=load)
    for method, path in (("POST", "/api/pull"), ("DELETE", "/api/delete")):
        answer = call(served, method, path, {"model": "one"})
        assert answer.status == 403 and "--store" in answer.json()["error"]
    assert (folder / "one.gguf").is_file()


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QRUN_HOME", str(tmp_path))
    models = store.models_folder()
    models.mkdir(parents=True)
    write_tiny_model(models / "kept.gguf")
    write_tiny_model(models / "gone.gguf")
    return models


def test_deleting(stored: Path) -> None:
    served = app(with_store=True, load=load)
    assert call(served, "DELETE", "/api/delete", {"model": "nothing"}).status == 404
    assert call(served, "DELETE", "/api/delete", {"model": "gone"}).status == 200
    assert [path.name for path in stored.glob("*.gguf")] == ["kept.gguf"]
    assert [one["name"] for one in call(served, "GET", "/api/tags").json()["models"]] == ["kept"]


def test_pulling(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qrun.models import download

    asked = []

    def pull(spec: str, progress: Any, notice: Any = None) -> Path:
        asked.append(spec)
        if spec == "nothing":
            raise store.PullError("nothing: not in the catalog")
        for done in (0, 50, 100):
            progress(done, 100)
        return write_tiny_model(stored / "new.gguf")

    monkeypatch.setattr(download, "pull", pull)
    served = app(with_store=True, load=load)
    lines = call(served, "POST", "/api/pull", {"model": "hf.co/org/repo:Q4_K_M"}).lines
    assert lines[0] == {"status": "pulling manifest"} and lines[-1] == {"status": "success"}
    assert lines[-2]["completed"] == 100 and lines[-2]["total"] == 100
    assert asked == ["hf:org/repo:Q4_K_M"]
    assert "new" in [one["name"] for one in call(served, "GET", "/api/tags").json()["models"]]
    assert call(served, "POST", "/api/pull", {"model": "new:latest", "stream": False}).json() == {"status": "success"}
    assert "catalog" in call(served, "POST", "/api/pull", {"model": "nothing"}).lines[-1]["error"]
    assert call(served, "POST", "/api/pull", {"model": "nothing", "stream": False}).status == 404
    for address in ("http://example.org/x.gguf", "https://example.org/x.gguf", "", None):
        assert call(served, "POST", "/api/pull", {"model": address}).status == 400
    assert len(asked) == 4


def test_browsers_get_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qrun.server import models_api

    monkeypatch.setattr(models_api, "STATIC", tmp_path)
    served = app(make_model(), api_keys=("k",))
    headers = {"accept": "text/html,application/xhtml+xml"}
    assert call(served, "GET", "/", headers=headers).text == "Ollama is running"
    (tmp_path / "index.html").write_text("<p>Hi")
    (tmp_path / "app.js").write_text("1")
    answer = call(app(make_model(), api_keys=("k",)), "GET", "/", headers=headers)
    assert answer.text == "<p>Hi" and answer.headers["content-type"].startswith("text/html")
    assert "frame-ancestors" in answer.headers["content-security-policy"]
    served = app(make_model(), api_keys=("k",))
    assert call(served, "GET", "/static/app.js").text == "1"
    for path in ("/static/../app.py", "/static/nothing.js", "/static/%2e%2e/app.py"):
        assert call(served, "GET", path).status == 404


def test_calls_of_a_stream_are_numbered() -> None:
    lines = ask(make_model(f"{CALL}\n{CALL}"), tools=[TOOL]).lines
    calls = [call for line in lines for call in line["message"].get("tool_calls", ())]
    assert [call["function"]["index"] for call in calls] == [0, 1]
    assert len({call["id"] for call in calls}) == 2


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1h30m", 5400), ("1m0.5s", 60.5), ("90", 90), ("250ms", 0.25), (3, 3), ("-1m", None), (-1, None)],
)
def test_durations(text: Any, seconds: float | None) -> None:
    model = make_model()
    served = app(model)
    entry = served.state.hub.entries[0]
    body = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}], "stream": False, "keep_alive": text}
    assert call(served, "POST", "/api/chat", body).status == 200
    assert entry.ttl == seconds


@pytest.mark.parametrize("text", ["", "x", "5 m", "1h30", "m", "--1m"])
def test_durations_that_are_none(text: str) -> None:
    answer = ask(stream=False, keep_alive=text)
    assert answer.status == 400 and "keep_alive" in answer.json()["error"]


def test_who_asks_for_a_model_that_is_not_there() -> None:
    served = app(make_model())
    assert call(served, "POST", "/api/show", {"model": "other"}).status == 404
    assert call(served, "POST", "/api/show", {"model": "fake:latest"}).status == 200


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(path: str, stream: bool) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}]} if path == "/api/chat" else {"prompt": "Hi"}
    served = app(make_model())
    body |= {"stream": stream, "logprobs": True, "top_logprobs": 2}
    lines = call(served, "POST", path, body).lines
    told = [one for line in lines for one in line.get("logprobs", ())]
    assert "".join(one["token"] for one in told) == "Hello there."
    for one in told:
        assert set(one) == {"token", "logprob", "bytes", "top_logprobs"} and one["logprob"] <= 0
        assert [set(other) for other in one["top_logprobs"]] == [{"token", "logprob", "bytes"}] * 2
    assert "logprobs" not in call(served, "POST", path, body | {"logprobs": False}).text
    assert "top_logprobs" not in call(served, "POST", path, body | {"top_logprobs": 0}).text


def test_a_form_that_is_none() -> None:
    told = ask(stream=False, format="xml").json()["error"]
    assert "json" in told and "schema" in told
