"""Answers at a terminal: Markdown while it comes, wrapped at words, written once."""

from __future__ import annotations

import io
import random
import re
import subprocess
import sys
import time
from typing import Any
from unittest import mock

import pytest
from terminal import Terminal

from qrun.cli.answer import Display, PlainView
from qrun.cli.markdown import MarkdownView, inline
from qrun.cli.painter import Painter

PROSE = "The quick brown fox jumps over the lazy dog and runs away from all the others. " * 4


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


class Output(io.StringIO):
    """Standard output, a terminal unless it is told otherwise."""

    encoding = "utf-8"  # type: ignore[assignment]
    is_terminal = True

    def isatty(self) -> bool:
        return self.is_terminal


def view_of(terminal: Terminal, **options: Any) -> MarkdownView:
    with mock.patch("sys.stdout", Output()):
        return MarkdownView(terminal.write, terminal.size, **options)


def shown(
    text: str, size: int = 3, terminal: Terminal | None = None, channel: str = "content", fast: bool = False
) -> Terminal:
    """A terminal after an answer in pieces of this size (0: of any), each drawn, or only as often as it may be."""
    terminal = terminal or Terminal()
    ticks = iter(range(10**9))
    view = view_of(terminal, clock=lambda: next(ticks) * (1e-9 if fast else 1.0))
    pieces = random.Random(text)
    at = 0
    while at < len(text):
        step = size or pieces.randint(1, 9)
        view.push(text[at : at + step], channel)
        at += step
    view.end()
    return terminal


BLOCKS = {
    "a heading": ("## The *title* ##\ntext", ["The title", "text"]),
    "words are kept whole": (
        "aaaaaaaaaaaaaaa bbbbbbbbbbbbbbbbb ccccccccccccccc ddd",
        ["aaaaaaaaaaaaaaa bbbbbbbbbbbbbbbbb", "ccccccccccccccc ddd"],
    ),
    "one too long for a row": ("x" * 50, ["x" * 39, "x" * 11]),
    "wide characters": ("一二三四五六七八九" * 3, ["一二三四五六七八九一二三四五六七八九一", "二三四五六七八九"]),
    "words among wide characters": (
        "使用 Python 编程语言可以很方便地处理数据并且不需要太多的代码。",
        ["使用 Python 编程语言可以很方便地处理数", "据并且不需要太多的代码。"],
    ),
    "punctuation stays with its character": (
        "一二三四五六七八九十一二三四五六七八九。「一」", ["一二三四五六七八九十一二三四五六七八", "九。「一」"]
    ),
    "joined emoji": ("x" * 36 + "👩\u200d🚀 y", ["x" * 36, "👩\u200d🚀 y"]),
    "emoji": ("🎉" * 25, ["🎉" * 19, "🎉" * 6]),
    "empty lines": ("\n\na\n\n\n\nb\n\n", ["a", "", "b", ""]),
    "a list": (
        "- one\n* two which is longer than the row and is wrapped\n  - three\n10. ten\n1) one",
        ["• one", "• two which is longer than the row and", "  is wrapped", "  • three", "10. ten", "1) one"],
    ),
    "no list": ("-x\n1.5 is\n-\n*a*", ["-x", "1.5 is", "-", "a"]),
    "a quote": ("> a **b**\n>\n>> c", ["│ a b", "│", "│ │ c"]),
    "a rule": ("a\n\n---\n***\n", ["a", "", "─" * 39, "─" * 39]),
    "code": (
        "```python\nif a:\n    b = '*no*'\n\n    # `c`\n```\nafter",
        ["```python", "if a:", "    b = '*no*'", "", "    # `c`", "```", "after"],
    ),
    "code in a list": ("- a:\n\n  ```\n  x\n    y\n  ```\n  b", ["• a:", "", "  ```", "x", "  y", "```", "  b"]),
    "code that is not ended": ("~~~\n```\nx", ["~~~", "```", "x"]),
    "ticks within code": ("````\n```\n````\n*a*", ["````", "```", "````", "a"]),
    "a table": (
        "| a | b |\n|--:|:-:|\n| 1 | `x|y` |\n| 22 | long |\n\nafter",
        [" a │  b", "───┼─────", " 1 │ x|y", "22 │ long", "", "after"],
    ),
    "a row alone": ("| a | b |\ntext", ["| a | b |", "text"]),
    "a row and something else": ("| a | b |\n| c | d |\n|---|---|\n| 1 | 2 |", [
        "| a | b |", "c │ d", "──┼──", "1 │ 2"]),
    "a table that is too wide": (
        "| key | a column with a long text |\n|---|---|\n| k | words and more words and yet more words |",
        ["key │ a column with a long text", "────┼" + "─" * 34, "k   │ words and more words and yet more",
         "    │ words"],
    ),
    "a table with too few or too many cells": (
        "| a | b |\n|---|---|\n| 1 |\n| 1 | 2 | 3 |", ["a │ b", "──┼──", "1 │", "1 │ 2"]
    ),
    "indentation": ("a\n    b\n  c", ["a", "    b", "  c"]),
    "an address": ("see [the *docs*](https://a.b/c_(d)) now", ["see the docs (https://a.b/c_(d)) now"]),
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 5, 0, 1000])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str, size: int, fast: bool) -> None:
    """However they come."""
    text, rows = BLOCKS[name]
    terminal = shown(text, size, fast=fast)
    assert terminal.text[:-1] == rows
    assert terminal.text[-1] == "" and terminal.x == 0


def test_a_window_too_narrow_for_a_table_shows_its_source() -> None:
    table = "| a | b | c | d |\n|---|---|---|---|\n| 1 | 2 | 3 | 4 |"
    assert "| 1 | 2 | 3 | 4 |".replace(" ", "") in "".join(shown(table, terminal=Terminal(16)).text).replace(" ", "")


@pytest.mark.parametrize("width", [2, 3, 5, 10, 200])
def test_any_width(width: int) -> None:
    for text, _ in BLOCKS.values():
        shown(text, 0, Terminal(width, 50))


INLINE = {
    "**a** b": ("a b", {"bold"}),
    "__a :__ *b* _c_": ("a : b c", {"bold", "italic"}),
    "***a***": ("a", {"bold italic"}),
    "**a *b* c**": ("a b c", {"bold", "italic"}),
    "~~a~~": ("a", {"strike"}),
    "`a*b*`": ("a*b*", {"cyan"}),
    "`` a`b ``": ("a`b", {"cyan"}),
    "2 * 3 * 4": ("2 * 3 * 4", set()),
    "snake_case_name and __init__.py": ("snake_case_name and __init__.py", set()),
    "a**b**c": ("abc", {"bold"}),
    "**a": ("**a", set()),
    "*a": ("*a", set()),
    "a `b": ("a `b", set()),
    "**`a**`": ("**a**", {"cyan"}),
    r"\*a\* \`b\` \(x\) \n": (r"*a* `b` \(x\) \n", set()),
    "[a](b) [c] (d) [e]()": ("a (b) [c] (d) e", {"underline", "dim"}),
    "![pic](u.png)": ("pic (u.png)", {"underline", "dim"}),
    "[https://a.b](https://a.b)": ("https://a.b", {"underline"}),
    "<b>a</b> & &amp;": ("<b>a</b> & &amp;", set()),
    "[bold]a[/bold]": ("[bold]a[/bold]", set()),
    "****": ("****", set()),
    "": ("", set()),
}


@pytest.mark.parametrize("text", INLINE)
def test_marks_within_a_line(text: str) -> None:
    plain, styles = INLINE[text]
    found = inline(text, is_finished=True)
    assert (found.plain, {str(span.style) for span in found.spans if span.style}) == (plain, styles)


@pytest.mark.parametrize(
    ("text", "plain", "styles"),
    [
        ("a **b", "a b", {"bold"}),
        ("a **", "a ", set()),
        ("a **b*", "a b", {"bold"}),
        ("a `b", "a b", {"cyan"}),
        ("**a *b", "a b", {"bold", "italic"}),
        ("2 *", "2 ", set()),
        ("a* b", "a* b", set()),
    ],
)
def test_what_is_opened_counts_while_a_line_comes(text: str, plain: str, styles: set[str]) -> None:
    found = inline(text, is_finished=False)
    assert (found.plain, {str(span.style) for span in found.spans if span.style}) == (plain, styles)


def test_marks_without_end_take_no_time() -> None:
    start = time.process_time()
    for mark in ("*a ", "**a ", "_a ", "`a ``", "[a](", "~~a "):
        shown(mark * 2000, 1000)
    assert time.process_time() - start < 20  # 0.6 on a busy machine; many times that if each mark looked at all others


# What is written


def test_finished_text_is_written_once() -> None:
    """The rows of a block of code, of a list and of a table that are all taller than the window."""
    code = "```\n" + "".join(f"line {i}\n" for i in range(40)) + "```\n"
    points = "".join(f"- point {i} of a list with a text\n" for i in range(40))
    table = "| n | square |\n|---|---|\n" + "".join(f"| {i} | {i * i} |\n" for i in range(40))
    terminal = shown(code + points + "\n" + table, 5)
    text = "\n".join(terminal.text)
    for i in range(40):
        assert len(re.findall(rf"^line {i}$", text, re.M)) == 1
        assert len(re.findall(rf"point {i} of", text)) == 1
        assert len(re.findall(rf"^{i} *│ {i * i}$", text, re.M)) == 1
    assert terminal.sent.count("point 7 ") == 1


def test_a_growing_line_is_not_written_again() -> None:
    terminal = shown(PROSE, 4)
    assert len(terminal.sent) < 2.5 * len(PROSE)
    assert "\x1b[J" not in terminal.sent.replace("\x1b[K\x1b[J", "")  # nothing is cleared before it is written


def test_a_word_that_moves_to_the_next_row_leaves_nothing_behind() -> None:
    terminal = shown("a" * 30 + " bbbbbbbbbbbb", 1)
    assert terminal.text == ["a" * 30, "bbbbbbbbbbbb", ""]


def test_code_can_be_copied() -> None:
    """Each line as it is: not wrapped, nothing before or after it, tabs as tabs."""
    line = "x = [" + ", ".join(map(str, range(40))) + "]"
    for size in (1, 7, 1000):
        terminal = shown(f"```\n{line}\n\ty\n```\n", size)
        plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", terminal.sent)
        assert f"\n{line}\n\ty\n" in plain


def test_a_fast_model_is_not_held_up() -> None:
    """A line under way is drawn only so often."""
    drawn: list[str] = []
    now = [0.0]
    terminal = Terminal(80)
    terminal.write = drawn.append  # type: ignore[method-assign]
    view = view_of(terminal, clock=lambda: now[0])
    for _ in range(1000):
        now[0] += 0.001
        view.push("word ")
    view.end()
    assert len(drawn) < 60


def test_control_characters_do_not_reach_the_terminal() -> None:
    for channel in ("content", "reasoning"):
        terminal = shown("a\x1b[2Jb\x9b2J\x07\r\x08c `\x1b]8;;x\x07d`\n```\n\x1b[31me\n```", 1, channel=channel)
        assert "[2Jb2Jc" in "".join(terminal.text)
        assert not set(terminal.sent) & set("\x07\x08\x9b")


@pytest.mark.parametrize("new_width", [20, 70])
def test_a_window_that_changes_while_a_line_comes(new_width: int) -> None:
    """What is there stays, and the line goes on below it: every character stands once."""
    terminal = Terminal(40, 30)
    view = view_of(terminal, clock=iter(range(10**6)).__next__)
    text = PROSE + "**bold** end"
    for i, char in enumerate(text):
        if i == 150:
            terminal.width = new_width
        view.push(char)
    view.end()
    assert "".join(terminal.text).replace(" ", "") == text.replace(" ", "").replace("*", "")
    assert max(map(len, terminal.text[-4:])) > 15


def test_an_answer_makes_way_for_a_notice() -> None:
    terminal = Terminal(40, 30)
    view = view_of(terminal, clock=iter(range(10**6)).__next__)
    text = PROSE + "**bold** end"
    for i, char in enumerate(text):
        if i == 150:
            view.make_way()
            terminal.write("qrun: a notice\n")
        view.push(char)
    view.end()
    rows = terminal.text
    at = rows.index("qrun: a notice")
    kept = "".join(rows[:at] + rows[at + 1 :]).replace(" ", "")
    assert kept == text.replace(" ", "").replace("*", "")


def test_painter_stays_within_the_window() -> None:
    terminal = Terminal(20, 4)
    painter = Painter(terminal.write, terminal.size)
    painter.show([f"row {i}" for i in range(8)])
    painter.show([f"new {i}" for i in range(8)])
    assert terminal.text == ["row 0", "row 1", "row 2", "row 3", "new 4", "new 5", "new 6", "new 7"]
    painter.show(["new 7"])
    painter.keep()
    assert terminal.y == len(terminal.rows) - 1


# Terminals


def test_thoughts_are_dim_and_apart() -> None:
    terminal = Terminal()
    view = view_of(terminal)
    view.push("I *think*.\n\n\nSo", "reasoning")
    view.push("# Yes")
    view.end()
    assert terminal.text == ["I *think*.", "", "So", "", "Yes", ""]
    assert {"2", "1"} <= {part for style in terminal.styles for part in style.split(";")}


def test_colours_are_left_out_where_they_are_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "36" in shown("`a` **b**").styles
    monkeypatch.setenv("NO_COLOR", "1")
    assert {style for style in shown("`a` **b**\n```\nc\n```").styles if style.startswith("3")} <= {"3"}


def test_a_terminal_that_lacks_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Output, "encoding", "ascii")
    text = "- a\n> b\n\n---\n| c | d |\n|---|---|\n"
    assert "".join(shown(text).text).isascii()


@pytest.mark.parametrize(
    ("kind", "is_terminal", "plain", "rendered"),
    [
        ("xterm", True, False, True),
        ("xterm", True, True, False),
        ("xterm", False, False, False),
        ("dumb", True, False, False),
        ("", True, False, False),
    ],
)
def test_what_is_rendered(
    monkeypatch: pytest.MonkeyPatch, kind: str, is_terminal: bool, plain: bool, rendered: bool
) -> None:
    monkeypatch.setenv("TERM", kind)
    output = Output()
    output.is_terminal = is_terminal
    with mock.patch("sys.stdout", output), Display(plain).answer() as view:
        assert isinstance(view._view, MarkdownView) is rendered
        assert isinstance(view._view, PlainView) is not rendered
        view.push("**a**")
    assert output.getvalue() == "**a**\n" if not rendered else "\x1b[1ma" in output.getvalue()


def test_an_answer_that_is_broken_off_leaves_the_terminal_as_it_was() -> None:
    output = Output()
    with mock.patch("sys.stdout", output), pytest.raises(KeyboardInterrupt), Display().answer() as view:
        view.push("**bold and `code")
        raise KeyboardInterrupt
    terminal = Terminal()
    terminal.write(output.getvalue())
    assert terminal.text == ["**bold and `code", ""]
    assert re.findall(r"\x1b\[[0-9;]*m", output.getvalue())[-1] == "\x1b[0m"


@pytest.mark.parametrize("command", ["run", "chat"])
def test_nothing_of_it_is_imported_for_a_pipe(command: str) -> None:
    script = (
        "import sys; from qrun.cli.main import cli; from qrun.cli.answer import Display\n"
        f"cli.get_command(None, {command!r})\n"
        "with Display().answer() as answer: answer.push('**a**')\n"
        "assert not {'rich', 'qrun.cli.markdown'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("**a**\n", "")


MARKDOWN = [
    "# ", "## x\n", "- ", "1. ", "> ", "```", "```py\n", "\n", "\n\n", "| a | b |\n", "|---|--:|\n", "| x | `y|z` |\n",
    "**", "*", "_", "`", "[l](u)", "word ", "longerword ", "日本語", "🎉", "é", "  ", "    ", "\t", "---\n", "~~",
    "***", "|", "<br>", "x" * 30, "\\*", "(", "](",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_whatever_comes_in_whatever_pieces_and_window(seed: int) -> None:
    """Nothing is written above the window, and what stands there in the end does not depend on how it came."""
    chance = random.Random(seed)
    for _ in range(8):
        text = "".join(chance.choice(MARKDOWN) for _ in range(chance.randint(1, 40)))
        width, height = chance.randint(3, 60), chance.randint(3, 15)
        whole = shown(text, len(text), Terminal(width, 1000)).text
        assert shown(text, 0, Terminal(width, 1000)).text == whole, text
        low = shown(text, 0, Terminal(width, height)).text
        assert (len(low), low[-3:]) == (len(whole), whole[-3:]), text
