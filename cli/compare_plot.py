"""The picture of `qrun compare`: the size of each type's file against what it loses."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

from qrun.cli.plot import BLUE, GREY, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

    from qrun.cli.compare import Comparison, Measured

# Where a label may stand, seen from its point: a direction in each axis, the best first.
_PLACES = ((1, 1), (1, 0), (1, -1), (0, 1), (-1, -1), (-1, 0), (0, -1), (-1, 1))
_ALIGNMENTS = {1: "left", 0: "center", -1: "right"}
_VERTICAL = {1: "bottom", 0: "center", -1: "top"}
# How far from its point, in points of print. What is further is tied to it by a line.
_NEAR, _FAR = 6, 20


def draw(comparison: Comparison, path: str) -> None:
    """Mean KL divergence, on a logarithmic axis, over the size of the file.

    The types that no other beats in both are joined by a line. A type that loses nothing has no place on the axis.
    """
    chosen = [each for each in comparison.types if each.divergence.mean_kl.value > 0]
    unit, divisor = ("GB", 1e9) if comparison.n_bytes >= 4e9 else ("MB", 1e6)
    sizes = [each.n_bytes / divisor for each in chosen]
    losses = [each.divergence.mean_kl for each in chosen]
    best = undominated(chosen)
    figure, (axes,) = new_figure(7.2, 4.6)
    if chosen:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.errorbar(
            sizes, [loss.value for loss in losses], [min(loss.error, 0.99 * loss.value) for loss in losses],
            fmt="none", ecolor=GREY, elinewidth=1, capsize=2, zorder=1,
        )  # fmt: skip
        front = [(size, loss.value) for size, loss, each in zip(sizes, losses, chosen, strict=True) if each in best]
        axes.plot(*zip(*front, strict=True), color=BLUE, alpha=0.35, linewidth=1.5, zorder=1)
        colours = [BLUE if each in best else GREY for each in chosen]
        axes.scatter(sizes, [loss.value for loss in losses], c=colours, s=36, zorder=2)
        axes.margins(x=0.12, y=0.12)
    axes.grid(axis="y", which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"size of the file, {unit}")
    axes.set_ylabel("KL divergence from the source, nats per token")
    axes.set_title(f"What {comparison.source} loses, by type", fontsize=12, loc="left", pad=22)
    facts = (
        f"source: {comparison.n_bytes / divisor:,.0f} {unit}, perplexity {comparison.score.perplexity.value:.2f} on "
        f"{comparison.score.count} tokens of {comparison.text}; bars: standard error"
    )
    axes.text(0, 1.025, facts, transform=axes.transAxes, fontsize=8, color="#666666")
    label_points(axes, sizes, [loss.value for loss in losses], [each.type for each in chosen])
    save(figure, path)


def undominated(types: Sequence[Measured]) -> list[Measured]:
    """Those that no other one beats, or equals, in size and loss both. Sorted by size."""

    def loss(each: Measured) -> float:
        return each.divergence.mean_kl.value

    best: list[Measured] = []
    for each in sorted(types, key=lambda each: (each.n_bytes, loss(each))):
        if not best or loss(each) < loss(best[-1]):
            best.append(each)
    return best


def label_points(axes: Axes, x: Sequence[float], y: Sequence[float], texts: Sequence[str]) -> None:
    """A text beside each point, at the first place where it hides no other text and no point, or hides least."""
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.canvas.draw()  # so that the layout, and with it every position, is final
    places = axes.transData.transform(list(zip(x, y, strict=True))) if texts else []
    scale = figure.dpi / 72
    taken: list[Bbox] = [Bbox.from_bounds(px - 4 * scale, py - 4 * scale, 8 * scale, 8 * scale) for px, py in places]
    inside = axes.get_window_extent()
    for point, text in zip(zip(x, y, strict=True), texts, strict=True):
        tried = []
        for reach, (dx, dy) in product((_NEAR, _FAR), _PLACES):
            distance = reach if dx == 0 or dy == 0 else reach * 0.6
            line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
            label = axes.annotate(
                text, point, (dx * distance, dy * distance), textcoords="offset points", fontsize=9,
                ha=_ALIGNMENTS[dx], va=_VERTICAL[dy], arrowprops=line if reach == _FAR else None,
            )  # fmt: skip
            box = text_box(label)
            tried.append((hidden(box, taken, inside), label, box))
            if tried[-1][0] == 0:
                break
        _, kept, box = min(tried, key=lambda each: each[0])
        for _, label, _ in tried:
            if label is not kept:
                label.remove()
        taken.append(box)


def text_box(label: Annotation) -> Bbox:
    """Where a label's text lies, in pixels, without the line, which begins at the point itself."""
    from matplotlib.text import Text

    label.get_window_extent()  # puts the text into its place
    return Text.get_window_extent(label)


def hidden(box: Bbox, taken: Sequence[Bbox], inside: Bbox) -> float:
    """How many square pixels of a box lie over others, or outside of the axes."""
    area = float(box.width * box.height)
    overlaps = [type(box).intersection(box, other) for other in taken]
    over = sum(float(each.width * each.height) for each in overlaps if each is not None)
    within = type(box).intersection(box, inside)
    return over + area - (float(within.width * within.height) if within is not None else 0.0)
