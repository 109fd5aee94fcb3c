"""`qrun serve`, and servers in threads: over real sockets."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner
from server_fakes import hold, make_model, runtime_of
from tiny_model import write_tiny_model

from qrun.cli import serve
from qrun.cli.serve import command
from qrun.engine import Model
from qrun.server import Server
from qrun.server.listening import bind, check_certificate

CHAT: Any = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "ignore_eos": True}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf")
    Model.load(path, threads=1).close()  # compiles
    return path


def start(*arguments: Any, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qrun.cli.main", "serve", *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more,
    )  # fmt: skip


def post(url: str, body: Any, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_a_sidecar(tiny: Path) -> None:
    with start(tiny, "--port", 0, "--ready-json", "--exit-with-stdin", "--threads", 1, "--ctx", 64) as process:
        assert process.stdout is not None and process.stdin is not None and process.stderr is not None
        told = json.loads(process.stdout.readline())
        assert told["model"] == "tiny" and told["url"].startswith("http://127.0.0.1:")
        status, answer = post(told["url"], CHAT)
        assert status == 200 and answer["usage"]["completion_tokens"] == 3
        process.stdin.close()
        assert process.wait(60) == 0
        assert process.stdout.read() == ""
        assert process.stderr.read().splitlines()[-1].startswith("POST /v1/chat/completions 200")


@pytest.mark.skipif(os.name != "posix", reason="a limit of POSIX")
def test_it_may_open_as_many_files_as_the_system_lets_it() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
    try:
        serve._allow_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_signals_end_it_in_the_middle_of_an_answer(tiny: Path) -> None:
    with start(tiny, "--port", 0, "--ready-json", "--quiet", "--ctx", 64) as process:
        assert process.stdout is not None and process.stderr is not None
        url = json.loads(process.stdout.readline())["url"]
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname, parts.port)) as connection:
            body = json.dumps({**CHAT, "max_tokens": 50, "stream": True, "ignore_eos": True}).encode()
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"
                               % (len(body), body))  # fmt: skip
            assert connection.recv(10)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 128 + signal.SIGTERM
        assert process.stderr.read() == ""


def test_models_that_are_wrong_end_it(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    for name in ("bad.gguf", "missing.gguf"):
        with start(tmp_path / name, "--port", 0, "--exit-with-stdin") as process:
            assert process.stdout is not None and process.stderr is not None  # standard input stays open
            out, err = process.stdout.read(), process.stderr.read()
            process.wait(60)
            assert process.returncode == 1 and out == ""
            assert name in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--tls-cert", "x"], "go together"), (["--models-dir", "/nothing/here"], "/nothing/here"),
     (["--api-key-file", "/nothing/here"], "/nothing/here"), (["--port", "99999"], "--port")],
)  # fmt: skip
def test_wrong_arguments(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(command, ["model.gguf", *arguments])
    assert result.exit_code != 0
    assert words in result.output + str(result.exception)


def test_a_port_that_is_taken() -> None:
    first, url = bind("127.0.0.1", 0)
    with first, pytest.raises(OSError) as caught:
        bind("127.0.0.1", int(url.rpartition(":")[2]))
    assert str(caught.value.filename).startswith("127.0.0.1:")


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="there are no such sockets")
def test_a_socket_in_the_file_system(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first, url = bind("", 0, path)
    assert url == f"unix:{path}" and path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(OSError):
        bind("", 0, path)  # somebody listens
    first.close()
    second, _ = bind("", 0, path)
    second.close()
    file = tmp_path / "file"
    file.write_text("kept")
    with pytest.raises(OSError):
        bind("", 0, file)
    assert file.read_text() == "kept"


def test_certificates_that_are_wrong(tmp_path: Path) -> None:
    file = tmp_path / "cert.pem"
    with pytest.raises(OSError) as caught:
        check_certificate(file, file)
    assert Path(str(caught.value.filename)) == file
    file.write_text("no certificate")
    with pytest.raises(ValueError, match=r"cert\.pem: no certificate in PEM"):
        check_certificate(file, file)


# In a thread


def test_a_server_in_a_thread() -> None:
    server = Server(make_model())
    url = server.start()
    with pytest.raises(RuntimeError):
        server.start()
    status, answer = post(url, CHAT)
    assert status == 200 and answer["choices"][0]["message"]["content"] == "Hel"
    assert post(url, CHAT, Host="example.org")[0] == 403
    server.stop()
    server.stop()
    with pytest.raises(OSError):
        post(url, CHAT)
    with Server(make_model()) as other:
        assert post(other.url, CHAT)[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_is_not_answered(stream: bool) -> None:
    model = make_model("x" * 300)
    event = hold(model)
    with Server(model) as server:
        parts = urlsplit(server.url)
        body = json.dumps({**CHAT, "max_tokens": 300, "stream": stream}).encode()
        with socket.create_connection((parts.hostname, parts.port)) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"
                               % (len(body), body))  # fmt: skip
            end = time.monotonic() + 60
            while not runtime_of(model).evaluated:
                assert time.monotonic() < end
                time.sleep(0.01)
        while server.application.state.turns.running:
            assert time.monotonic() < end
            time.sleep(0.01)
        event.set()
        assert server.application.state.metrics.finished["abort"] == 1
    assert len(runtime_of(model).evaluated) < 10


def test_a_connection_is_used_again() -> None:
    with Server(make_model()) as server:
        parts = urlsplit(server.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        for _ in range(3):
            connection.request("POST", "/v1/chat/completions", json.dumps({**CHAT, "stream": True}))
            text = connection.getresponse().read().decode()
            assert text.endswith("data: [DONE]\n\n")
        connection.close()
