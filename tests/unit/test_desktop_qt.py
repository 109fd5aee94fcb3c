"""The sample app in `examples/desktop_qt`, without a screen: what it shows, keeps and says, and how it ends."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_model import write_slow_model, write_tiny_model

FOLDER = Path(__file__).parents[2] / "examples" / "desktop_qt"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("desktop") / "model.gguf")


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slow_model(tmp_path_factory.mktemp("desktop") / "slow.gguf")


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The module, and an application whose settings and talks lie in a folder of the test."""
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    core = pytest.importorskip("PySide6.QtCore", exc_type=ImportError)
    widgets = pytest.importorskip("PySide6.QtWidgets", exc_type=ImportError)
    monkeypatch.syspath_prepend(str(FOLDER))
    application = widgets.QApplication.instance() or widgets.QApplication([])
    application.setApplicationName("qrun-desktop-test")
    application.setOrganizationName("qrun")
    core.QSettings.setPath(core.QSettings.defaultFormat(), core.QSettings.Scope.UserScope, str(tmp_path / "settings"))
    import qrun_desktop

    qrun_desktop.application = application
    yield qrun_desktop


@pytest.fixture
def window(app: Any, model: Path) -> Iterator[Any]:
    window = app.Window(str(model))
    window.settings.values["temperature"] = 0
    window.show()
    until(app, lambda: not window._busy)
    yield window
    window.close()
    assert window.worker.close(5)


def until(app: Any, reached: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        app.application.processEvents()
        time.sleep(0.003)


def ask(app: Any, window: Any, text: str) -> None:
    window.line.setPlainText(text)
    window.send()
    until(app, lambda: not window._busy)


def test_a_talk_is_shown_and_kept(app: Any, window: Any, model: Path) -> None:
    assert window.windowTitle() == "model - qrun" and window.button.text() == "Send"
    window.settings.values["max_tokens"] = 12
    ask(app, window, "It was")
    assert window.transcript.answer.text and " tokens, " in window.transcript.answer.note.text()
    ask(app, window, "a bright day")
    (talk,) = list(window.history.talks())
    assert talk[1] == "It was" and window.talks.count() == 1
    assert [message["role"] for message in window.history.read(talk[0])] == ["user", "assistant"] * 2

    window.new_talk()
    until(app, lambda: not window._busy)
    assert window._talk_file != talk[0]
    ask(app, window, "Something else")
    assert [title for _, title in window.history.talks()] == ["Something else", "It was"]
    window.open_talk(talk[0])
    ask(app, window, "and more")  # goes on from what was said there
    assert len(window.history.read(talk[0])) == 6
    window.delete_talk(talk[0])
    assert [title for _, title in window.history.talks()] == ["Something else"]
    assert app.Settings().model == str(model)  # for the next start


def test_an_answer_can_be_stopped(app: Any, window: Any, slow_model: Path) -> None:
    window.load(str(slow_model))
    until(app, lambda: not window._busy)
    window.line.setPlainText("It was")
    window.send()
    until(app, lambda: window.transcript.answer.text)
    assert window.button.text() == "Stop"
    window.button.click()
    until(app, lambda: not window._busy, 2)
    assert "stopped" in window.transcript.answer.note.text()
    assert window.history.read(window._talk_file)[-1]["content"] == window.transcript.answer.text


def test_an_answer_is_kept_though_another_talk_was_opened_meanwhile(app: Any, window: Any, slow_model: Path) -> None:
    window.load(str(slow_model))
    until(app, lambda: not window._busy)
    window.line.setPlainText("It was")
    window.send()
    until(app, lambda: window.transcript.answer.text)
    window.new_talk()
    assert window.transcript.answer is None
    until(app, lambda: not window._busy, 2)
    ((path, title),) = window.history.talks()
    assert title == "It was" and window.history.read(path)[1]["content"] and path != window._talk_file
    assert window.transcript.answer is None and window._messages == []


def test_a_question_that_is_too_long_comes_back(app: Any, window: Any) -> None:
    ask(app, window, "x" * 20_000)
    assert "the context holds" in window.status.toolTip() and "\n" not in window.status.text()
    assert window.line.toPlainText() == "x" * 20_000 and window.transcript.answer is None
    assert list(window.history.talks()) == []


def test_a_file_that_is_no_model_is_an_error_of_one_line(app: Any, window: Any, model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    for name in ("bad.gguf", "missing.gguf"):
        window.load(str(tmp_path / name))
        until(app, lambda: not window._busy)
        assert name in window.status.toolTip() and window.picker.currentIndex() == -1
    window.line.setPlainText("It was")
    window.send()
    assert "choose one" in window.status.text() and window.line.toPlainText() == "It was"
    window.load(str(model))
    until(app, lambda: not window._busy)
    ask(app, window, "It was")
    assert window.transcript.answer.text


def test_a_package_that_was_left_out_is_an_error_of_one_line(
    app: Any, window: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: object, **options: object) -> None:
        raise ModuleNotFoundError("No module named 'tokenizers'")

    monkeypatch.setattr("worker.Model.load", load)
    window.load(str(model))
    until(app, lambda: not window._busy)
    assert "'tokenizers'" in window.status.toolTip() and window.picker.currentIndex() == -1


def test_thoughts_are_folded_away_and_answers_are_markdown(app: Any) -> None:
    import transcript

    answer = transcript.Answer(under_way=True)
    answer.add("reasoning", "Let me think.")
    until(app, lambda: not answer.fold.isHidden())
    assert answer.fold.text() == "Thinking …" and answer.thought.isHidden() and answer.body.isHidden()
    answer.add("content", "# Title\n\n```\ncode\n```\n<b>no</b> ![x](file:///etc/hostname)")
    answer.finish("3 tokens")
    assert answer.fold.text() == "Thoughts" and not answer.body.isHidden()
    answer.fold.click()
    assert answer.thought.parts[0].text() == "Let me think." and not answer.thought.isHidden()
    shown = answer.body.parts[0].toPlainText()
    assert shown.startswith("Title\ncode") and "<b>no</b>" in shown
    assert answer.body.parts[0].loadResource(2, None) is None


def test_of_a_long_answer_only_the_last_part_is_laid_out_anew(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import transcript

    code = "```python\n" + "x = 1\n\n" * 1000 + "```\n"
    paragraphs = [f"Paragraph {i}. " + "Words. " * 30 + "\n\n" for i in range(60)]
    text = "".join(paragraphs[:30]) + code + "".join(paragraphs[30:])
    cut = transcript.parts(text)
    assert "".join(cut) == text and len(cut) > 3
    assert [part.count("```") for part in cut if "```" in part] == [2]  # code stays in one piece
    assert all(part.endswith("\n\n") for part in cut[:-1]) and transcript.parts("") == []
    assert transcript.parts("- one\n\n  more of it\n\n" * 400)[1].startswith("- one")

    laid_out: list[int] = []
    lay_out = transcript.Markdown._lay_out
    monkeypatch.setattr(
        transcript.Markdown, "_lay_out", lambda self: (laid_out.append(len(self._text)), lay_out(self))[1]
    )
    answer = transcript.Answer(under_way=True)
    answer.text = text
    answer._draw()
    assert len(laid_out) == len(answer.body.parts) == len(cut)
    answer.text += "And the end."
    answer._draw()
    assert len(laid_out) == len(cut) + 1 and answer.body.parts[-1].toPlainText().endswith("And the end.")


def test_the_rest_of_a_long_question_is_folded_away(app: Any) -> None:
    import transcript

    text = "words " * 3000
    question = transcript.Question(text)
    assert len(question.bubble.text()) < 2000 and question.bubble.text().endswith("words …")
    question.more.click()
    assert question.bubble.text() == text and question.more.isHidden()
    assert not hasattr(transcript.Question("short"), "more")


def test_settings_are_kept_and_reach_the_model(app: Any, window: Any, model: Path) -> None:
    from settings import SettingsDialog

    dialog = SettingsDialog(window, window.settings)
    assert dialog.numbers["top_p"].text() == "the model's own" and dialog.numbers["temperature"].value() == 0
    dialog.numbers["max_tokens"].setValue(3)
    dialog.numbers["context"].setValue(128)
    dialog.system.setPlainText("Be kind.")
    dialog.accept()
    again = app.Settings()
    assert again.sampling() == {"temperature": 0, "max_tokens": 3}
    assert again.loading() == {"context": 128, "cache_type": "f16"} and again.values["system"] == "Be kind."
    window.load(str(model))
    until(app, lambda: not window._busy)
    assert window.worker._model.context == 128
    ask(app, window, "It was")
    assert "3 tokens" in window.transcript.answer.note.text()
    assert window.worker._talk.system == "Be kind."


def test_what_is_kept_may_be_damaged(app: Any, tmp_path: Path) -> None:
    store = app.Settings()._store
    for text in ("[1]", "{", json.dumps({"think": "maybe", "unknown": 1})):
        store.setValue("settings", text)
        settings = app.Settings()
        app.SettingsDialog(None, settings)
        assert "unknown" not in settings.values
    history = app.History()
    path = history.new()
    path.parent.mkdir(parents=True, exist_ok=True)
    for text in ("{", '{"a": 1}', "[1]", '[{"role": "user"}]'):
        path.write_text(text)
        assert history.read(path) == [] and list(history.talks()) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_can_be_read(app: Any, window: Any, scheme: str) -> None:
    window.settings.values["scheme"] = scheme
    window._use_scheme()
    palette = window.palette()
    contrast = abs(palette.text().color().lightness() - palette.base().color().lightness())
    assert contrast > 150 and (palette.base().color().lightness() > 127) == (scheme == "light")


def test_models_that_are_here_and_models_that_can_be_fetched(app: Any, window: Any, model: Path) -> None:
    texts = [window.picker.itemText(i) for i in range(window.picker.count())]
    assert texts[0] == "Open a file …" and "model.gguf" in texts
    assert any(text.startswith("qwen3") and "to fetch: " in text for text in texts)
    assert window.picker.currentData() == str(model)


PROGRAM = """
import os, sys, threading, time
folder, moment, *arguments = sys.argv[1:]
sys.path.insert(0, folder)
if moment == "compiling in the process":
    sys.frozen = True
import qrun_desktop
from PySide6.QtCore import QTimer

def started(window):
    window.settings.values["temperature"] = 0
    begun = []
    def check():
        done, total = window.worker.prompt_progress()
        if moment.startswith("compiling"):
            reached = "Preparing" in window.status.text()
        elif moment == "reading":
            reached = 0 < done < total - 1
        elif moment == "generating":
            reached = window.transcript.answer and len(window.transcript.answer.text) > 5
        else:
            reached = moment == "loading" or not window._busy
        if moment in ("reading", "generating") and not window._busy and not begun:
            begun.append(1)
            window.line.setPlainText("th" * (2000 if moment == "reading" else 1))
            window.send()
        if reached:
            timer.stop()
            QTimer.singleShot(100 if moment.startswith("compiling") else 0, close)
    def close():
        print(time.time(), flush=True)
        window.close()
    timer = QTimer(window, interval=5)
    timer.timeout.connect(check)
    timer.start()

status = qrun_desktop.main(["app", *arguments], started)
print([thread.name for thread in threading.enumerate()])
sys.exit(status)
"""


def close_at(moment: str, model: Path, folder: Path) -> tuple[float, list[str]]:
    """Runs the app and closes its window at that moment: how long it took from there to the end of the process, and
    what it printed after its end."""
    folder.mkdir()
    environment = os.environ | {name: str(folder) for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME")}
    if moment.startswith("compiling"):
        (folder / "cache").mkdir(mode=0o700)
        environment["QRUN_CACHE"] = str(folder / "cache")
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(FOLDER), moment, str(model)], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    output, errors = process.communicate(timeout=300)
    ended = time.time()
    assert process.returncode == 0 and "Traceback" not in errors, errors
    closed, *rest = output.splitlines()
    return ended - float(closed), rest


@pytest.mark.parametrize(
    "moment", ["idle", "loading", "reading", "generating", "compiling", "compiling in the process"]
)
def test_closing_the_window_ends_the_process_within_a_second(
    app: Any, slow_model: Path, tmp_path: Path, moment: str
) -> None:
    # Opening a file, and a kernel that is compiled in the process, cannot be ended: they go with the process, as does
    # on a busy machine what has not ended in time.
    ends = (["['MainThread']"],) if moment == "idle" else ([], ["['MainThread']"])
    for attempt in range(3):  # other programs may hold it up
        seconds, rest = close_at(moment, slow_model, tmp_path / str(attempt))
        if seconds < 1 and rest in ends:
            break
    assert seconds < 1 and rest in ends
