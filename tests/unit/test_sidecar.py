"""The sample in `examples/sidecar`: a program with a server of its own beside it, which goes when the program does."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_model import PIECES, write_slow_model, write_tiny_model

from qrun.engine import Model

pytest.importorskip("uvicorn")

FOLDER = Path(__file__).parents[2] / "examples" / "sidecar"
on_linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
with_node = pytest.mark.skipif(shutil.which("node") is None, reason="there is no Node")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that cannot end an answer before it has said something: it has no end token."""
    path = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny.gguf", pieces=PIECES[1:])
    Model.load(path, threads=1).close()  # compiles
    return path


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_slow_model(tmp_path_factory.mktemp("models") / "slow.gguf")
    Model.load(path, threads=1).close()
    return path


@pytest.fixture
def sidecar(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    import sidecar

    return sidecar


def start(language: str, *arguments: str, tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(FOLDER / "sidecar.py")]
    if language == "node":
        qrun = tmp_path / "qrun"
        qrun.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qrun.cli.main "$@"\n')
        qrun.chmod(0o755)
        command, environment = ["node", str(FOLDER / "sidecar.mjs")], {"QRUN": str(qrun), **environment}
    return subprocess.Popen(
        [*command, *arguments], text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | environment,
    )  # fmt: skip


LANGUAGES = ["python", pytest.param("node", marks=with_node)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_program_answers_and_ends(language: str, model: Path, tmp_path: Path) -> None:
    out, err = start(language, str(model), "It was", tmp_path=tmp_path).communicate(timeout=60)
    assert out.strip() and err == ""


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_model_that_is_none_is_one_line(language: str, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    process = start(language, str(tmp_path / "bad.gguf"), "It was", tmp_path=tmp_path)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (1, "", 1) and "bad.gguf" in err


def test_several_turns_and_what_the_server_refuses(sidecar: Any, model: Path) -> None:
    with sidecar.Sidecar(str(model), "--ctx", "256") as server:
        assert server.alive and server.url.startswith("http://127.0.0.1:")
        question = {"role": "user", "content": "It was"}
        first = "".join(server.chat([question], max_tokens=8, temperature=0))
        assert first == "".join(server.chat([question], max_tokens=8, temperature=0))
        with pytest.raises(RuntimeError, match="context"):
            list(server.chat([{"role": "user", "content": "x" * 5000}]))
        server._key = "another"
        with pytest.raises(RuntimeError, match="key"):
            list(server.chat([question]))
    assert not server.alive
    with pytest.raises(OSError):
        list(server.chat([question]))
    server.close()  # a second time


def test_an_answer_that_nobody_reads_any_more_ends_in_the_server(sidecar: Any, slow_model: Path) -> None:
    with sidecar.Sidecar(str(slow_model)) as server:
        for _ in range(3):
            answer = server.chat([{"role": "user", "content": "It was"}], temperature=0, ignore_eos=True)
            assert next(answer) is not None
            answer.close()
        server.close(20)  # before that time it would have gone on
    assert server._process.returncode >= 0 and not server.alive, "it had to be killed"


def children(pid: int) -> list[int]:
    """Those of a process, and theirs."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        own = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return own + [grandchild for child in own for grandchild in children(child)]


def until(reached: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


@on_linux
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGSEGV])
@pytest.mark.parametrize("moment", ["compiling", "generating"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_however_the_program_ends_nothing_is_left(
    language: str, moment: str, how: int, slow_model: Path, tmp_path: Path
) -> None:
    if language == "node" and how != signal.SIGKILL:
        return  # the same to a program that has no handler
    environment = {}
    if moment == "compiling":
        (tmp_path / "cache").mkdir(mode=0o700)
        environment["QRUN_CACHE"] = str(tmp_path / "cache")
    process = start(language, str(slow_model), "It was", tmp_path=tmp_path, **environment)
    assert process.stdout is not None and process.stderr is not None
    if moment == "compiling":
        until(lambda: len(children(process.pid)) >= 2)  # the server, and whoever compiles for it
    else:
        assert process.stdout.read(1)
    left = children(process.pid)
    assert left
    process.send_signal(how)
    process.wait(60)
    until(lambda: not any(map(alive, left)), 60)
    process.stdout.close()
    process.stderr.close()
