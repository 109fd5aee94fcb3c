"""`qrun chat`: at a terminal (with a scripted line editor) and through a pipe."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_fakes import make_model, runtime_of
from click.testing import CliRunner

from qrun.cli import console, loading
from qrun.cli.conversation import Conversation
from qrun.cli.main import cli
from qrun.cli.repl import Repl, stopping_at_interrupt
from qrun.models.catalog import CATALOG, DEFAULT_MODEL

Line = str | type[BaseException]


@pytest.fixture
def chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a chat over lines (or what the editor raises) and returns what it prints."""

    def run(*lines: Line, conversation: Conversation | None = None) -> str:
        script = iter([*lines, EOFError])

        def read() -> str:
            line = next(script)
            if isinstance(line, str):
                return line
            raise line

        Repl(conversation or Conversation(make_model()), read).run()
        printed = capsys.readouterr()
        assert printed.err == "" or printed.err.startswith("qrun: ")
        return printed.out.partition("\n")[2] + printed.err

    return run


def test_answers_are_printed(chat: Callable[..., str]) -> None:
    assert chat("hello", "", "  ", "you") == "HELLO!\nYOU!\n"


def test_slash_help_lists_every_command(chat: Callable[..., str]) -> None:
    printed = chat("/help")
    for command in ("/help", "/system", "/clear", "/save", "/load", "/stats", "/exit", "Ctrl-C"):
        assert command in printed


def test_exit_leaves(chat: Callable[..., str]) -> None:
    assert chat("/exit", "never said") == ""


def test_unknown_commands_are_not_sent_to_the_model_but_paths_are(chat: Callable[..., str]) -> None:
    assert chat("/nonsense") == "There is no command /nonsense; /help lists them.\n"
    assert chat("/usr/bin?") == "/USR/BIN?!\n"


def test_system_shows_sets_and_removes(chat: Callable[..., str]) -> None:
    printed = chat("/system", "/system be kind", "/system -")
    assert printed.splitlines() == ["System prompt: (none)", "System prompt: be kind", "System prompt: (none)"]


def test_clear_forgets(chat: Callable[..., str]) -> None:
    conversation = Conversation(make_model())
    chat("hello", "/clear", conversation=conversation)
    assert conversation.messages == []


def test_save_and_load(chat: Callable[..., str], tmp_path: Path) -> None:
    printed = chat("hello", f"/save {tmp_path}/talk")
    assert f"Saved to {tmp_path}/talk.json and {tmp_path}/talk.npz." in printed
    conversation = Conversation(make_model())
    assert chat(f"/load {tmp_path}/talk.json", conversation=conversation).startswith("Loaded 1 turns")
    (tmp_path / "talk.npz").unlink()
    assert "reads it all again" in chat(f"/load {tmp_path}/talk", conversation=conversation)


def test_errors_are_one_line_and_the_chat_goes_on(chat: Callable[..., str], tmp_path: Path) -> None:
    printed = chat(f"/load {tmp_path}/missing", "/save", "fault", "still here")
    assert "missing.json: No such file or directory" in printed
    assert "name a file" in printed
    assert "the template does not like this" in printed
    assert "STILL HERE!" in printed


def test_stats_tell_counts_and_times(chat: Callable[..., str]) -> None:
    assert chat("/stats") == "There has been no answer yet.\n"
    printed = chat("hello", "you", "/stats")
    assert "prompt   29 tokens: 18 known already, 11 read" in printed
    assert "answer   5 tokens" in printed
    assert "of 200 tokens" in printed


def test_ctrl_c_at_the_prompt_says_how_to_leave(chat: Callable[..., str]) -> None:
    assert chat(KeyboardInterrupt, "hello") == "To leave: /exit or Ctrl-D.\nHELLO!\n"


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C interrupts, even where the tests themselves were started so that it does not: in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.usefixtures("interrupts")
def test_ctrl_c_stops_the_answer_and_keeps_the_session(chat: Callable[..., str]) -> None:
    model = make_model()
    conversation = Conversation(model)
    runtime = runtime_of(model)
    rule = runtime.rule

    def interrupting(held: list[int]) -> int:
        if len(held) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return rule(held)

    runtime.rule = interrupting
    printed = chat("hello there", "you", conversation=conversation)
    assert printed == "HE\n[stopped]\nYOU!\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.usefixtures("interrupts")
def test_a_second_ctrl_c_interrupts() -> None:
    stopped: list[bool] = []
    with pytest.raises(KeyboardInterrupt), stopping_at_interrupt(lambda: stopped.append(True)):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert stopped == [True]


def test_an_answer_cut_by_the_context_says_so(chat: Callable[..., str]) -> None:
    assert "[the context is full" in chat("x" * 60, conversation=Conversation(make_model(context=100)))


def test_control_characters_of_an_answer_do_not_reach_the_terminal(chat: Callable[..., str]) -> None:
    assert chat("a\x1b[2Jb\x07") == "A[2JB!\n"


# Through a pipe


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    def run(lines: str, *arguments: str, context: int = 200):
        monkeypatch.setattr(loading, "load_model", lambda source, options: make_model(context))
        return CliRunner().invoke(cli, ["chat", "fake.gguf", *arguments], input=lines)

    return run


def test_each_line_is_a_turn_and_only_answers_are_printed(pipe) -> None:
    result = pipe("hello\n\n/clear\nlast one")
    assert result.exit_code == 0, result.output
    assert result.stdout == "HELLO!\n/CLEAR!\nLAST ONE!\n"
    assert result.stderr == ""


def test_options_reach_the_sampler(pipe) -> None:
    assert pipe("hello\n", "--max-tokens", "2").stdout == "HE\n"
    assert pipe("hello\n", "--stop", "LO", "--stop", "?").stdout == "HEL\n"
    h = 2 + ord("H")
    assert pipe("hello\n", "--logit-bias", f"{h}=-100", "--max-tokens", "1").stdout != "H\n"


def test_forgetting_is_said_on_standard_error(pipe) -> None:
    result = pipe("".join(f"turn {i}\n" for i in range(8)), context=100)
    assert result.stdout == "".join(f"TURN {i}!\n" for i in range(8))
    assert "the context of 100 tokens is full: the oldest" in result.stderr


def test_the_default_model_is_used_and_fetched_once(pipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QRUN_HOME", str(tmp_path))
    asked: list[str] = []
    monkeypatch.setattr(loading, "pull_with_progress", lambda spec, announcement: asked.append(announcement))
    monkeypatch.setattr(loading, "load_model", lambda source, options: (asked.append(source), make_model())[1])
    result = CliRunner().invoke(cli, ["chat"], input="hi\n")
    assert result.stdout == "HI!\n"
    announcement, source = asked
    assert "SmolLM2-135M-Instruct (92.9 MB, Apache-2.0)" in announcement
    assert source == "SmolLM2-135M-Instruct"


def test_the_catalog_s_settings_are_used_unless_others_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[str | None, dict[str, object]]] = []

    class Silent(Conversation):
        def __init__(self, model: Any, system: str | None, sampling: dict[str, Any], on_forget: Any) -> None:
            begun.append((system, sampling))
            super().__init__(model, system, {}, on_forget)

    monkeypatch.setattr("qrun.cli.conversation.Conversation", Silent)
    monkeypatch.setattr(loading, "load_model", lambda source, options: make_model())
    runner = CliRunner()
    runner.invoke(cli, ["chat", "smollm2-135m-instruct"], input="")
    runner.invoke(cli, ["chat", "smollm2-135m-instruct", "--system", "", "--temperature", "1"], input="")
    runner.invoke(cli, ["chat", "fake.gguf"], input="")
    assert begun[0] == (CATALOG[DEFAULT_MODEL].system, CATALOG[DEFAULT_MODEL].sampling)
    assert begun[1] == ("", {**CATALOG[DEFAULT_MODEL].sampling, "temperature": 1.0})
    assert begun[2] == (None, {})


def test_a_long_prompt_says_how_much_of_it_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(console, "READING_DELAY", 0.01)
    shown = threading.Event()

    def progress() -> tuple[int, int]:
        shown.set()
        return 512, 4000

    with console.while_reading(progress) as begun:
        assert shown.wait(10)
        begun()
        printed = capsys.readouterr().err
    assert re.match(r"\r\x1b\[Kreading the prompt  512/4000 tokens, 0 s.*\r\x1b\[K$", printed, re.S)
