"""The line editor of a chat at a terminal: history, completion of commands, and no Ctrl-C that is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import History
from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys

from qrun.cli.console import terminal_modes
from qrun.cli.interrupts import Interrupts

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyPress


class LineEditor:
    """Called, it asks for one line: KeyboardInterrupt on Ctrl-C, EOFError on Ctrl-D.

    While it has the terminal, Ctrl-C is a key like others, and no signal. One that comes after Enter, before the
    terminal is given back, is not for this line but for what the line sets going: `interrupts` notes it.
    """

    def __init__(self, words: Sequence[str], history: History, interrupts: Interrupts) -> None:
        self._interrupts = interrupts
        self._session: PromptSession[str] = PromptSession(
            history=history,
            completer=WordCompleter(list(words), sentence=True),
            complete_while_typing=False,
            prompt_continuation="  ",
            key_bindings=_keys(),
        )

    def __call__(self) -> str:
        line = self._session.prompt("> ", pre_run=self._begin)
        keys = self._typed_ahead()
        late = [i for i, key in enumerate(keys) if key.key in (Keys.ControlC, Keys.SIGINT)]
        if late:
            self._interrupts.noted = True
            del keys[: late[-1] + 1]  # as the terminal itself forgets what was typed before Ctrl-C
        store_typeahead(self._session.input, keys)
        return line

    def _begin(self) -> None:
        """What was noted while the editor got ready is for this line."""
        if self._interrupts.noted:
            self._interrupts.noted = False
            self._session.app.exit(exception=KeyboardInterrupt())

    def _typed_ahead(self) -> list[KeyPress]:
        """The keys after Enter that the terminal did not take as a line of its own."""
        input = self._session.input
        keys = get_typeahead(input)
        # Ctrl-C is to make a signal, and what was typed before to come out without waiting for Enter.
        with terminal_modes(input.fileno(), on=["ISIG"], off=["ICANON"]):
            return [*keys, *input.read_keys(), *input.flush_keys()]


def _keys() -> KeyBindings:
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

    return keys
