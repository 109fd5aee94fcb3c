"""The programs in `examples`, run as their first lines say, where the packages that they need are there."""

import builtins
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_model import ENDLESS, write_tiny_model

import qrun.engine

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("examples") / "model.gguf", pieces=ENDLESS)


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
        talk, printed = names["talk"], capsys.readouterr().out
        assert talk.last_stats.prompt_tokens and printed and printed == talk.messages[-1]["content"]
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
    others = {path.name for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "__pycache__"}
    tests = Path(__file__).parents[1]
    assert [name for name in others if not list(tests.glob(f"*/test_{name}.py"))] == []
