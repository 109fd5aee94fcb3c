"""Running a command within the test's own process, as a user of the command line does."""

import pytest

from qrun.cli import main


def run(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Its exit status, and what it printed to standard output and to standard error."""
    status = main.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err
