"""Tables of Markdown: cells, how wide their columns are, and rows as they are drawn."""

from __future__ import annotations

import re

from rich.text import Text

from qrun.cli.markdown_inline import MAX_INLINE
from qrun.cli.wrapping import columns_of, wrap

TABLE_ROW = re.compile(r"[ \t]*\|")
TABLE_RULE = re.compile(r"[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$")
LEAST_COLUMN = 4
"""Characters of a column."""


def cells_of(line: str) -> list[str]:
    """The cells of a row of a table."""
    text = line.strip()
    text = text[1:] if text.startswith("|") else text
    text = text[:-1] if text.endswith("|") and not text.endswith("\\|") else text
    # a bar within code is none, but to see that takes long in a long line
    between = r"(?<!\\)\|(?=(?:[^`]*`[^`]*`)*[^`]*$)" if len(text) <= MAX_INLINE else r"(?<!\\)\|"
    cells = re.split(between, text)
    return [re.sub(r"<br\s*/?>", "\n", cell.strip()) for cell in cells]


def side_of(rule: str) -> str:
    """To which side the cells of a column lean, by what stands below its head: "---", "--:" or ":-:"."""
    if rule.endswith(":"):
        return "center" if rule.startswith(":") else "right"
    return "left"


def column_widths(cells: list[list[Text]], least: list[int], room: int) -> list[int]:
    """How wide each column is to be: as its cells want, or less for the widest ones where there is no room."""
    wanted = [
        max([least[i], *(columns_of(line) for row in cells for line in row[i].plain.split("\n"))])
        for i in range(len(least))
    ]
    widths = wanted
    low, high = LEAST_COLUMN, max(wanted)
    if sum(wanted) > room:
        while low < high:  # the largest bound that fits
            bound = (low + high + 1) // 2
            if sum(min(width, bound) for width in wanted) <= room:
                low = bound
            else:
                high = bound - 1
        widths = [min(width, low) for width in wanted]
        for i, width in enumerate(wanted):  # what is left over
            widths[i] += min(width - widths[i], max(room - sum(widths), 0))
    return widths


def table_row(cells: list[Text], widths: list[int], sides: list[str], gap: Text) -> list[Text]:
    """A row of a table, in as many rows of the terminal as its highest cell takes."""
    wrapped = [wrap(cell, width) or [Text()] for cell, width in zip(cells, widths, strict=True)]
    rows = []
    for i in range(max(map(len, wrapped))):
        row = Text()
        for j, (lines, width) in enumerate(zip(wrapped, widths, strict=True)):
            cell = lines[i].copy() if i < len(lines) else Text()
            cell.rstrip()
            side = sides[j] if j < len(sides) else "left"
            free = max(width - columns_of(cell.plain), 0)
            left = {"left": 0, "right": free, "center": free // 2}[side]
            row.append_text(gap if j else Text())
            row.append(" " * left).append_text(cell).append(" " * (free - left))
        row.rstrip()
        rows.append(row)
    return rows
