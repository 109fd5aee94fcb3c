"""The command `qrun`: finds the command's own file when it is asked for, and turns every error into one line."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

try:
    import click
except KeyboardInterrupt:  # while the program is still being read from the disk: `main` sees to all that comes later
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise SystemExit(130) from None

INTERRUPTED = 130
"""The exit status after Ctrl-C."""

# name -> what it does; each command lives in the file of its name, imported only when it is asked for
COMMANDS = {
    "chat": "Talk with a model.",
    "run": "Complete a prompt.",
    "serve": "Serve models over HTTP.",
    "embed": "Print vectors of texts.",
    "info": "Show what a model file holds and needs.",
    "tokenize": "Show the tokens of a text.",
    "warmup": "Compile kernels ahead of the first run.",
    "pack": "Compile kernels to ship with an app.",
    "bench": "Measure tokens per second.",
    "perplexity": "Measure how well a model predicts a text.",
    "convert": "Convert a model file to another type.",
    "imatrix": "Collect what converting should spare.",
    "compare": "Compare what types cost and save.",
    "pull": "Fetch a model into the store.",
    "list": "List the models in the store.",
    "rm": "Delete a model from the store.",
    "completion": "Print the shell's completion script.",
}


# What others call them.
OTHER_NAMES = {
    "quantize": "convert", "quantise": "convert", "ls": "list", "models": "list", "download": "pull", "fetch": "pull",
    "remove": "rm", "delete": "rm", "generate": "run", "complete": "run", "show": "info", "inspect": "info",
    "server": "serve", "embedding": "embed", "ppl": "perplexity", "benchmark": "bench", "help": "--help",
    "version": "--version",
}  # fmt: skip


class LazyGroup(click.Group):
    """A group whose commands are imported one at a time, so that `qrun --help` imports none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"qrun.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name in COMMANDS or name.startswith("-") or ctx.resilient_parsing:
            found = super().resolve_command(ctx, args)
            if found[1] is not None and not ctx.resilient_parsing:
                check_values(found[1], found[2])
            return found
        from difflib import get_close_matches

        meant = OTHER_NAMES.get(name.lower()) or next(iter(get_close_matches(name.lower(), COMMANDS)), None)
        if meant is None and os.path.exists(name):
            meant = f"chat {name}"
        ctx.fail(f"No such command {name!r}." + (f" Did you mean 'qrun {meant}'?" if meant else ""))

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # click would first print to standard error, which may not be there
            raise click.Abort from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def check_values(command: click.Command, words: Sequence[str]) -> None:
    """Raises click.UsageError where an option stands in the place of another one's value, which click would take for
    it: `bench --compare --draft small.gguf`."""
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    known = {name for option in options for name in (*option.opts, *option.secondary_opts)} | {"--help"}
    wanting = {name for option in options if not option.is_flag and not option.count for name in option.opts}
    follow = iter(words)
    for word in follow:
        if word == "--":
            return
        if word not in wanting:
            continue
        value = next(follow, "")
        if value.startswith("--") and value.partition("=")[0] in known:
            raise click.UsageError(
                f"Option {word!r} needs a value, and {value!r} is an option. (As a value: {word}={value})"
            )


def print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from qrun.cli.console import echo
        from qrun.engine import __version__

        echo(f"qrun {__version__}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    name="qrun",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="MODEL is a path, a name from the catalog or the store, the first file of a split model, or a folder with a "
    "checkpoint of Hugging Face (config.json, safetensors), which is quantised when it is first needed.",
)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=print_version,
              help="Show the version and exit.")  # fmt: skip
def cli() -> None:
    """Run language models from GGUF files on this machine's CPU.

    \b
    Examples:
      qrun chat                                  talk with the default model
      qrun run model.gguf "Once upon a time"     complete a text
      qrun info model.gguf                       what the file holds, what it needs
    """


def one_line(error: BaseException) -> str:
    """What an error says, as one line that begins with the file where there is one."""
    from qrun.formats import QrunError

    if isinstance(error, OSError) and error.filename is not None:
        text = f"{os.fspath(error.filename)}: {error.strerror or error}"
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror
    elif isinstance(error, KeyError | LookupError) and error.args:
        text = str(error.args[0])  # str() of a KeyError is its repr
    elif isinstance(error, MemoryError) and not isinstance(error, QrunError):
        # NumPy says besides for which of its arrays.
        text = f"not enough memory: {str(error).partition(' for an array')[0]}" if str(error) else "not enough memory"
    else:
        text = str(error) or type(error).__name__
    from qrun.cli.console import printable

    return printable(" ".join(text.split()))


@contextmanager
def terminating(for_good: bool) -> Iterator[None]:
    """Within it SIGTERM, or that a terminal closes (SIGHUP), ends in good order what is under way, as Ctrl-C does.

    Nothing half-written stays: a second Ctrl-C does not disturb what the first one ends. What was ignored from the
    start, as nohup has it, is ignored still. for_good: the process ends afterwards, and no Ctrl-C is to disturb that.
    """

    def terminate(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # others cannot set a handler
        yield
        return
    handlers = {getattr(signal, name): terminate for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)}
    handlers[signal.SIGINT] = interrupt
    before = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        if before[number] != signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        if for_good:
            before[signal.SIGINT] = signal.SIG_IGN
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)


@contextmanager
def warnings_as_notices() -> Iterator[None]:
    """Within it what the engine warns of is said as the command line says things."""

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        from qrun.engine import CacheWarning

        if not issubclass(category, CacheWarning):
            return before(message, category, *rest, **more)
        from qrun.cli.console import notice, rewritable, status_line

        if rewritable(sys.stderr):
            status_line("")  # over the line that tells how far something is
        return notice(str(message))

    with warnings.catch_warnings():
        before, warnings.showwarning = warnings.showwarning, show
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C.

    Without arguments, those of the process, which is to end afterwards.
    """
    with terminating(for_good=arguments is None):
        try:
            return run(arguments)
        except KeyboardInterrupt:  # before or after a command
            return INTERRUPTED


def run(arguments: Sequence[str] | None) -> int:
    """What `main` does, with signals as they are."""
    from qrun.cli.console import READER_LEFT, echo, flush_standard_output, open_standard_streams

    open_standard_streams()
    out, err = sys.stdout, sys.stderr
    try:
        with warnings_as_notices():
            # prog_name: the usage line reads the same whichever way this was started
            status = cli.main(arguments, prog_name="qrun", standalone_mode=False) or 0
        flush_standard_output()
        return status
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        text = io.StringIO()
        error.show(text)
        echo(text.getvalue(), err=True, nl=False)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        echo(err=True)
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("QRUN_DEBUG"):
            raise
        from qrun.formats import QrunError

        expected = isinstance(error, OSError | ValueError | MemoryError | ImportError | QrunError)
        internal = "" if expected else f"internal error: {type(error).__name__}: "
        echo(f"qrun: {internal}{one_line(error)}", err=True)
        return 1
    except SystemExit:
        if sys.stdout is out:
            raise
        sys.stdout, sys.stderr = out, err  # click puts others there where the reader of its help has gone
        return READER_LEFT
    finally:
        with suppress(OSError, SystemExit):  # what cannot be written now must not be tried again at the very end
            flush_standard_output()


if __name__ == "__main__":
    sys.exit(main())
