"""What commands that draw have in common: matplotlib is optional, and files are PNG or SVG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qrun.formats.whole_file import check_place, whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".svg")
GREY = "#8a8a8a"
BLUE = "#1f6fb4"
ORANGE = "#d9822b"


def check_plot(path: str) -> None:
    """Raises click.UsageError for a file that is neither PNG nor SVG, or if there is nothing to draw with, and OSError
    where no file can be written."""
    if Path(path).suffix.lower() not in ENDINGS:
        raise click.UsageError(f"--plot: {path} must end in .png or .svg.")
    check_place(Path(path))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise click.UsageError("--plot needs matplotlib: pip install 'qrun-gguf[plot]'.") from None


def new_figure(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches, with panels side by side and no frames above and right of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: str) -> None:
    """Write the file as a whole or not at all."""
    with whole_file(path) as file:
        figure.savefig(file, dpi=150, format=Path(path).suffix[1:].lower())
