"""`qrun completion`: the script that makes a shell complete qrun's commands, options and models."""

from __future__ import annotations

import click

from qrun.cli.console import echo

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_QRUN_COMPLETE"  # the variable that click looks for in a program called qrun

WHOLE_NAMES = "COMP_WORDBREAKS=${COMP_WORDBREAKS//:}"
"""Has bash take llama3.1:8b for one word."""


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def command(shell: str) -> None:
    """Print the completion script of SHELL.

    \b
    Examples:
      qrun completion bash >> ~/.bashrc
      qrun completion zsh  >> ~/.zshrc
      qrun completion fish > ~/.config/fish/completions/qrun.fish
    """
    from click.shell_completion import ShellComplete, get_completion_class

    from qrun.cli.main import cli

    completer = get_completion_class(shell)
    assert completer is not None
    # the base class's source(): bash's own begins by running bash to see how old it is
    script = ShellComplete.source(completer(cli, {}, "qrun", VARIABLE))
    echo(f"{script}\n{WHOLE_NAMES}" if shell == "bash" else script)
