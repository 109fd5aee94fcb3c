"""Models that think, at the command line: what is shown, what is kept, what is computed again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_fakes import make_model, make_thinking_model, runtime_of, text_of
from click.testing import CliRunner, Result
from engine_fakes import ids_of

from qrun.cli import loading
from qrun.cli.answer import Display
from qrun.cli.console import echo
from qrun.cli.main import cli
from qrun.cli.repl import Repl
from qrun.engine import Model
from qrun.engine.conversation import Conversation

EMPTY = "<think>\n\n</think>\n\n"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """A command in a pipe, with a model that thinks."""

    def invoke(*arguments: str, model: Callable[[], Model] = make_thinking_model, lines: str = "") -> Result:
        monkeypatch.setattr(loading, "load_model", lambda source, options: model())
        return CliRunner().invoke(cli, list(arguments), input=lines)

    return invoke


def say(conversation: Conversation, text: str) -> str:
    return "".join(piece for piece in conversation.answer(text) if piece.channel == "content")


def evaluated(model: Model) -> list[str]:
    return [text_of(tokens) for tokens in runtime_of(model).evaluated]


# In a pipe


def test_thoughts_do_not_go_into_a_pipe(run: Callable[..., Result]) -> None:
    result = run("run", "m", "hi", "--chat")
    assert (result.stdout, result.stderr) == ("HI!\n", "")
    result = run("chat", "m", lines="hi\nyou\n")
    assert (result.stdout, result.stderr) == ("HI!\nYOU!\n", "")


def test_unless_they_are_asked_for(run: Callable[..., Result]) -> None:
    assert run("run", "m", "hi", "--chat", "--show-thoughts").stdout == "<think>\nhi?\n</think>\n\nHI!\n"
    assert run("chat", "m", "--show-thoughts", lines="hi\n").stdout == "<think>\nhi?\n</think>\n\nHI!\n"


def test_json_has_both(run: Callable[..., Result]) -> None:
    found = json.loads(run("run", "m", "hi", "--chat", "--json").stdout)
    assert (found["text"], found["reasoning"]) == ("HI!", "hi?")
    assert found["tokens"] == ids_of("<think>\nhi?\n</think>\n\nHI!")
    assert 0 < found["timings"]["reasoning_tokens"] < found["timings"]["generated_tokens"]


def test_no_think_answers_at_once(run: Callable[..., Result]) -> None:
    for options in (["--no-think"], ["--reasoning-budget", "0"]):
        found = json.loads(run("run", "m", "hi", "--chat", "--json", *options).stdout)
        assert (found["text"], found["reasoning"], found["tokens"]) == ("HI!", "", ids_of("HI!"))
        assert run("chat", "m", *options, "--show-thoughts", lines="hi\n").stdout == "HI!\n"


def test_a_budget_ends_a_thought(run: Callable[..., Result]) -> None:
    question = "a long question"
    found = json.loads(run("run", "m", question, "--chat", "--json", "--reasoning-budget", "9").stdout)
    assert (found["text"], found["reasoning"]) == (question.upper() + "!", "a long")
    assert found["stop_reason"] == "stop"


def test_an_answer_that_never_came_is_said(run: Callable[..., Result]) -> None:
    for arguments in (["run", "m", "hi", "--chat"], ["chat", "m"]):
        result = run(*arguments, "--max-tokens", "9", lines="hi\n")
        assert result.stdout == "\n"
        assert "still thinking" in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", [["run", "m", "hi", "--chat"], ["chat", "m"]])
def test_a_model_that_cannot_think_says_so(run: Callable[..., Result], command: list[str]) -> None:
    result = run(*command, "--think", model=make_model, lines="hi\n")
    assert result.exit_code == 1 and result.stdout == ""
    assert "fake.gguf does not think" in str(result.exception)
    assert run(*command, "--no-think", model=make_model, lines="hi\n").stdout == "HI!\n"


def test_options_of_chat_need_chat(run: Callable[..., Result]) -> None:
    for option in (["--think"], ["--no-think"], ["--reasoning-budget", "3"]):
        result = run("run", "m", "hi", *option)
        assert (result.exit_code, "needs --chat" in result.stderr) == (2, True)


def test_a_text_that_is_no_turn_is_left_alone(run: Callable[..., Result]) -> None:
    assert run("run", "m", "(u)hi</s>(a)").stdout == "<think>\nhi?\n</think>\n\nHI!\n"


# Conversations


def test_thoughts_are_for_the_template_to_show_again() -> None:
    model = make_thinking_model("false")
    conversation = Conversation(model)
    assert say(conversation, "one") == "ONE!"
    assert conversation.messages == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "ONE!", "reasoning_content": "one?"},
    ]
    runtime_of(model).evaluated.clear()
    assert say(conversation, "two") == "TWO!"
    assert evaluated(model)[0] == "ONE!</s>(u)two</s>(a)"  # the thought is gone, and what followed it is read again


def test_nothing_is_read_again_where_the_template_shows_them() -> None:
    model = make_thinking_model("true")
    conversation = Conversation(model)
    say(conversation, "one")
    runtime_of(model).evaluated.clear()
    assert say(conversation, "two") == "TWO!"
    assert evaluated(model)[0] == "</s>(u)two</s>(a)"
    assert text_of(conversation.session.tokens).startswith("(u)one</s>(a)<think>\none?\n</think>\n\nONE!</s>(u)two")


def test_a_turn_with_a_thought_and_no_answer_leaves_no_trace() -> None:
    conversation = Conversation(make_thinking_model("true"), sampling={"max_tokens": 9})
    assert say(conversation, "one") == ""
    assert (conversation.only_thought, conversation.messages) == (True, [])
    conversation.sampling = {}
    assert say(conversation, "two") == "TWO!"
    assert not conversation.only_thought
    assert len(conversation.messages) == 2


def test_thinking_can_be_switched_between_turns() -> None:
    model = make_thinking_model("true")
    conversation = Conversation(model)
    say(conversation, "one")
    conversation.think = False
    runtime_of(model).evaluated.clear()
    assert say(conversation, "two") == "TWO!"
    assert evaluated(model)[0] == f"</s>(u)two</s>(a){EMPTY}"
    assert "reasoning_content" not in conversation.messages[-1]


def test_thoughts_are_saved_and_loaded(tmp_path: Path) -> None:
    conversation = Conversation(make_thinking_model("true"))
    say(conversation, "one")
    conversation.save(tmp_path / "talk.json")
    model = make_thinking_model("true")
    other = Conversation(model)
    assert not other.load(tmp_path / "talk.json") or other.messages == conversation.messages
    assert other.messages == conversation.messages
    assert say(other, "two") == "TWO!"


def test_a_thought_that_fills_the_context_goes_on_without_the_oldest_turns() -> None:
    forgotten: list[int] = []
    conversation = Conversation(make_thinking_model(context=120), on_forget=forgotten.append)
    say(conversation, "a" * 10)
    question = "c" * 25
    assert say(conversation, question) == question.upper() + "!"
    assert sum(forgotten) == 2
    assert conversation.messages[-1]["reasoning_content"] == question + "?"


# At a terminal


@pytest.fixture
def chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    def talk(*lines: str, model: Model | None = None, **options: Any) -> str:
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        monkeypatch.setenv("TERM", "xterm")
        script = iter(lines)

        def read() -> str:
            line = next(script, None)
            if line is None:
                raise EOFError
            return line

        Repl(Conversation(model or make_thinking_model()), Display(**options), read).run()
        return capsys.readouterr().out.partition("\n")[2]

    return talk


def test_thoughts_are_dim_at_a_terminal(chat: Callable[..., str]) -> None:
    assert chat("hi", plain=True) == "\x1b[2mhi?\x1b[m\n\nHI!\n"
    rendered = chat("hi")
    assert "\x1b[2mhi?" in rendered and rendered.endswith("HI!\n") and "think" not in rendered
    assert chat("hi", show_thoughts=False) == "HI!\n"


@pytest.mark.parametrize("plain", [True, False])
def test_what_is_forgotten_is_said_in_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], plain: bool
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    display = Display(plain)

    def on_forget(n: int) -> None:
        display.make_way()
        echo("[forgotten]")

    conversation = Conversation(make_model(context=100), on_forget=on_forget)
    list(conversation.answer("a" * 10))
    list(conversation.answer("b"))
    question = "c" * 27  # with its answer more than the context, though there is room to begin
    with display.answer() as answer:
        for piece in conversation.answer(question):
            answer.push(piece)
    printed = capsys.readouterr().out
    before, _, after = printed.partition("[forgotten]\n")
    assert before.startswith("C") and before.endswith("\n")
    assert (before + after).replace("\n", "") == question.upper() + "!"


def test_slash_think(chat: Callable[..., str]) -> None:
    printed = chat("/think", "/think off", "hi", "/think on", "/think auto", "/think maybe", "/stats", plain=True)
    assert [line for line in printed.splitlines() if line.startswith("Thinking")] == [
        "Thinking: auto", "Thinking: off", "Thinking: on", "Thinking: auto"
    ]  # fmt: skip
    assert "\nHI!\n" in printed and "\x1b" not in printed
    assert chat("/think on", model=make_model()) == ""  # an error, on standard error


def test_stats_count_thoughts(chat: Callable[..., str]) -> None:
    assert " of them thoughts)" in chat("hi", "/stats", plain=True)


def test_an_answer_that_never_came_is_said_at_a_terminal(chat: Callable[..., str]) -> None:
    model = make_thinking_model()
    model.defaults = model.defaults.replace(max_tokens=9)
    model._host.defaults = model.defaults
    assert chat("hi", model=model, plain=True).endswith("[there is no answer: the model was still thinking]\n")
