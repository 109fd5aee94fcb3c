"""The picture of `qrun compare`: the size of each type's file against what it loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qrun.cli.plot import BLUE, GREY, ORANGE, new_figure, save
from qrun.cli.plot_labels import label_points

if TYPE_CHECKING:
    from qrun.cli.comparison import Comparison, Measured

def draw(comparison: Comparison, path: str) -> None:
    """Mean KL divergence, on a logarithmic axis, over the size of the file.

    The types that no other beats in both are joined by a line; mixes of measured sensitivity by one of their own,
    without names. A type that loses nothing has no place on the axis.
    """
    shown = [each for each in comparison.types if each.divergence.mean_kl.value > 0]
    chosen = [each for each in shown if not each.measured]
    mixes = undominated([each for each in shown if each.measured])
    unit, divisor = ("GB", 1e9) if comparison.n_bytes >= 4e9 else ("MB", 1e6)
    sizes = [each.n_bytes / divisor for each in chosen]
    losses = [each.divergence.mean_kl for each in chosen]
    best = undominated(chosen)
    front = [(size, loss.value) for size, loss, each in zip(sizes, losses, chosen, strict=True) if each in best]
    figure, (axes,) = new_figure(7.2, 4.6)
    if chosen:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.errorbar(
            sizes, [loss.value for loss in losses], [min(loss.error, 0.99 * loss.value) for loss in losses],
            fmt="none", ecolor=GREY, elinewidth=1, capsize=2, zorder=1,
        )  # fmt: skip
        axes.plot(*zip(*front, strict=True), color=BLUE, alpha=0.35, linewidth=1.5, zorder=1)
        colours = [BLUE if each in best else GREY for each in chosen]
        axes.scatter(sizes, [loss.value for loss in losses], c=colours, s=36, zorder=2)
        if mixes:
            axes.plot(
                [each.n_bytes / divisor for each in mixes], [each.divergence.mean_kl.value for each in mixes],
                color=ORANGE, marker="D", markersize=4, linewidth=1.5, label="types by measured sensitivity", zorder=2,
            )  # fmt: skip
            axes.legend(frameon=False, fontsize=8)
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
    points = [(size, loss.value) for size, loss in zip(sizes, losses, strict=True)]
    label_points(axes, points, [each.type for each in chosen], front)
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
