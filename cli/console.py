"""What commands say beside their results: progress and notices, always on standard error."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, Self

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

class Update(Protocol):
    """How far something is: steps done, all of them, and a word on what came of it so far."""

    def __call__(self, done: int, total: int | None, note: str = "") -> None: ...


def notice(text: str) -> None:
    """A line for the user that is no part of the result."""
    click.echo(f"qrun: {text}", err=True)


def read_stdin() -> str:
    """All of standard input, byte for byte: unlike text mode, this translates no newlines."""
    return sys.stdin.buffer.read().decode("utf-8", "replace")


def printable(text: str) -> str:
    """The text without control characters: what a model or its file holds must not steer the terminal."""
    return text.translate(_CONTROLS)


# all of C0 but tab and newline, DEL, and C1
_CONTROLS = {code: None for code in (*range(9), *range(11, 32), *range(127, 160))}


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
            if sys.stderr.isatty():
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
    if not sys.stderr.isatty():
        yield lambda done, total, note="": None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
               TextColumn("{task.fields[note]}"))  # fmt: skip
    with Progress(*columns, console=stderr_console(), transient=True) as bar:
        task = bar.add_task(description, total=None, note="")
        yield lambda done, total, note="": bar.update(task, completed=done, total=total, note=note)


class CompileProgress:
    """The `progress` callback of a load: says on standard error that kernels are being compiled, and how far it is.

    On a terminal one line that is rewritten and goes at the end; elsewhere one plain line.
    """

    def __init__(self) -> None:
        self._announced = False

    def __call__(self, done: int, total: int) -> None:
        if total <= 0:
            return
        if not sys.stderr.isatty():
            if not self._announced:
                notice(f"compiling {total} kernel{'s' * (total > 1)} for this CPU (once)")
        elif done < total:
            click.echo(f"\r\033[Kcompiling kernels for this CPU  {done}/{total}", nl=False, err=True)
        else:
            click.echo("\r\033[K", nl=False, err=True)
        self._announced = True


READING_DELAY = 2.0
"""Seconds after which `while_reading` begins to tell."""


@contextmanager
def while_reading(progress: Callable[[], tuple[int, int]]) -> Iterator[Callable[[], None]]:
    """Says how much of the prompt has been read once that takes more than two seconds (on a terminal only).

    progress: returns (tokens read, tokens of the prompt); it is called from another thread.
    Yields a function to be called when the answer begins.
    """
    finished = threading.Event()
    if not sys.stderr.isatty():
        yield finished.set
        return
    started = time.monotonic()

    def show() -> None:
        if finished.wait(READING_DELAY):
            return
        while not finished.wait(0.25):
            (done, total), seconds = progress(), time.monotonic() - started
            click.echo(f"\r\033[Kreading the prompt  {done}/{total} tokens, {seconds:.0f} s", nl=False, err=True)
        click.echo("\r\033[K", nl=False, err=True)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()

    def finish() -> None:
        finished.set()
        thread.join()

    try:
        yield finish
    finally:
        finish()
