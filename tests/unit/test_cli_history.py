"""What is typed is kept where it can be, and a chat needs no place for it."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from qrun.cli.editor import LineEditor
from qrun.cli.history import chat_history
from qrun.cli.interrupts import Interrupts
from qrun.cli.main import warnings_as_notices
from qrun.engine import CacheWarning


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("QRUN_HOME", str(tmp_path / "home"))
    yield tmp_path / "home"


def typed(*lines: str) -> list[str]:
    """What the line editor gives for what is typed at a terminal."""
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        read = LineEditor(["/help", "/exit"], chat_history(), Interrupts())
        keys.send_text("".join(f"{line}\r" for line in lines))
        return [read() for _ in lines]


def test_what_is_typed_is_there_the_next_time(home: Path) -> None:
    assert typed("first", "second") == ["first", "second"]
    assert (home / "history").is_file()
    assert list(chat_history().load_history_strings()) == ["second", "first"]


@pytest.mark.parametrize("place", ["under a file", "no file", "no home"])
def test_a_chat_needs_no_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    if place == "under a file":
        (tmp_path / "file").write_bytes(b"")
        monkeypatch.setenv("QRUN_HOME", str(tmp_path / "file" / "home"))
    elif place == "no file":
        (tmp_path / "home" / "history").mkdir(parents=True)
    else:
        monkeypatch.delenv("QRUN_HOME")
        monkeypatch.delenv("XDG_DATA_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: Path(os.devnull).expanduser() / "nobody")
    assert typed("first", "second") == ["first", "second"]
    said = capsys.readouterr().err
    assert said.startswith("qrun: what is typed is not kept as history: ") and said.count("\n") == 1
    assert "QRUN_HOME can name another folder" in said


def test_a_disk_that_fills_up_ends_the_history_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    history = chat_history()

    def full(self: object, string: str) -> None:
        raise OSError(28, "No space left on device", "history")

    monkeypatch.setattr("prompt_toolkit.history.FileHistory.store_string", full)
    for line in ("first", "second"):
        history.append_string(line)
    assert history.get_strings() == ["first", "second"]
    said = capsys.readouterr().err
    assert said.startswith("qrun: what is typed is not kept as history: history: No space left on device (QRUN_HOME")
    assert said.count("\n") == 1


def test_what_the_engine_warns_of_is_a_notice(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings_as_notices():
        warnings.warn("nothing is kept", CacheWarning, stacklevel=1)
    assert capsys.readouterr().err == "qrun: nothing is kept\n"
