"""`qrun chat`: at a terminal (with a scripted line editor) and through a pipe."""

from __future__ import annotations

import io
import os
import re
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_fakes import make_model, runtime_of
from click.testing import CliRunner
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from qrun.cli import console, loading
from qrun.cli.answer import Display
from qrun.cli.chat import answer_lines
from qrun.cli.editor import LineEditor
from qrun.cli.history import chat_history
from qrun.cli.interrupts import Interrupts
from qrun.cli.main import cli
from qrun.cli.repl import Repl
from qrun.engine.conversation import Conversation

Line = str | type[BaseException]


@pytest.fixture
def chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a chat over lines (or what the editor raises) and returns what it prints."""

    def run(
        *lines: Line, conversation: Conversation | None = None, read: Callable[[], str] | None = None
    ) -> str:
        script = iter([*lines, EOFError])

        def read_script() -> str:
            line = next(script)
            if isinstance(line, str):
                return line
            raise line

        Repl(conversation or Conversation(make_model()), read=read or read_script).run()
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


def test_the_help_is_wrapped_at_words_in_a_narrow_terminal(
    chat: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = chat("/help").splitlines()
    assert max(map(len, lines)) < 40
    words = " ".join(" ".join(lines).split())
    assert "/think [on|off|auto] have the model think before it answers, or not" in words


def test_exit_leaves(chat: Callable[..., str]) -> None:
    assert chat("/exit", "never said") == ""


def test_unknown_commands_are_not_sent_to_the_model_but_paths_are(chat: Callable[..., str]) -> None:
    assert chat("/nonsense") == "There is no command /nonsense; /help lists them.\n"
    assert chat("/usr/bin?") == "/USR/BIN?!\n"
    assert chat("/hepl") == "There is no command /hepl; did you mean /help?\n"
    assert chat("/bye") == "There is no command /bye; did you mean /exit?\n"
    assert chat("/EXIT", "never said") == ""


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
    assert chat(f"/load {tmp_path}/talk.json", conversation=conversation).startswith("Loaded 1 turn from ")
    assert "Saved to " in chat(f'/save "{tmp_path}/two words"', conversation=conversation)
    assert (tmp_path / "two words.json").is_file()
    (tmp_path / "talk.npz").unlink()
    assert "reads it all again" in chat(f"/load {tmp_path}/talk", conversation=conversation)


def test_errors_are_one_line_and_the_chat_goes_on(chat: Callable[..., str], tmp_path: Path) -> None:
    printed = chat(f"/load {tmp_path}/missing", "/save", "/save /", "/save ..", "fault", "still here")
    assert "missing.json: No such file or directory" in printed
    assert printed.count("name a file") == 3
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


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


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
            ctrl_c()
        return rule(held)

    runtime.rule = interrupting
    printed = chat("hello there", "you", conversation=conversation)
    assert printed == "HE\n[stopped]\nYOU!\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.usefixtures("interrupts")
def test_a_second_ctrl_c_interrupts_whatever_goes_on(chat: Callable[..., str]) -> None:
    conversation = Conversation(make_model())
    went_on: list[bool] = []

    def answer(text: str, stopped: Callable[[], bool]) -> Iterator[str]:
        yield "a"
        ctrl_c()
        assert stopped()
        ctrl_c()
        went_on.append(True)
        yield "b"

    conversation.answer = answer  # type: ignore[method-assign]
    assert chat("hello", "/system", conversation=conversation) == "a\nSystem prompt: (none)\n"
    assert not went_on


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.usefixtures("interrupts")
def test_ctrl_c_between_enter_and_the_answer_stops_the_answer(chat: Callable[..., str]) -> None:
    """Wherever it comes: before the answer's generation is made, too."""
    model = make_model()
    render = model.chat_template.render  # type: ignore[union-attr]
    script = iter(["hello", "you", "there"])

    def read() -> str:
        line = next(script, None)
        if line is None:
            raise EOFError
        if line == "hello":
            ctrl_c()
        return line

    def render_slowly(messages: Any, **variables: Any) -> str:
        if messages[-1]["content"] == "you":
            ctrl_c()
        return render(messages, **variables)

    model.chat_template.render = render_slowly  # type: ignore[union-attr, method-assign]
    assert chat(conversation=Conversation(model), read=read) == "\n[stopped]\n\n[stopped]\nTHERE!\n"


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.usefixtures("interrupts")
def test_ctrl_c_while_a_talk_is_saved_leaves_the_old_one(
    chat: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation(make_model())
    chat("hello", f"/save {tmp_path}/talk", conversation=conversation)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("os.fsync", lambda descriptor: ctrl_c())
    assert chat("you", f"/save {tmp_path}/talk", "there", conversation=conversation) == "YOU!\n\nTHERE!\n"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("kind", ["dumb", ""])
def test_a_terminal_without_escape_sequences_is_sent_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    lines = iter(["hello\n", "", "you\n"])

    class Keyboard(io.StringIO):
        def readline(self, size: int | None = -1, /) -> str:
            if not (line := next(lines, "end")):
                ctrl_c()
            return line if line != "end" else ""

    monkeypatch.setattr("sys.stdin", Keyboard())
    Repl(Conversation(make_model())).run()
    printed = capsys.readouterr()
    assert printed.out.partition("\n")[2] == "> HELLO!\n> To leave: /exit or Ctrl-D.\n> YOU!\n> \n"
    assert printed.err == ""


# The line editor


@pytest.fixture
def editing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[LineEditor, Interrupts, Callable[[str], None]]]:
    """An editor, what notes Ctrl-C for it, and what types for it."""
    monkeypatch.setenv("QRUN_HOME", str(tmp_path / "home"))
    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        interrupts = Interrupts()
        yield LineEditor(["/help"], chat_history(), interrupts), interrupts, keyboard.send_text


def test_ctrl_c_right_after_enter_is_for_the_answer_and_not_for_the_next_line(editing: Any) -> None:
    editor, interrupts, type_text = editing
    type_text("hello\r\x03you\r")
    assert editor() == "hello"
    assert interrupts.noted
    interrupts.noted = False
    assert editor() == "you"
    assert not interrupts.noted


def test_ctrl_c_while_the_editor_gets_ready_is_for_its_line(editing: Any) -> None:
    editor, interrupts, type_text = editing
    interrupts.noted = True
    with pytest.raises(KeyboardInterrupt):
        editor()
    assert not interrupts.noted
    type_text("hello\r")
    assert editor() == "hello"


def test_what_is_typed_ahead_is_kept_up_to_ctrl_c(editing: Any) -> None:
    editor, interrupts, type_text = editing
    type_text("one\rtwo\rthr\x03four\r")
    assert editor() == "one"
    assert interrupts.noted
    interrupts.noted = False
    assert editor() == "four"  # as a terminal forgets what was typed before Ctrl-C
    type_text("five\rsix\r")
    assert [editor(), editor()] == ["five", "six"]
    assert not interrupts.noted


def test_ctrl_c_and_ctrl_d_at_the_prompt(editing: Any) -> None:
    editor, _, type_text = editing
    type_text("draft\x03\x03")  # the first clears the line
    with pytest.raises(KeyboardInterrupt):
        editor()
    type_text("\x04")
    with pytest.raises(EOFError):
        editor()


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_the_history_is_for_its_owner_alone(editing: Any, tmp_path: Path) -> None:
    editor, _, type_text = editing
    before = os.umask(0o022)
    try:
        type_text("a secret\r")
        editor()
        history = tmp_path / "home" / "history"
        assert stat.S_IMODE(history.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(history.stat().st_mode) == 0o600
        history.chmod(0o644)  # as older versions made it
        type_text("another\r")
        editor()
        assert stat.S_IMODE(history.stat().st_mode) == 0o600
    finally:
        os.umask(before)
    assert re.findall(r"^\+(.*)$", history.read_text(), re.M) == ["a secret", "another"]


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals")
def test_ctrl_c_right_after_enter_at_a_real_terminal(tmp_path: Path) -> None:
    """Typed at once; and the signal, once the terminal makes one of it again."""
    import fcntl
    import pty
    import termios

    script = (
        "import time; from cli_fakes import make_model, runtime_of; from qrun.engine.conversation import Conversation\n"
        "from qrun.cli.repl import Repl\n"
        "model = make_model(); runtime = runtime_of(model)\n"
        # Each token of an answer takes long: the rest of it must not be there before the signal is.
        "runtime.on_batch = lambda: time.sleep(0.02 if len(runtime.evaluated[-1]) > 1 else 0.5)\n"
        "Repl(Conversation(model)).run()"
    )
    master, terminal = pty.openpty()
    environment = os.environ | {"QRUN_HOME": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        cwd=Path(__file__).parent, env=environment,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    prompt = b"\x1b[?2004h"  # bracketed paste: the editor is there
    printed = b""

    def until(text: bytes, count: int = 1) -> None:
        nonlocal printed
        deadline = time.monotonic() + 60
        while printed.count(text) < count:
            assert select.select([master], [], [], max(deadline - time.monotonic(), 0))[0], printed
            printed += os.read(master, 4096)

    try:
        until(prompt)
        os.write(master, b"a long question, typed\r\x03")
        until(b"[stopped]")
        until(prompt, 2)
        os.write(master, b"a long question\r")
        until(b"A LO")
        os.write(master, b"\x03")
        until(b"[stopped]", 2)
        assert b"QUESTION" not in printed and b"To leave" not in printed and b"Traceback" not in printed
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_an_answer_cut_by_the_context_says_so(chat: Callable[..., str]) -> None:
    assert "[the context is full" in chat("x" * 60, conversation=Conversation(make_model(context=100)))


@pytest.mark.parametrize("text", ["\x1b[2J", "\x9b2J\x85", "\x07\x08\r\x7f"])
def test_control_characters_of_an_answer_do_not_reach_the_terminal(
    chat: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """Though each comes in a piece of its own, or in several."""
    visible = re.sub(r"[\x00-\x1f\x7f-\x9f]", "", text)
    assert chat(f"a{text}b") == f"A{text}B!\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert chat(f"a{text}b c\nd") == f"A{visible}B C\nD!\n"
    monkeypatch.setenv("TERM", "dumb")
    assert chat(f"a{text}b\tc\nd") == f"A{visible}B\tC\nD!\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"a{text}b"))
    answer_lines(Conversation(make_model()), Display())
    assert capsys.readouterr().out == f"A{visible}B!\n"


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


def test_the_model_s_own_settings_are_used_unless_others_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[str | None, dict[str, object]]] = []

    class Silent(Conversation):
        def __init__(self, model: Any, system: str | None, sampling: dict[str, Any], on_forget: Any) -> None:
            begun.append((system, sampling))
            super().__init__(model, system, {}, on_forget)

    monkeypatch.setattr("qrun.engine.conversation.Conversation", Silent)
    model = make_model()
    monkeypatch.setattr(loading, "load_model", lambda source, options: model)
    runner = CliRunner()
    runner.invoke(cli, ["chat", "fake.gguf"], input="")
    model = make_model()
    model.chat_system, model.chat_sampling = "be kind", {"temperature": 0.1, "top_p": 0.9}
    runner.invoke(cli, ["chat", "fake.gguf"], input="")
    model = make_model()
    model.chat_system, model.chat_sampling = "be kind", {"temperature": 0.1, "top_p": 0.9}
    runner.invoke(cli, ["chat", "fake.gguf", "--system", "", "--temperature", "1"], input="")
    assert begun == [
        (None, {}),
        ("be kind", {"temperature": 0.1, "top_p": 0.9}),
        ("", {"temperature": 1.0, "top_p": 0.9}),
    ]


def test_a_long_prompt_says_how_much_of_it_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(console, "READING_DELAY", 0.01)
    shown = threading.Event()

    def progress() -> tuple[int, int]:
        shown.set()
        return 512, 4000

    with console.while_reading(progress) as begun:
        assert shown.wait(60)
        begun()
        printed = capsys.readouterr().err
    assert re.match(r"\r\x1b\[Kreading the prompt  512/4000 tokens, \d+ s.*\r\x1b\[K$", printed, re.S)
