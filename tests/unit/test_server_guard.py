"""Who may call a server, and what it says to others."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from asgi_client import Answer, call
from server_fakes import make_model

from qrun.server import app

CHAT = {"messages": [{"role": "user", "content": "a secret"}]}


def get(path: str = "/v1/models", headers: dict[str, str] | None = None, **settings: Any) -> Answer:
    return call(app(make_model(), **settings), "GET", path, headers=headers)


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8080", "LOCALHOST", "127.0.0.1:80", "[::1]:8080", "[::1]", "api.localhost:1", ""]
)
def test_names_of_this_machine(host: str) -> None:
    assert get(headers={"host": host}).status == 200


@pytest.mark.parametrize(
    "host", ["example.org", "example.org:8080", "localhost.example.org", "192.168.1.2", "[fe80::1]"]
)
def test_names_of_others(host: str) -> None:
    answer = get(headers={"host": host})
    assert answer.status == 403 and "--allow-host" in answer.json()["error"]["message"]
    assert get(headers={"host": host}, allow_hosts=("*",)).status == 200
    assert get(headers={"host": host}, public=True).status == 200
    assert get(headers={"host": host}, public=True, allow_hosts=("other.org",)).status == 403


def test_a_name_that_is_allowed() -> None:
    assert get(headers={"host": "Box.Example.org:80"}, allow_hosts=("*.example.org",)).status == 200


@pytest.mark.parametrize(
    "origin",
    ["http://localhost", "http://localhost:3000", "https://127.0.0.1:1", "http://[::1]:5", "tauri://localhost",
     "app://obsidian.md", "vscode-webview://abc", "file://"],
)  # fmt: skip
def test_pages_of_this_machine(origin: str) -> None:
    answer = get(headers={"origin": origin})
    assert answer.status == 200 and answer.headers["access-control-allow-origin"] == origin
    assert answer.headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize(
    "origin", ["https://example.org", "http://localhost.example.org", "null", "chrome-extension://abc", "http://[", "x"]
)
def test_pages_of_others(origin: str) -> None:
    answer = get(headers={"origin": origin})
    assert answer.status == 403 and "--allow-origin" in answer.json()["error"]["message"]
    assert "access-control-allow-origin" not in answer.headers
    assert get(headers={"origin": origin}, allow_origins=("*",)).status == 200


def test_origins_that_are_allowed() -> None:
    allowed = ("chrome-extension://*", "https://example.org")
    assert get(headers={"origin": "chrome-extension://abc"}, allow_origins=allowed).status == 200
    assert get(headers={"origin": "https://example.org"}, allow_origins=allowed).status == 200
    assert get(headers={"origin": "https://example.org.evil"}, allow_origins=allowed).status == 403


def test_the_servers_own_page_may_call_it() -> None:
    headers = {"host": "192.168.1.2:8080", "origin": "http://192.168.1.2:8080"}
    assert get(headers=headers, public=True).status == 200
    assert get(headers=headers | {"origin": "http://192.168.1.2:9090"}, public=True).status == 403


def test_a_question_before_a_request() -> None:
    headers = {
        "origin": "http://localhost:3000", "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,x-stainless-os",
        "access-control-request-private-network": "true",
    }  # fmt: skip
    served = app(make_model(), api_keys=("k",))
    answer = call(served, "OPTIONS", "/v1/chat/completions", headers=headers)
    assert answer.status == 204 and answer.body == b""
    assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert answer.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
    assert answer.headers["access-control-allow-private-network"] == "true"
    assert "POST" in answer.headers["access-control-allow-methods"]
    refused = call(served, "OPTIONS", "/v1/models", headers=headers | {"origin": "https://example.org"})
    assert refused.status == 403


def test_keys() -> None:
    settings: dict[str, Any] = {"api_keys": ("first", "zweiter-ü")}
    for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "first"}, {"x-api-key": ""}):
        answer = get(headers=headers, **settings)
        assert answer.status == 401 and answer.json()["error"]["type"] == "authentication_error"
    for headers in ({"authorization": "Bearer first"}, {"authorization": "bearer first"}, {"x-api-key": "first"}):
        assert get(headers=headers, **settings).status == 200
    assert get("/health", **settings).status == 200
    assert get("/metrics", **settings).status == 401
    assert call(app(make_model(), **settings), "POST", "/v1/chat/completions", CHAT).status == 401


def test_errors_have_the_shape_of_their_interface() -> None:
    served = app(make_model(), api_keys=("k",))
    told = call(served, "POST", "/v1/messages", CHAT).json()
    assert told["type"] == "error" and told["error"]["type"] == "authentication_error"
    assert isinstance(call(served, "POST", "/api/chat", CHAT).json()["error"], str)


@pytest.mark.parametrize("length", [None, "5000", "10"])
def test_bodies_that_are_too_large(length: str | None) -> None:
    headers = {} if length is None else {"content-length": length}
    answer = call(app(make_model(), max_body=1000), "POST", "/v1/chat/completions", b" " * 5000, headers)
    assert answer.status == 413 and "1000 bytes" in answer.json()["error"]["message"]


def test_requests_have_ids() -> None:
    assert get(headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    for strange in ("", "a\x01b", "x" * 500):
        assert get(headers={"x-request-id": strange}).headers["x-request-id"] not in ("", strange)


def test_the_log_tells_nothing_of_what_is_said() -> None:
    lines: list[str] = []
    served = app(make_model("another secret"), log=lines.append, api_keys=("a key",))
    headers = {"authorization": "Bearer a key"}
    call(served, "POST", "/v1/chat/completions?q=a+secret", CHAT, headers)
    call(served, "POST", "/v1/chat/completions", {"messages": "a secret"}, headers)
    call(served, "GET", "/\x1b[31m", headers=headers)
    assert len(lines) == 3 and lines[0].startswith("POST /v1/chat/completions 200 ")
    assert not any("secret" in line or "key" in line or "\x1b" in line for line in lines)


def test_unknown_paths_and_methods() -> None:
    served = app(make_model())
    answer = call(served, "GET", "/v2/nothing")
    assert answer.status == 404 and answer.json()["error"]["code"] == "unknown_path"
    answer = call(served, "GET", "/v1/chat/completions")
    assert answer.status == 405 and answer.headers["allow"] == "POST"


@pytest.mark.parametrize("wrong", [lambda: 1 / 0, lambda: len(3), lambda: {}["x"], lambda: None.text])  # type: ignore
def test_errors_of_our_own_have_no_words_of_the_request(
    wrong: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    model.chat = lambda *args, **options: wrong()  # type: ignore[method-assign]
    answer = call(app(model), "POST", "/v1/chat/completions", CHAT)
    assert answer.status == 500 and answer.json()["error"]["message"] == "internal error"
    assert [record.levelname for record in caplog.records] == ["ERROR"]


@pytest.mark.parametrize("stream", [False, True])
def test_logits_that_are_no_numbers_are_an_error_of_our_own(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    step = model._runtime.step
    model._runtime.step = lambda *args: [rows * np.float32(np.nan) for rows in step(*args)]  # type: ignore[method-assign]
    answer = call(app(model), "POST", "/v1/chat/completions", CHAT | {"stream": stream})
    assert answer.status == (200 if stream else 500)
    error = (answer.events[-1] if stream else answer.json())["error"]
    assert error["type"] == "server_error" and "not finite" in error["message"]
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_an_application_in_another_one() -> None:
    from starlette.applications import Starlette
    from starlette.routing import Mount

    served = Starlette(routes=[Mount("/llm", app(make_model(), api_keys=("k",)))])
    key = {"x-api-key": "k"}
    assert call(served, "GET", "/llm/health").status == 200
    assert call(served, "POST", "/llm/v1/chat/completions", CHAT, key).status == 200
    assert call(served, "POST", "/llm/v1/messages", CHAT).json()["type"] == "error"
    assert isinstance(call(served, "POST", "/llm/api/chat", {"messages": 3}, key).json()["error"], str)
    assert call(served, "GET", "/llm/v1/models").status == 401
    for path in ("/llm/", "/llm//"):  # the page
        answer = call(served, "GET", path, headers={"accept": "text/html"})
        assert answer.status == 200 and "<html" in answer.text


@pytest.mark.parametrize(
    "path", ["/v1/models/", "//v1/models", "/v1//models", "//v1/models//", "http://localhost:8080/v1/models/"]
)
def test_slashes_too_many(path: str) -> None:
    assert get(path).json()["object"] == "list"
    assert call(app(make_model()), "POST", path.replace("models", "chat/completions"), CHAT).status == 200


def test_who_asks_what_a_path_can() -> None:
    answer = call(app(make_model()), "OPTIONS", "/v1/chat/completions")
    assert (answer.status, answer.headers["allow"], answer.body) == (204, "POST, OPTIONS", b"")
    assert call(app(make_model()), "OPTIONS", "/v2").status == 404


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/chat"])
def test_bodies_that_are_packed(path: str) -> None:
    packed = gzip.compress(json.dumps(CHAT).encode())
    answer = call(app(make_model()), "POST", path, packed, {"content-encoding": "gzip"})
    assert answer.status == 415 and "gzip" in answer.text
    assert call(app(make_model()), "POST", path, CHAT, {"content-encoding": "identity"}).status == 200
