"""Writes docs/html: the library's reference, from its docstrings. `make docs` runs it.

By pdoc, which is one small package and takes nothing but the code; MkDocs would want a configuration, a theme and a
plug-in for the same pages.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
import warnings
from pathlib import Path

import pdoc
import pdoc.docstrings

ROOT = Path(__file__).parents[1]
MODULES = ("qrun.engine", "qrun.formats", "qrun.server")

_ITEM = re.compile(r"^(\w+(?:, \w+)*): (?=\S)", re.ASCII)
_INSIDE = re.compile(r"(?<=[.;?)]) ((?:[a-z_]\w*, )*[a-z_]\w*): (?=\S)", re.ASCII)


def as_markdown(docstring: str) -> str:
    """Our docstrings as Markdown: paragraphs of "name: what it is" become lists, indented lines stay as they are."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", docstring.strip("\n")):
        lines = paragraph.split("\n")
        if all(line.startswith("  ") for line in lines):  # code
            parts.append("\n".join("    " + line.strip("\n") for line in lines))
        elif _ITEM.match(lines[0]) and not lines[0].startswith("Raises"):
            parts.append("\n".join(_items(lines)))
        else:
            parts.append("\n".join(_text(lines)))
    return "\n\n".join(parts)


def _items(lines: list[str]) -> list[str]:
    """A list item for each name, also where several stand on a line."""
    items: list[str] = []
    for line in lines:
        if _ITEM.match(line):
            items.append(line)
        else:
            items[-1] += " " + line.strip()
    split = [re.sub(_INSIDE, r"\n\1: ", item).split("\n") for item in items]
    return [_ITEM.sub(lambda match: f"- **{match[1]}**: ", item) for group in split for item in group]


def _text(lines: list[str]) -> list[str]:
    """A paragraph; a table of words, each line of it indented, keeps its lines."""
    text: list[str] = []
    for line in lines:
        if line.startswith("  ") and text and not text[-1].startswith("    "):
            text.append("")
        text.append("    " + line if line.startswith("  ") else line)
    return text


def build(out: Path) -> None:
    """Write the pages."""
    pdoc.docstrings.convert = lambda docstring, format, source: as_markdown(docstring)
    pdoc.render.configure(docformat="markdown", show_source=False, footer_text="qrun")
    for name in MODULES:
        module = importlib.import_module(name)
        for public in module.__all__:
            getattr(module, public)  # imported when first asked for: pdoc would see a name alone
    logging.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pdoc.pdoc(*MODULES, output_directory=out)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "html"
    build(folder)
    print(f"{folder / 'index.html'}")
