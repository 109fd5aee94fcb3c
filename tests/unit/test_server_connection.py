"""Connections as clients make them: half closed, or gone, which look alike; or held for nothing."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from server_fakes import hold, make_model

from qrun.engine import Model
from qrun.server import Server, connection, listening

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def model() -> Model:
    return make_model()


@pytest.fixture
def server(model: Model) -> Iterator[Server]:
    with Server(model, ping_seconds=0.05) as running:
        yield running


def request(path: str, body: Any, version: str = "1.1") -> bytes:
    raw = json.dumps(body).encode()
    return f"POST {path} HTTP/{version}\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw


def send(server: Server, path: str, body: Any, version: str = "1.1") -> socket.socket:
    """A request, after which its client has no more to say."""
    connection = connect(server)
    connection.sendall(request(path, body, version))
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
    begin = b""
    if version == "1.1":  # the server looks whether anybody is there
        begin = connection.recv(1 << 16)
    else:
        time.sleep(0.3)
    go_on.set()
    *interim, head, body = (begin + read_all(connection)).split(b"\r\n\r\n")
    assert interim == [b"HTTP/1.1 100 "] * (version == "1.1")
    assert head.startswith(b"HTTP/1.1 200")
    assert json.loads(body)["choices"][0]["message"]["content"] == "Hello there."


def test_nothing_comes_before_an_answer_that_comes_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_LOOKS", (60.0,))  # which is at once on a busy machine, too
    client = send(server, "/v1/tokenize", {"content": "Hi"})
    client.shutdown(socket.SHUT_WR)
    assert read_all(client).startswith(b"HTTP/1.1 200")


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


# Connections that are held


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=60)


def n_connections(server: Server) -> int:
    assert server._listener is not None
    return len(server._listener.server_state.connections)


def be_impatient(server: Server, seconds: float) -> None:
    """A client has so long for its request."""
    assert server._listener is not None
    server._listener.config.timeout_keep_alive = seconds  # type: ignore[assignment]


def only_connection(server: Server) -> Any:
    """What the server has of it, once it is the only one."""
    assert server._listener is not None
    wait_until(lambda: n_connections(server) == 1)
    (one,) = server._listener.server_state.connections
    return one


def test_who_holds_connections_loses_them_to_others(
    model: Model, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "most_connections", lambda: 4)
    go_on = hold(model)
    busy = send(server, CHAT, {"messages": MESSAGES})
    wait_until(lambda: running(server))
    held = [connect(server) for _ in range(20)]
    wait_until(lambda: n_connections(server) == 4)
    assert [read_all(one) for one in held[:-3]] == [b""] * 17
    with held[-3] as oldest, connect(server) as newest:
        newest.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert newest.recv(100).startswith(b"HTTP/1.1 200") and oldest.recv(1) == b""
    go_on.set()
    assert busy.recv(100).startswith(b"HTTP/1.1 200")
    for one in (busy, *held[-2:]):
        one.close()


def test_where_all_connections_are_in_use_the_next_is_told_so(
    model: Model, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "most_connections", lambda: 2)
    go_on = hold(model)
    busy = [send(server, CHAT, {"messages": MESSAGES}) for _ in range(2)]
    wait_until(lambda: running(server) == 2)
    assert read_all(connect(server)).startswith(b"HTTP/1.1 503")
    go_on.set()
    for one in busy:
        assert one.recv(100).startswith(b"HTTP/1.1 200")
        one.close()


def test_a_request_has_to_begin_and_its_head_to_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    be_impatient(server, 0.3)
    made: list[Any] = []
    begun = connection.Connection.connection_made
    monkeypatch.setattr(
        connection.Connection, "connection_made", lambda one, transport: (begun(one, transport), made.append(one))
    )
    silent, slow = connect(server), connect(server)
    begin = time.monotonic()
    wait_until(lambda: len(made) == 2)  # the first may be gone by then
    with slow:
        while n_connections(server) and time.monotonic() < begin + 30:
            with suppress(OSError):  # it was closed
                slow.sendall(b"G")
            time.sleep(0.02)
    assert time.monotonic() - begin < 30
    assert read_all(silent) == b""


def test_a_body_may_take_long_but_not_stop(server: Server) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 17\r\n\r\n"
    with connect(server) as slow:
        one, until = only_connection(server), 0.0

        def has_more_time() -> bool:
            return one._patience is not None and one._patience.when() > until

        slow.sendall(head)
        for byte in b'{"content": "Hi"}':
            wait_until(has_more_time)
            until = one._patience.when()
            slow.sendall(bytes((byte,)))
        assert slow.recv(100).startswith(b"HTTP/1.1 200")
    wait_until(lambda: not n_connections(server))
    stopped = connect(server)
    one = only_connection(server)
    stopped.sendall(head)
    wait_until(lambda: one.cycle is not None)
    one.timeout_keep_alive = 0.3
    stopped.sendall(b"{")
    assert read_all(stopped) == b""


def test_an_answer_may_take_longer_than_a_request(model: Model, server: Server) -> None:
    go_on = hold(model)
    waiting = connect(server)
    only_connection(server).timeout_keep_alive = 0.1  # from the request on
    waiting.sendall(request(CHAT, {"messages": MESSAGES}))
    wait_until(lambda: running(server))
    time.sleep(0.3)
    go_on.set()
    assert read_all(waiting).startswith(b"HTTP/1.1 200")


def test_who_reads_nothing_is_let_go(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_UNREAD_SECONDS", 0.2)
    with connect(server) as deaf:
        deaf.setblocking(False)
        with suppress(BlockingIOError, ConnectionError):
            for _ in range(2000):
                deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n")
        wait_until(lambda: not n_connections(server))
    with connect(server) as other:
        other.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert other.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.skipif(os.name != "posix", reason="a limit of POSIX")
def test_as_many_as_the_system_lets_files_be_open() -> None:
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = connection.most_connections()
    assert most is None if files == resource.RLIM_INFINITY else 0 < (most or 0) < files


def test_that_no_more_files_can_be_opened_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    loop, handle = asyncio.new_event_loop(), listening._FewFiles()
    for number in (errno.EMFILE, errno.ENFILE, errno.EMFILE):
        handle(loop, {"message": "accept", "exception": OSError(number, "Too many open files")})
    assert caplog.messages == ["connections wait: Too many open files"]
    handle(loop, {"message": "another", "exception": ValueError("wrong")})
    assert caplog.messages[1] == "another"
    loop.close()
