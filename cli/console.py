"""Standard input, output and error: the one way out of everything that commands print, progress and notices."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol, Self, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


class Update(Protocol):
    """How far something is: steps done, all of them, and a word on what came of it so far."""

    def __call__(self, done: int, total: int | None, note: str = "") -> None: ...


READER_LEFT = 141
"""The exit status when whoever reads standard output has gone: that of a program that SIGPIPE ends, 128 + 13."""


def echo(text: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Prints a text and, with `nl`, a newline, to standard output or error.

    Everything that is printed goes through here: at a terminal without its control characters, to anything else as it
    is. Raises OSError, naming standard output, where that takes no more (SystemExit with READER_LEFT where its reader
    has gone). What standard error does not take is lost: nobody could be told.
    """
    stream = sys.stderr if err else sys.stdout
    words = printable(str(text)) if stream.isatty() else str(text)
    _write(stream, words + "\n" * nl)


def write_terminal(text: str) -> None:
    """Sends a text to the terminal that standard output is, escape sequences included: what of it is not ours has
    been through `printable`."""
    _write(sys.stdout, text)


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        _discard(stream)
        if stream is sys.stderr:
            return
        if isinstance(error, BrokenPipeError):
            raise SystemExit(READER_LEFT) from None
        raise OSError(error.errno, error.strerror, "standard output") from None


def _discard(stream: TextIO) -> None:
    """Lets go what a stream has not written, and all that comes: the interpreter would try again as it ends, and say
    so."""
    with suppress(OSError):  # no file behind it
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, stream.fileno())
        finally:
            os.close(null)


def open_standard_streams() -> None:
    """Has all three: one that is closed (`<&-`, or a service's) becomes the null device, before any other file gets its
    number. What their encodings lack becomes "?", not an error."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115 - open as long as the process
            with suppress(OSError):
                os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def flush_standard_output() -> None:
    """Writes what is left. Raises as `echo` does."""
    _write(sys.stdout, "")


def notice(text: str) -> None:
    """A line for the user that is no part of the result. Names of files may have anything in them."""
    echo(f"qrun: {printable(' '.join(text.splitlines()))}", err=True)


def read_stdin() -> str:
    """All of standard input, byte for byte: unlike text mode, this translates no newlines."""
    with _naming_standard_input():
        return sys.stdin.buffer.read().decode("utf-8", "replace")


def stdin_lines() -> Iterator[str]:
    """The lines of standard input as they come, without their ends."""
    while True:
        with _naming_standard_input():
            line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\n")


@contextmanager
def _naming_standard_input() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # a folder, or a file that is open for writing only
        raise OSError(error.errno, error.strerror, "standard input") from None


def printable(text: str) -> str:
    """The text without control characters: what a model or its file holds must not steer the terminal.

    Of an escape sequence the visible rest stays. One at a time, so that it does not matter how a text was cut into
    pieces.
    """
    return text.translate(_CONTROLS)


# all of C0 but tab and newline, DEL, and C1
_CONTROLS = {code: None for code in (*range(9), *range(11, 32), *range(127, 160))}


def rewritable(stream: TextIO) -> bool:
    """Whether lines can be rewritten there: it is a terminal, and knows escape sequences."""
    kind = os.environ.get("TERM", "" if os.name == "posix" else "windows")
    return stream.isatty() and kind not in ("", "dumb", "unknown")


@contextmanager
def terminal_modes(terminal: int, on: Sequence[str] = (), off: Sequence[str] = ()) -> Iterator[None]:
    """A terminal with local modes, by their names in `termios`, on and off; then as it was before. Nothing changes for
    what is no terminal, nor on Windows."""
    if os.name != "posix" or not os.isatty(terminal):
        yield
        return
    import termios

    before = termios.tcgetattr(terminal)
    changed = termios.tcgetattr(terminal)
    for name in on:
        changed[3] |= getattr(termios, name)
    for name in off:
        changed[3] &= ~getattr(termios, name)
    termios.tcsetattr(terminal, termios.TCSANOW, changed)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)


def status_line(text: str) -> None:
    """Rewrites the line that standard error stands at, which is `rewritable`; "" clears it."""
    width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be rewritten
    _write(sys.stderr, "\r\033[K" + printable(text)[: max(width, 0)])


def human_bytes(count: float) -> str:
    """1234567 -> '1.2 MB' (decimal units, as disks and downloads are measured)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_count(count: float) -> str:
    """134515008 -> '134.5 million'."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.1f} {word}"
    return f"{count:.0f}"


def plural(count: int, thing: str) -> str:
    """3, "tensor" -> '3 tensors', and of one '1 tensor'."""
    return f"{count} {thing}{'s' * (count != 1)}"


def human_parameters(count: float) -> str:
    """8030000000 -> '8.0B', as models are called."""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"


def stderr_console() -> Console:
    """rich's console for standard error. Imported here: most commands never need it."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


class DownloadBar:
    """A bar for bytes (on a terminal), which begins, after its announcement, with the first bytes. A context manager;
    `update` is the callback."""

    def __init__(self, announcement: str) -> None:
        self.begun = False
        self._announcement = announcement
        self._bar: Progress | None = None

    def update(self, done: int, total: int | None) -> None:
        """So many bytes are there, of so many."""
        if not self.begun:
            self.begun = True
            notice(self._announcement)
            if rewritable(sys.stderr):
                self._bar = self._started_bar()
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    def _started_bar(self) -> Progress:
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        bar = Progress(*columns, console=stderr_console(), transient=True)
        bar.add_task("", total=None)
        bar.start()
        return bar

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()


@contextmanager
def step_bar(description: str) -> Iterator[Update]:
    """A bar for steps with the time that remains; nothing where standard error is no terminal."""
    if not rewritable(sys.stderr):
        yield lambda done, total, note="": None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[note]}"))  # fmt: skip
    with Progress(*columns, console=stderr_console(), transient=True) as bar:
        task = bar.add_task(description, total=None, note="")
        _bars.append(lambda text: bar.update(task, description=text or description))
        try:
            yield lambda done, total, note="": bar.update(task, completed=done, total=total, note=note)
        finally:
            _bars.pop()


# What each bar that stands on the terminal is called for a while, the last one last; "" is its own name.
_bars: list[Callable[[str], None]] = []


class CompileProgress:
    """The `progress` callback of a load: says on standard error that kernels are being compiled, and how far it is.

    On a terminal one line that is rewritten and goes at the end, or what the bar that stands there is called meanwhile;
    elsewhere one plain line.
    """

    def __init__(self, for_what: str = "this CPU") -> None:
        self._announced = False
        self._for = for_what

    def __call__(self, done: int, total: int) -> None:
        if total <= 0:
            return
        if not rewritable(sys.stderr):
            if done < total and not self._announced:
                notice(f"compiling {plural(total, 'kernel')} for {self._for} (once)")
        else:
            say = _bars[-1] if _bars else status_line
            say(f"compiling kernels for {self._for}  {done}/{total}" if done < total else "")
        self._announced = done < total  # others may follow


READING_DELAY = 2.0
"""Seconds after which `while_reading` begins to tell."""


@contextmanager
def while_reading(
    progress: Callable[[], tuple[int, int]], *, fills_in: bool = False
) -> Iterator[Callable[[], None]]:
    """Says how much of the prompt has been read once that takes more than two seconds (on a terminal only).

    progress: returns (tokens read, tokens of the prompt); it is called from another thread. fills_in: of a text by
    diffusion it counts steps.
    Yields a function to be called when the answer begins.
    """
    finished = threading.Event()
    if not rewritable(sys.stderr):
        yield finished.set
        return
    started = time.monotonic()

    def show() -> None:
        if finished.wait(READING_DELAY):
            return
        while not finished.wait(0.25):
            (done, total), seconds = progress(), time.monotonic() - started
            what = "filling in the text  {}/{} steps" if fills_in else "reading the prompt  {}/{} tokens"
            status_line(f"{what.format(done, total)}, {seconds:.0f} s")
        status_line("")

    thread = threading.Thread(target=show, daemon=True)
    thread.start()

    def finish() -> None:
        finished.set()
        thread.join()

    try:
        yield finish
    finally:
        finish()
