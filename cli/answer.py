"""How an answer is shown: as it comes, or at a terminal as the Markdown that it is; and what becomes of thoughts."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import click

from qrun.cli.console import echo, rewritable, status_line, terminal_modes, write_terminal

if TYPE_CHECKING:
    from qrun.cli.markdown import MarkdownView
    from qrun.engine import Model, Piece

DIM, NORMAL = "\033[2m", "\033[m"


class View(Protocol):
    """Shows one answer."""

    def push(self, text: str, channel: str = "content") -> None:
        """More of the answer, or of what was thought before it."""

    def make_way(self) -> None:
        """Something else is to be written, in a line of its own."""

    def end(self) -> None:
        """The answer is over; ends its last line."""


class PlainView:
    """Text as it comes. Thoughts are dim at a terminal that can show that; elsewhere they stand between tags."""

    def __init__(self) -> None:
        self._channel = "content"
        self._is_dim = rewritable(sys.stdout)
        self._within_line = False

    def push(self, text: str, channel: str = "content") -> None:
        if channel != self._channel:
            self._turn_to(channel)
        echo(text, nl=False)
        self._within_line = not text.endswith("\n")

    def make_way(self) -> None:
        if self._within_line and sys.stdout.isatty():
            echo()

    def end(self) -> None:
        if self._channel == "reasoning":
            self._turn_to("content")
        else:
            echo()

    def _turn_to(self, channel: str) -> None:
        if self._is_dim:
            write_terminal(DIM if channel == "reasoning" else f"{NORMAL}\n\n")
        else:
            echo("<think>" if channel == "reasoning" else "\n</think>\n")
        self._channel = channel


class Answer:
    """Shows the pieces of one answer, with or without thoughts.

    Where they are not shown, a line on standard error tells that they come, if it is a terminal.
    """

    def __init__(self, view: View, show_thoughts: bool) -> None:
        self._view = view
        self._show_thoughts = show_thoughts
        self._n_thought = 0
        self._told = 0.0

    def push(self, piece: Piece | str) -> None:
        channel = getattr(piece, "channel", "content")
        if channel == "reasoning" and not self._show_thoughts:
            self._tell(piece)
            return
        self._hush()
        self._view.push(piece, channel)

    def make_way(self) -> None:
        self._hush()
        self._view.make_way()

    def end(self) -> None:
        self._hush()
        self._view.end()

    def _tell(self, piece: Piece | str) -> None:
        self._n_thought += 1
        if rewritable(sys.stderr) and time.monotonic() - self._told > 0.1:
            self._told = time.monotonic()
            status_line(f"thinking  {self._n_thought} tokens")

    def _hush(self) -> None:
        if self._told:
            self._told = 0.0
            status_line("")


class Display:
    """How the answers of a command are shown. plain: as they come. show_thoughts: None for at a terminal alone.

    Nothing but the text goes into a pipe, whatever is asked for.
    """

    def __init__(self, plain: bool = False, show_thoughts: bool | None = None) -> None:
        self._is_rendered = rewritable(sys.stdout) and not plain
        self._show_thoughts = sys.stdout.isatty() if show_thoughts is None else show_thoughts
        self._answer: Answer | None = None  # the one under way
        if self._is_rendered:  # while the model loads and reads
            threading.Thread(target=_rendered_view, daemon=True).start()

    @contextmanager
    def answer(self) -> Iterator[Answer]:
        """One answer. Whatever ends it, the terminal is left as it was."""
        answer = self._answer = Answer(_rendered_view()() if self._is_rendered else PlainView(), self._show_thoughts)
        with _silent_keyboard() if self._is_rendered else nullcontext():
            try:
                yield answer
            finally:
                self._answer = None
                answer.end()

    def make_way(self) -> None:
        """Something else is to be written to the terminal, in a line of its own; the answer under way goes on below."""
        if self._answer is not None:
            self._answer.make_way()


def _rendered_view() -> type[MarkdownView]:
    """Imported where it is wanted: it takes as long as the first token of a small model."""
    from qrun.cli.markdown import MarkdownView

    return MarkdownView


def _silent_keyboard() -> AbstractContextManager[None]:
    """A terminal that does not show what is typed ahead: that would stand in the middle of the answer, and move the
    cursor. The line editor reads it afterwards all the same."""
    return terminal_modes(sys.stdin.fileno(), off=["ECHO"]) if sys.stdin.isatty() else nullcontext()


def answer_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --think, --show-thoughts and --plain."""
    for option in (
        click.option("--plain", is_flag=True, help="Print answers as they come: no Markdown, no wrapping at words."),
        click.option(
            "--show-thoughts/--hide-thoughts", "show_thoughts", default=None,
            help="Whether what a model thinks is printed: dim at a terminal, else between <think> and </think>.",
            show_default="at a terminal only",
        ),
        click.option(
            "--think/--no-think", "think", default=None,
            help="Have a model that can think do so before it answers, or answer at once.",
            show_default="the model's template decides",
        ),
    ):  # fmt: skip
        function = option(function)
    return function


def check_thinking(model: Model, think: bool | None) -> None:
    """Raises ValueError where a model is to think that cannot."""
    if think and model.chat_template is not None and model.chat_template.format.thoughts is None:
        raise ValueError(f"{model.path.name} does not think: its chat template knows no thoughts")


NO_ANSWER = "there is no answer: the model was still thinking (--reasoning-budget ends that sooner)"
