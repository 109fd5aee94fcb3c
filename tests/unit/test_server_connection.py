"""Connections as clients make them: half closed, or gone, which look alike."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from server_fakes import hold, make_model

from qrun.engine import Model
from qrun.server import Server

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def model() -> Model:
    return make_model()


@pytest.fixture
def server(model: Model) -> Iterator[Server]:
    with Server(model, ping_seconds=0.05) as running:
        yield running


def send(server: Server, path: str, body: Any, version: str = "1.1") -> socket.socket:
    """A request, after which its client has no more to say."""
    raw = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=60)
    head = f"POST {path} HTTP/{version}\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n"
    connection.sendall(head.encode() + raw)
    return connection


def read_all(connection: socket.socket) -> bytes:
    with connection:
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def running(server: Server) -> int:
    return server.application.state.turns.running


def wait_until(true: Any) -> None:
    deadline = time.monotonic() + 30  # a model that is held goes on after 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("at_once", [True, False])
def test_who_closes_its_side_gets_its_answer(model: Model, server: Server, version: str, at_once: bool) -> None:
    go_on = hold(model)
    connection = send(server, CHAT, {"messages": MESSAGES}, version)
    if not at_once:
        wait_until(lambda: running(server))
    connection.shutdown(socket.SHUT_WR)
    time.sleep(0.3)  # the server looks whether anybody is there
    go_on.set()
    *interim, head, body = read_all(connection).split(b"\r\n\r\n")
    assert interim == [b"HTTP/1.1 100 "] * (version == "1.1")
    assert head.startswith(b"HTTP/1.1 200")
    assert json.loads(body)["choices"][0]["message"]["content"] == "Hello there."


def test_nothing_comes_before_an_answer_that_comes_at_once(server: Server) -> None:
    connection = send(server, "/v1/tokenize", {"content": "Hi"})
    connection.shutdown(socket.SHUT_WR)
    assert read_all(connection).startswith(b"HTTP/1.1 200")


def test_so_does_who_wants_a_stream(model: Model, server: Server) -> None:
    go_on = hold(model)
    connection = send(server, CHAT, {"messages": MESSAGES, "stream": True})
    begin = connection.recv(1 << 16)
    assert begin.startswith(b"HTTP/1.1 200")
    connection.shutdown(socket.SHUT_WR)
    time.sleep(0.2)
    go_on.set()
    assert b"data: [DONE]" in read_all(connection)


@pytest.mark.parametrize("path", [CHAT, "/api/chat"])
@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_is_not_answered(model: Model, server: Server, path: str, stream: bool) -> None:
    hold(model)
    connection = send(server, path, {"messages": MESSAGES, "stream": stream})
    wait_until(lambda: running(server))
    if stream:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    connection.close()
    wait_until(lambda: not running(server))


def test_who_closes_its_side_and_then_goes_is_not_answered(model: Model, server: Server) -> None:
    hold(model)
    connection = send(server, CHAT, {"messages": MESSAGES})
    wait_until(lambda: running(server))
    connection.shutdown(socket.SHUT_WR)
    time.sleep(0.1)
    assert running(server)
    connection.close()
    wait_until(lambda: not running(server))


def test_half_a_request_is_none(server: Server) -> None:
    connection = send(server, CHAT, {"messages": MESSAGES})
    other = socket.create_connection(connection.getpeername(), timeout=60)
    other.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{{".encode())
    other.shutdown(socket.SHUT_WR)
    assert read_all(other) == b""
    connection.close()
