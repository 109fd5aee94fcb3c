"""What `qrun compare` finds out, for its table and its picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qrun.engine.judging.divergence import Divergence
    from qrun.engine.judging.scoring import Score


@dataclass(frozen=True)
class Measured:
    """A type: the size of its file, the root mean square error of the weights that changed relative to theirs, and how
    far its predictions are from the source's."""

    type: str
    n_bytes: int
    bits_per_weight: float
    relative_rmse: float
    divergence: Divergence


@dataclass(frozen=True)
class Comparison:
    """All types, smallest first, and what they come from."""

    source: str
    text: str
    n_bytes: int
    bits_per_weight: float
    score: Score
    types: list[Measured]
