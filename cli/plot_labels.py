"""Labels beside the points of a picture, placed so that each can be read and none is mistaken for another's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import TYPE_CHECKING

import numpy as np

from qrun.cli.plot import GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

Point = tuple[float, float]

# Where a label may stand, seen from its point: a direction in each axis, the best first.
_DIRECTIONS = ((1, 1), (1, 0), (1, -1), (0, 1), (-1, -1), (-1, 0), (0, -1), (-1, 1))
_HORIZONTAL = {1: "left", 0: "center", -1: "right"}
_VERTICAL = {1: "bottom", 0: "center", -1: "top"}
# How far from its point, in points of print. What is further is tied to it by a line.
_NEAR, _FAR = 6, 20
# Half the width of a point, and of a line, with a little space around it.
_POINT, _LINE = 3.5, 1.0
# What it costs to stand beside another's point as well, in the square pixels that a label hides.
_MISTAKEN = 300.0
_TIE = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}


def label_points(axes: Axes, points: Sequence[Point], texts: Sequence[str], line: Sequence[Point] = ()) -> None:
    """A text beside each point, where it hides no other text, no point and no part of a line, and stands beside no
    other point; where all places do, where it does least of that. line: its corners."""
    if not points:
        return
    axes.figure.canvas.draw()  # so that the layout, and with it every position, is final
    scale = axes.figure.dpi / 72
    pixels = axes.transData.transform(list(points))
    taken = [_around(place, _POINT * scale) for place in pixels]
    # With no line, an array of no corners: transform() wants two columns.
    corners = axes.transData.transform(np.reshape(line, (-1, 2)))
    for begin, end in pairwise(corners):
        steps = max(2, int(np.hypot(*(end - begin)) / (2 * scale)))
        taken += [_around(place, _LINE * scale) for place in np.linspace(begin, end, steps)]
    neighbourhoods = [_around(place, _NEAR * scale) for place in pixels]
    # From the right, for that is where a label stands best: one further left then gives way.
    for i in sorted(range(len(points)), key=lambda i: points[i], reverse=True):
        others = [area for area, point in zip(neighbourhoods, points, strict=True) if point != points[i]]
        tried = []
        for label in _candidates(axes, points[i], texts[i]):
            box = text_box(label)
            cost = _hidden(box, taken, axes.get_window_extent()) + _MISTAKEN * sum(map(box.overlaps, others))
            tried.append((cost, label, box))
            if cost == 0:
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


def _candidates(axes: Axes, point: Point, text: str) -> Iterator[Annotation]:
    """The label at one place after the other, the best first."""
    for reach, (dx, dy) in product((_NEAR, _FAR), _DIRECTIONS):
        distance = reach if dx == 0 or dy == 0 else 0.6 * reach
        yield axes.annotate(
            text, point, (dx * distance, dy * distance), textcoords="offset points", fontsize=9, ha=_HORIZONTAL[dx],
            va=_VERTICAL[dy], arrowprops=_TIE if reach == _FAR else None,
        )  # fmt: skip


def _around(place: Sequence[float], reach: float) -> Bbox:
    from matplotlib.transforms import Bbox

    return Bbox.from_bounds(place[0] - reach, place[1] - reach, 2 * reach, 2 * reach)


def _hidden(box: Bbox, taken: Sequence[Bbox], inside: Bbox) -> float:
    """How many square pixels of a box lie over others, or outside of the axes."""
    area = float(box.width * box.height)
    overlaps = [type(box).intersection(box, other) for other in taken]
    over = sum(float(each.width * each.height) for each in overlaps if each is not None)
    within = type(box).intersection(box, inside)
    return over + area - (float(within.width * within.height) if within is not None else 0.0)
