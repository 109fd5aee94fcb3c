"""The documentation: every public name says what it is, the pages are built, the tutorial is run from top to end."""

import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_model import ENDLESS, write_tiny_model

from qrun.engine.sampling.options import SamplingOptions
from qrun.models.catalog import CATALOG

ROOT = Path(__file__).parents[2]
TUTORIAL = ROOT / "docs" / "tutorial.md"


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("pdoc")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import build

    return build


def undocumented(module: Any) -> Iterator[str]:
    """Public names without a word: classes, functions, methods, and attributes that neither have a docstring of their
    own nor are named in that of their class."""
    import pdoc.doc

    def within(documented: Any, text: str) -> Iterator[str]:
        for member in documented.members.values():
            foreign = member.is_inherited and not member.taken_from[0].startswith("qrun")
            if member.name.startswith("_") or foreign:
                continue
            named = re.search(rf"\b{member.name}\b(?:, \w+)*: |`{member.name}`", text)
            if not member.docstring and not (isinstance(member, pdoc.doc.Variable) and named):
                yield member.fullname
            if isinstance(member, pdoc.doc.Class) and not issubclass(member.obj, enum_types):
                yield from within(member, member.docstring)

    from enum import Enum

    enum_types = (Enum,)
    for name in module.__all__:
        getattr(module, name)
    yield from within(pdoc.doc.Module(module), "")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["qrun.engine", "qrun.formats", "qrun.server"])
def test_every_public_name_says_what_it_is(name: str) -> None:
    pytest.importorskip("pdoc")
    pytest.importorskip("starlette")
    missing = set(undocumented(importlib.import_module(name)))
    of_sampling = {f"qrun.engine.GenerationArguments.{field}" for field in SamplingOptions.__dataclass_fields__}
    assert missing <= of_sampling, missing - of_sampling


@pytest.mark.parametrize(
    ("docstring", "markdown"),
    [
        ("One line.", "One line."),
        ("Say.\n\nfirst: a thing\n    that goes on\nsecond, third: two", "Say.\n\n- **first**: a thing that goes on\n"
         "- **second, third**: two"),
        ("path: the file. n_tokens: how many; context: none. eos: it", "- **path**: the file.\n"
         "- **n_tokens**: how many;\n- **context**: none.\n- **eos**: it"),
        ("Raises ValueError: never.", "Raises ValueError: never."),
        ("As in:\n\n    x = 1\n    y: int = 2", "As in:\n\n        x = 1\n        y: int = 2"),
        ('One of:\n  "a"  this\n  "b"  that', 'One of:\n\n      "a"  this\n      "b"  that'),
    ],
)  # fmt: skip
def test_docstrings_become_markdown(build: Any, docstring: str, markdown: str) -> None:
    assert build.as_markdown(docstring) == markdown


def test_the_pages_are_built(build: Any, tmp_path: Path) -> None:
    pytest.importorskip("starlette")
    command = [sys.executable, str(ROOT / "docs" / "build.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "qrun" / "engine.html").read_text("utf-8")
    import qrun.engine

    for name in qrun.engine.__all__:
        assert f'id="{name}"' in page
    assert "<li><strong>threads</strong>: threads that compute" in page.replace("\n", "")
    assert (tmp_path / "qrun" / "formats.html").exists() and (tmp_path / "qrun" / "server.html").exists()


PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/*/*.md"))]


def anchors(page: str) -> set[str]:
    """What links can name on a page: its headings in small letters, with hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text("utf-8")), link


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    assert all(f"]({path.name})" in index for path in ROOT.glob("docs/*.md") if path.name != "README.md")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a tiny model lies in the place of the one that the tutorial names."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "models").mkdir()
    write_tiny_model(folder / "models" / CATALOG["SmolLM2-135M-Instruct"].file_name, pieces=ENDLESS)
    return folder


def test_the_tutorial(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llguidance")
    pytest.importorskip("uvicorn")
    monkeypatch.setenv("QRUN_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    qrun = tmp_path / "qrun"
    qrun.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qrun.cli.main "$@"\n')
    qrun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", TUTORIAL.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in blocks].count("python") >= 7
    for kind, text in blocks:
        if kind == "python":
            exec(compile(text, str(TUTORIAL), "exec"), names)
            assert capfd.readouterr().out or "def weather" in text  # a line, which a random model may leave empty
        elif kind == "sh" and "serve" in text:
            run_server(text)
        elif kind == "sh" and shutil.which("sh"):
            done = subprocess.run(["sh", "-e", "-c", text], capture_output=True, text=True, timeout=300)
            assert done.returncode == 0 and done.stdout.strip(), done.stderr
        else:
            assert text.startswith("pip install")


def run_server(text: str) -> None:
    """The commands that start a server and ask it, on a port that is free."""
    start, ask = text.strip().split("\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(start.removesuffix(" &").replace("8080", str(port)).split(), stderr=subprocess.DEVNULL)
    match = re.fullmatch(r"curl (\S+) --json '(.*)'", ask)
    assert match
    url = match[1].replace("8080", str(port))
    request = urllib.request.Request(url, match[2].encode(), {"Content-Type": "application/json"})
    try:
        for _ in range(300):
            try:
                with urllib.request.urlopen(request) as response:
                    assert json.load(response)["choices"][0]["message"]["content"]
                break
            except OSError:
                time.sleep(0.1)
        else:
            raise AssertionError("the server does not answer")
    finally:
        process.terminate()
        process.wait(60)
