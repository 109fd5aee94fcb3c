"""What `qrun compare` finds out, for its table and its picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qrun.engine.judging.divergence import Divergence
    from qrun.engine.judging.scoring import Score
    from qrun.engine.judging.tasks import Answers


@dataclass(frozen=True)
class Measured:
    """A type: the size of its file, the root mean square error of the weights that changed relative to theirs, how far
    its predictions are from the source's, and what it answers if there are questions. measured: its mix is chosen by
    measured sensitivity."""

    type: str
    n_bytes: int
    bits_per_weight: float
    relative_rmse: float
    divergence: Divergence
    answers: Answers | None = None
    measured: bool = False


@dataclass(frozen=True)
class Comparison:
    """All types, smallest first, and what they come from."""

    source: str
    text: str
    n_bytes: int
    bits_per_weight: float
    score: Score
    types: list[Measured]
    answers: Answers | None = None
