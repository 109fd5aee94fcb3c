"""The generated parts of the documentation: README.md's table of what is supported, and cli/REFERENCE.md.

`python -m qrun.cli.docs` (or `make docs`), in the repository's root, writes them anew; a test fails while they are old.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from qrun.cli.main import COMMANDS, cli
from qrun.formats.whole_file import write_whole

BEGIN = "<!-- support: written by `make docs` -->"
END = "<!-- end of support -->"
WIDTH = 100


def support_table() -> str:
    """What can be run, from the tables that the code itself goes by, as Markdown."""
    from qrun.cli.options import CACHE_TYPES
    from qrun.engine.text.tokenizer.pretokenizers import PRE_TOKENIZERS
    from qrun.engine.text.tokenizer.vocabulary import KINDS
    from qrun.formats.blocks import BLOCK_FORMATS
    from qrun.models import ARCHITECTURES

    def names(items: object) -> str:
        assert hasattr(items, "__iter__")
        return ", ".join(f"`{item}`" for item in items)

    types = sorted(BLOCK_FORMATS.values(), key=lambda block: block.type)
    bits = [f"`{block.type.name}` ({block.block_bytes * 8 / block.block_size:g})" for block in types]
    rows = [
        ("Architectures", names(ARCHITECTURES)),
        ("Tensor types (bits per weight)", ", ".join(bits)),
        ("Types of the KV cache", names(CACHE_TYPES)),
        ("Tokenizers", names(sorted(KINDS))),
        (f"Pre-tokenizers of byte-pair models ({len(PRE_TOKENIZERS)})", names(sorted(PRE_TOKENIZERS))),
    ]
    lines = ["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)]
    return "\n".join(lines) + "\n"


def with_support_table(readme: str) -> str:
    """The README with the table between its markers replaced."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{support_table()}{END}{after}"


def reference() -> str:
    """The page of all commands, from their --help."""
    settings: dict[str, Any] = {"terminal_width": WIDTH, "max_content_width": WIDTH, **cli.context_settings}
    parent = click.Context(cli, info_name="qrun", **settings)
    parts = [
        "# The command line",
        "Written by `make docs` from what each command prints with `--help`.",
        f"```\n{cli.get_help(parent)}\n```",
    ]
    for name in COMMANDS:
        command = cli.get_command(parent, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=parent, **settings)
        parts += [f"## qrun {name}", f"```\n{command.get_help(context)}\n```"]
    return "\n\n".join(parts) + "\n"


def main(root: Path) -> None:
    """Writes both."""
    readme = root / "README.md"
    write_whole(readme, with_support_table(readme.read_text(encoding="utf-8")))
    write_whole(root / "cli" / "REFERENCE.md", reference())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd())
