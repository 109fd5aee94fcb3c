"""The generated parts of the documentation: docs/models.md, what README.md says of it, and cli/REFERENCE.md.

`python -m qrun.cli.docs` (or `make docs`), in the repository's root, writes them anew; a test fails while they are old.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from qrun.cli.main import COMMANDS, cli
from qrun.formats.whole_file import write_whole

BEGIN = "<!-- support: written by `make docs` -->"
END = "<!-- end of support -->"
WIDTH = 100
"""Of the pages of --help, in characters."""
PAGE_WIDTH = 120


def models_page() -> str:
    """What can be run, from the tables that the code itself goes by."""
    from qrun.cli.options import CACHE_TYPES
    from qrun.engine.text.tokenizer.pretokenizers import PRE_TOKENIZERS
    from qrun.engine.text.tokenizer.vocabulary import KINDS
    from qrun.formats.blocks import BLOCK_FORMATS
    from qrun.models import ARCHITECTURES

    blocks = sorted(BLOCK_FORMATS.values(), key=lambda block: block.type)
    bits = [f"`{block.type.name}` ({block.block_bytes * 8 / block.block_size:g})" for block in blocks]
    parts = {
        f"Architectures ({len(ARCHITECTURES)})": names(sorted(ARCHITECTURES)),
        f"Types of tensors ({len(bits)}), with their bits per weight": ", ".join(bits),
        "Types of the KV cache": names(CACHE_TYPES),
        f"Tokenizers ({len(KINDS)})": names(sorted(KINDS)),
        f"Pre-tokenizers of byte-pair models ({len(PRE_TOKENIZERS)})": names(sorted(PRE_TOKENIZERS)),
    }
    head = "Written by `make docs`. Names are those of GGUF files: `qrun info model.gguf` says which one has."
    sections = [f"## {title}\n\n{fill(text)}" for title, text in parts.items()]
    return "\n\n".join(["# What is supported", head, *sections]) + "\n"


def names(items: Iterable[str]) -> str:
    """As code, between commas."""
    return ", ".join(f"`{item}`" for item in items)


def fill(text: str) -> str:
    """In lines as long as those of the other pages."""
    return textwrap.fill(text, PAGE_WIDTH, break_long_words=False, break_on_hyphens=False)


def support_summary() -> str:
    """How much of everything there is, for the README."""
    from qrun.cli.options import CACHE_TYPES
    from qrun.engine.text.tokenizer.pretokenizers import PRE_TOKENIZERS
    from qrun.formats.blocks import BLOCK_FORMATS
    from qrun.models import ARCHITECTURES

    counts = (
        f"{len(ARCHITECTURES)} architectures, {len(BLOCK_FORMATS)} types of tensors, {len(PRE_TOKENIZERS)} "
        f"pre-tokenizers, and a KV cache in {names(CACHE_TYPES)}"
    )
    return fill(f"{counts}: [docs/models.md](docs/models.md) has all their names.") + "\n"


def with_support(readme: str) -> str:
    """The README with what stands between its markers replaced."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{support_summary()}{END}{after}"


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
    """Writes all of them."""
    readme = root / "README.md"
    write_whole(readme, with_support(readme.read_text(encoding="utf-8")))
    write_whole(root / "docs" / "models.md", models_page())
    write_whole(root / "cli" / "REFERENCE.md", reference())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd())
