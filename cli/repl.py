"""The chat at a terminal: line editing, history, commands that begin with a slash."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from qrun.cli.console import printable, while_reading
from qrun.cli.conversation import Conversation
from qrun.cli.history import chat_history

SLASH_COMMAND = re.compile(r"^/([a-z]+)(?:\s+(.*))?$", re.DOTALL)


class Leave(Exception):
    """The user has asked to leave."""


class Repl:
    """Reads turns from the terminal and prints answers until the user leaves.

    `read` asks for one line; it raises KeyboardInterrupt on Ctrl-C and EOFError on Ctrl-D.
    """

    def __init__(self, conversation: Conversation, read: Callable[[], str] | None = None) -> None:
        self.conversation = conversation
        self.commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "help": ("", "show these commands", self._help),
            "system": ("[TEXT]", "show the system prompt, or set it (- removes it)", self._system),
            "clear": ("", "forget the conversation; the system prompt stays", self._clear),
            "save": ("FILE", "save the conversation and the model's state", self._save),
            "load": ("FILE", "go on with a saved conversation", self._load),
            "stats": ("", "show counts and times of the last answer", self._stats),
            "exit": ("", "leave (so does Ctrl-D)", self._exit),
        }
        self._read = read or terminal_reader([f"/{name}" for name in self.commands])

    def run(self) -> None:
        """The loop itself."""
        model = self.conversation.model
        click.echo(f"{model.path.name}, {model.context} tokens of context. /help lists the commands.")
        while True:
            try:
                line = self._read().strip()
            except KeyboardInterrupt:
                click.echo("To leave: /exit or Ctrl-D.")
                continue
            except EOFError:
                return
            if not line:
                continue
            try:
                self._take(line)
            except Leave:
                return
            except KeyboardInterrupt:  # a second Ctrl-C, or one outside an answer
                click.echo()
            except (OSError, ValueError) as error:
                from qrun.cli.main import one_line

                click.echo(f"qrun: {one_line(error)}", err=True)

    def _take(self, line: str) -> None:
        match = SLASH_COMMAND.match(line)
        if match is None:
            self._answer(line)
        elif match[1] in self.commands:
            self.commands[match[1]][2]((match[2] or "").strip())
        else:
            click.echo(f"There is no command /{match[1]}; /help lists them.")

    def _answer(self, text: str) -> None:
        conversation = self.conversation
        reading = while_reading(lambda: conversation.prompt_progress)
        with stopping_at_interrupt(conversation.session.stop), reading as begun:
            for piece in conversation.answer(text):
                if piece:
                    begun()
                    click.echo(printable(piece), nl=False)
            begun()
        click.echo()
        if conversation.stop_reason == "cancelled":
            click.echo("[stopped]")
        elif conversation.stop_reason == "context":
            click.echo("[the context is full; /clear makes room]")

    def _help(self, argument: str) -> None:
        for name, (parameter, doc, _) in self.commands.items():
            click.echo(f"  {f'/{name} {parameter}':<16}{doc}")
        click.echo("  Ctrl-C          stop the answer")
        click.echo("  Alt-Enter       begin a new line within a turn")

    def _system(self, argument: str) -> None:
        if argument:
            self.conversation.set_system(None if argument == "-" else argument)
        click.echo(f"System prompt: {self.conversation.system or '(none)'}")

    def _clear(self, argument: str) -> None:
        self.conversation.clear()
        click.echo("The conversation is forgotten.")

    def _save(self, argument: str) -> None:
        written = self.conversation.save(self._saved_path(argument))
        click.echo(f"Saved to {' and '.join(map(str, written))}.")

    def _load(self, argument: str) -> None:
        path = self._saved_path(argument)
        with_state = self.conversation.load(path)
        turns = sum(message["role"] == "user" for message in self.conversation.messages)
        how = "" if with_state else " The model's state is not there: the next answer reads it all again."
        click.echo(f"Loaded {turns} turns from {path}.{how}")

    def _saved_path(self, argument: str) -> Path:
        if not argument:
            raise ValueError("name a file, as in /save talk.json")
        path = Path(argument).expanduser()
        return path if path.suffix == ".json" else path.with_name(path.name + ".json")

    def _stats(self, argument: str) -> None:
        stats = self.conversation.last_stats
        if stats is None:
            click.echo("There has been no answer yet.")
            return
        new = stats.prompt_tokens - stats.cached_tokens
        click.echo(
            f"prompt   {stats.prompt_tokens} tokens: {stats.cached_tokens} known already, {new} read in "
            f"{stats.prompt_seconds:.2f} s ({stats.prompt_tokens_per_second:.1f} tokens/s)"
        )
        click.echo(
            f"answer   {stats.generated_tokens} tokens: the first after {stats.first_token_seconds:.2f} s, the others "
            f"in {stats.generate_seconds:.2f} s ({stats.generated_tokens_per_second:.1f} tokens/s)"
        )
        click.echo(f"context  {len(self.conversation.session.tokens)} of {self.conversation.model.context} tokens")

    def _exit(self, argument: str) -> None:
        raise Leave


def terminal_reader(words: list[str]) -> Callable[[], str]:
    """A line editor that completes `words` and keeps its history under the user's data folder."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def interrupt(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    session: PromptSession[str] = PromptSession(
        history=chat_history(),
        completer=WordCompleter(words, sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
    )
    return lambda: session.prompt("> ")


@contextmanager
def stopping_at_interrupt(stop: Callable[[], Any]) -> Iterator[None]:
    """Ctrl-C calls `stop` while the body runs; a second one interrupts as usual."""

    def handle(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, previous)
        stop()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
