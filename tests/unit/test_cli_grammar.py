"""`qrun run` with schemas and grammars."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_fakes import make_model
from click.testing import CliRunner, Result

from qrun.cli import loading
from qrun.cli.main import cli


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    monkeypatch.setattr(loading, "load_model", lambda source, options: make_model())
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(cli, ["run", "m", "hi", *arguments])

    return invoke


def test_a_schema(run: Callable[..., Result], tmp_path: Path) -> None:
    Path("s.json").write_text(json.dumps({"type": "array", "items": {"enum": ["HI", 3]}, "minItems": 2, "maxItems": 3}))
    for chat in ([], ["--chat"]):
        result = run("--schema", "s.json", *chat)
        assert result.exit_code == 0 and 2 <= len(json.loads(result.stdout)) <= 3
    found = json.loads(run("--schema", "s.json", "--json").stdout)
    assert json.loads(found["text"]) and found["stop_reason"] == "stop"
    assert found["timings"]["forced_tokens"] > 0


def test_grammars_and_patterns(run: Callable[..., Result]) -> None:
    Path("g.gbnf").write_text('root ::= "answer: " ("yes" | "no")\n')
    assert run("--grammar", "g.gbnf").stdout in ("answer: yes\n", "answer: no\n")
    Path("g.lark").write_text('start: "<" ("a" | "b") ">"\n')
    assert run("--grammar", "g.lark", "--chat").stdout in ("<a>\n", "<b>\n")
    assert run("--regex", "[xyz]{3}").stdout.strip("xyz") == "\n"


def test_what_is_wrong_is_said_in_a_line(run: Callable[..., Result]) -> None:
    Path("s.json").write_text('{"type": "odd"}')
    Path("no.json").write_text("{")
    Path("binary").write_bytes(b"\xff\xfe\x00")
    Path("g.gbnf").write_text("root ::= missing\n")
    for arguments, message in (
        (["--schema", "s.json"], "schema: Invalid type: odd"),
        (["--schema", "no.json"], "no.json: schema: it is no JSON"),
        (["--schema", "binary"], "binary: it is no UTF-8 text"),
        (["--schema", "nowhere.json"], "'nowhere.json' does not exist"),
        (["--grammar", "g.gbnf"], "g.gbnf: grammar: neither Lark nor GBNF: Rule 'missing' not found"),
        (["--regex", "("], "regex: "),
        (["--regex", "a", "--schema", "s.json"], "--schema and --regex do not go together"),
    ):
        result = run(*arguments)
        said = result.stderr or str(result.exception)
        assert result.exit_code != 0 and message in said and len(said.splitlines()) < 5
