"""The chat at a terminal: line editing, history, commands that begin with a slash."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

import click

from qrun.cli.answer import Display, check_thinking
from qrun.cli.console import echo, plural, rewritable, while_reading
from qrun.cli.interrupts import Interrupts
from qrun.engine.conversation import Conversation

SLASH_COMMAND = re.compile(r"^/([A-Za-z]+)(?:\s+(.*))?$", re.DOTALL)
OTHER_NAMES = {"bye": "exit", "quit": "exit", "q": "exit", "reset": "clear", "new": "clear"}
"""What commands are called elsewhere."""


class Leave(Exception):
    """The user has asked to leave."""


class Repl:
    """Reads turns from the terminal and prints answers until the user leaves.

    `read` asks for one line; it raises KeyboardInterrupt on Ctrl-C and EOFError on Ctrl-D.
    """

    def __init__(
        self, conversation: Conversation, display: Display | None = None, read: Callable[[], str] | None = None
    ) -> None:
        self.conversation = conversation
        self._display = display or Display()
        self._interrupts = Interrupts()
        self.commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "help": ("", "show these commands", self._help),
            "system": ("[TEXT]", "show the system prompt, or set it (- removes it)", self._system),
            "think": ("[on|off|auto]", "have the model think before it answers, or not", self._think),
            "clear": ("", "forget the conversation; the system prompt stays", self._clear),
            "save": ("FILE", "save the conversation and the model's state", self._save),
            "load": ("FILE", "go on with a saved conversation", self._load),
            "stats": ("", "show counts and times of the last answer", self._stats),
            "exit": ("", "leave (so does Ctrl-D)", self._exit),
        }
        self._read = read or self._line_editor()

    def run(self) -> None:
        """The loop itself."""
        model = self.conversation.model
        first = f"{model.path.name}, {model.context} tokens of context. /help lists the commands."
        echo(click.wrap_text(first, shutil.get_terminal_size().columns - 1))
        with self._interrupts.heeded():
            while self._turn():
                pass

    def _turn(self) -> bool:
        """One line, and what it asks for; False if the user leaves."""
        try:
            self._interrupts.noted = False
            line = self._read().strip()
        except KeyboardInterrupt:
            echo("To leave: /exit or Ctrl-D.")
            return True
        except EOFError:
            return False
        try:
            self._take(line)
        except Leave:
            return False
        except KeyboardInterrupt:
            echo()
        except (OSError, ValueError) as error:
            from qrun.cli.main import one_line

            echo(f"qrun: {one_line(error)}", err=True)
        return True

    def _take(self, line: str) -> None:
        match = SLASH_COMMAND.match(line)
        if match is None:
            if line:
                self._answer(line)
        elif (name := match[1].lower()) in self.commands:
            with self._interrupts.raised():
                self.commands[name][2]((match[2] or "").strip())
        else:
            meant = OTHER_NAMES.get(name) or next(iter(get_close_matches(name, self.commands, 1)), None)
            hint = f"did you mean /{meant}?" if meant else "/help lists them."
            echo(f"There is no command /{match[1]}; {hint}")

    def _answer(self, text: str) -> None:
        conversation, interrupts = self.conversation, self._interrupts
        reading = while_reading(lambda: conversation.prompt_progress, fills_in=not conversation.model.graph.causal)
        try:
            with self._display.answer() as answer, interrupts.stopping(conversation.session.stop), reading as begun:
                for piece in conversation.answer(text, lambda: interrupts.noted):
                    if piece:
                        begun()
                        answer.push(piece)
        except KeyboardInterrupt:  # a second one; the answer's line has been ended
            return
        if conversation.stop_reason == "cancelled":
            echo("[stopped]")
        elif conversation.stop_reason == "context":
            echo("[the context is full; /clear makes room]")
        elif conversation.only_thought:
            echo("[there is no answer: the model was still thinking]")

    def _help(self, argument: str) -> None:
        rows = [(f"/{name} {parameter}".rstrip(), doc) for name, (parameter, doc, _) in self.commands.items()]
        formatter = click.HelpFormatter(width=shutil.get_terminal_size().columns - 1)
        with formatter.indentation():
            formatter.write_dl([*rows, ("Ctrl-C", "stop the answer"), ("Alt-Enter", "begin a new line within a turn")])
        echo(formatter.getvalue(), nl=False)

    def _system(self, argument: str) -> None:
        if argument:
            self.conversation.set_system(None if argument == "-" else argument)
        echo(f"System prompt: {self.conversation.system or '(none)'}")

    def _think(self, argument: str) -> None:
        choices = {"on": True, "off": False, "auto": None}
        if argument:
            if argument not in choices:
                raise ValueError("say /think on, /think off or /think auto (as the model's template has it)")
            check_thinking(self.conversation.model, choices[argument])
            self.conversation.think = choices[argument]
        name = next(name for name, think in choices.items() if think == self.conversation.think)
        echo(f"Thinking: {name}")

    def _clear(self, argument: str) -> None:
        self.conversation.clear()
        echo("The conversation is forgotten.")

    def _save(self, argument: str) -> None:
        written = self.conversation.save(self._saved_path(argument))
        echo(f"Saved to {' and '.join(map(str, written))}.")

    def _load(self, argument: str) -> None:
        path = self._saved_path(argument)
        with_state = self.conversation.load(path)
        turns = sum(message["role"] == "user" for message in self.conversation.messages)
        how = "" if with_state else " The model's state is not there: the next answer reads it all again."
        echo(f"Loaded {plural(turns, 'turn')} from {path}.{how}")

    def _saved_path(self, argument: str) -> Path:
        if len(argument) > 1 and argument[0] == argument[-1] and argument[0] in "\"'":  # as in a shell
            argument = argument[1:-1]
        path = Path(argument).expanduser()
        if path.name in ("", ".."):
            raise ValueError("name a file, as in /save talk.json")
        return path if path.suffix == ".json" else path.with_name(path.name + ".json")

    def _stats(self, argument: str) -> None:
        stats = self.conversation.last_stats
        if stats is None:
            echo("There has been no answer yet.")
            return
        new = stats.prompt_tokens - stats.cached_tokens
        thoughts = f" ({stats.reasoning_tokens} of them thoughts)" if stats.reasoning_tokens else ""
        echo(
            f"prompt   {stats.prompt_tokens} tokens: {stats.cached_tokens} known already, {new} read in "
            f"{stats.prompt_seconds:.2f} s ({stats.prompt_tokens_per_second:.1f} tokens/s)"
        )
        echo(
            f"answer   {stats.generated_tokens} tokens{thoughts}: the first after {stats.first_token_seconds:.2f} s, "
            f"the others in {stats.generate_seconds:.2f} s ({stats.generated_tokens_per_second:.1f} tokens/s)"
        )
        if stats.guessed_tokens:
            echo(f"guesses  {stats.guessed_tokens} tokens, of which {stats.accepted_tokens} were right")
        echo(f"context  {len(self.conversation.session.tokens)} of {self.conversation.model.context} tokens")

    def _plain_line(self) -> str:
        """A line of a terminal that knows no escape sequences, which has an editor of its own."""
        with self._interrupts.raised():
            echo("> ", nl=False)
            line = sys.stdin.readline()
        if not line:
            echo()
            raise EOFError
        return line

    def _line_editor(self) -> Callable[[], str]:
        if not rewritable(sys.stdout):
            return self._plain_line
        from qrun.cli.editor import LineEditor
        from qrun.cli.history import chat_history

        return LineEditor([f"/{name}" for name in self.commands], chat_history(), self._interrupts)

    def _exit(self, argument: str) -> None:
        raise Leave
