"""The command line: one file per command."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `main` imports commands by name: those who pack apps see here which there are
    from qrun.cli import (  # noqa: F401
        bench,
        chat,
        compare,
        completion,
        convert,
        embed,
        imatrix,
        info,
        list,
        pack,
        perplexity,
        pull,
        rm,
        run,
        serve,
        tokenize,
        warmup,
    )
