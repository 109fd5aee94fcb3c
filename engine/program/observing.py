"""Watching a model at work: how large the inputs of its matrices are, column by column.

An observing program is the usual one with an operation more before each matmul of the body, which adds to sums that
outlive the step. The head is not watched: importance matrices leave the output alone, as llama.cpp's do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrun.engine.kernels import records as R
from qrun.engine.program.arena import Place
from qrun.engine.program.lowering import Lowering
from qrun.engine.program.record import Routing
from qrun.formats.dataclass import dataclass
from qrun.models import graph as G
from qrun.models.adapter import SUFFIXES


@dataclass(eq=False)
class Observation:
    """What one input, or one that experts share, has been so far.

    names: tensors that take it. sums: float32 [experts, width], sums of squares; 1 expert for a dense matrix.
    counts: int64 [experts], how many rows were added. If rows are kept, sums are those of the last step, [batch,
    width], and counts [1] how many it had.
    """

    names: list[str]
    sums: NDArray[np.float32]
    counts: NDArray[np.int64]


class ObservingLowering(Lowering):
    """A lowering that also records the inputs of matmuls in `observations`.

    keep: of which tensors the input's rows are to be kept, after each step; then nothing else is recorded.
    """

    def __init__(self, *args: Any, keep: Callable[[str], bool] | None = None, **settings: Any) -> None:
        self._keep = keep
        self.observations: list[Observation] = []
        self._of_value: dict[int, Observation] = {}
        super().__init__(*args, **settings)

    def taken(self, weight: G.Weight, value: G.Value) -> None:
        if self._in_head or weight.name.endswith(SUFFIXES):  # an adapter is not quantised
            return
        if self._keep is not None and not self._keep(weight.name):
            return
        if value.id in self._of_value:  # queries, keys and values take the same
            self._of_value[value.id].names.append(weight.name)
            return
        self._of_value[value.id] = self._observe([weight], self.places[value.id], value.width)

    def taken_by_experts(self, weights: list[G.Weight], x: Place, routing: Routing) -> None:
        if self._keep is None:
            self._observe(weights, x, weights[0].shape[-1], routing)

    def _observe(self, weights: list[G.Weight], x: Place, width: int, routing: Routing | None = None) -> Observation:
        experts = weights[0].shape[0] if routing else 1
        rows = experts if self._keep is None else self.batch
        sums, counts = np.zeros((rows, width), np.float32), np.zeros(experts, np.int64)
        observation = Observation([weight.name for weight in weights], sums, counts)
        self.observations.append(observation)
        fields: dict[int, Any] = {
            R.OBS_X: x, R.OBS_X_STRIDE: x.stride, R.OBS_WIDTH: width, R.OBS_SUMS: sums, R.OBS_COUNTS: counts,
        }  # fmt: skip
        reads: list[object] = [x]
        if routing:
            fields |= {
                R.OBS_SLOTS: routing.slots, R.OBS_RANGES: routing.ranges, R.OBS_USED: routing.n_used,
                R.OBS_BY_SLOT: int(routing.by_slot),
            }  # fmt: skip
            reads += [routing.slots, routing.ranges]
        kernel = "observe-experts" if routing else "observe-rows" if self._keep is None else "observe-keep"
        self.emit(kernel, fields, reads, [], False)
        return observation
