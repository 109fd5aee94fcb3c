"""The programs in `examples`, run as their first lines say, where the packages that they need are there."""

import builtins
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_tiny_model

import qrun.engine

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("examples") / "model.gguf")


def run(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=EXAMPLES.parent)


def test_two_questions(model: Path) -> None:
    done = run("examples/two_questions.py", str(model), "one", "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("one\n  ") and "\ntwo\n  " in done.stdout


def test_two_questions_of_a_file_that_is_not_there() -> None:
    done = run("examples/two_questions.py", "missing.gguf", "one")
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1


@pytest.fixture
def web_chat(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("fastapi")
    testclient = pytest.importorskip("fastapi.testclient")
    monkeypatch.setenv("MODEL", str(model))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import web_chat

    with testclient.TestClient(web_chat.app) as client:
        yield client


def test_web_chat(web_chat: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    answer = web_chat.post("/chat?max_tokens=20", json={"messages": messages})
    assert answer.status_code == 200 and answer.text
    assert web_chat.post("/chat", json={"messages": []}).status_code == 422
    long = web_chat.post("/chat", json={"messages": [{"role": "user", "content": "x" * 100_000}]})
    assert long.status_code == 422 and "the context holds" in long.json()["detail"]


@pytest.fixture
def chat_window(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    widgets = pytest.importorskip("PySide6.QtWidgets", exc_type=ImportError)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    app = widgets.QApplication.instance() or widgets.QApplication([])
    import chat_window

    chat_window.app = app
    yield chat_window


def wait(module: Any, until: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        module.app.processEvents()
        time.sleep(0.005)


def test_chat_window(chat_window: Any, model: Path) -> None:
    window = chat_window.Window(str(model))
    window.show()
    wait(chat_window, window.line.isEnabled)
    assert window.windowTitle() == "model.gguf"
    for stopped in (True, False):
        before = len(window.text.toPlainText())
        window.line.setText("Hi")
        window.line.returnPressed.emit()
        assert not window.line.isEnabled() and window.button.isEnabled()
        wait(chat_window, lambda before=before: len(window.text.toPlainText()) > before + len("> Hi\n"))
        if stopped:
            window.button.click()
            wait(chat_window, window.line.isEnabled, 2)
    start = time.monotonic()
    window.close()  # in the midst of an answer
    assert time.monotonic() - start < 1
    assert not window.talk._thread.is_alive()


def test_chat_window_with_a_file_that_is_none(chat_window: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    window = chat_window.Window(str(tmp_path / "bad.gguf"))
    wait(chat_window, lambda: "bad.gguf" in window.windowTitle())
    assert not window.line.isEnabled()
    window.close()


def test_chat_window_as_a_program(chat_window: Any, model: Path) -> None:
    code = (
        "import runpy, sys; from PySide6.QtCore import QTimer; from PySide6.QtWidgets import QApplication\n"
        "QTimer.singleShot(0, lambda: None)\n"
        "real = QApplication.exec\n"
        "def run(): QTimer.singleShot(300, QApplication.closeAllWindows); return real()\n"
        "QApplication.exec = staticmethod(run)\n"
        f"sys.argv = ['chat_window.py', {str(model)!r}]; runpy.run_path('examples/chat_window.py', run_name='__main__')"
    )
    done = run("-c", code)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "QThread" not in done.stderr and "Traceback" not in done.stderr


def test_what_the_page_for_makers_of_apps_begins_with(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (EXAMPLES.parent / "docs" / "embedding.md").read_text("utf-8")
    programs = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert programs
    monkeypatch.chdir(model.parent)
    for program in programs:
        names: dict[str, Any] = {}
        exec(program, names)
        assert capsys.readouterr().out
        names["model"].close()


def test_every_error_of_that_page_is_what_it_says() -> None:
    page = (EXAMPLES.parent / "docs" / "embedding.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", page, re.MULTILINE)
    assert len(rows) >= 7
    for name, former in rows:
        assert issubclass(getattr(qrun.engine, name), qrun.engine.QrunError)
        assert issubclass(getattr(qrun.engine, name), getattr(builtins, former))


def test_every_example_is_run() -> None:
    text = Path(__file__).read_text("utf-8")
    assert [path.name for path in EXAMPLES.glob("*.py") if path.stem not in text] == []
    assert os.listdir(EXAMPLES)
