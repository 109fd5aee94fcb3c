"""Collecting an importance matrix: a text runs through the model, and the inputs of its matrices are summed up."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from qrun.engine.judging.scoring import Chunks, Score, scored_logits
from qrun.engine.program.observing import Observation
from qrun.engine.program.runtime import Runtime
from qrun.engine.quantize.imatrix import InputSums

# called with chunks done, all of them, and the score so far
Progress = Callable[[int, int, Score], None]


class Collector:
    """Adds up in float64 what an observing runtime has summed in float32."""

    def __init__(self, runtime: Runtime) -> None:
        """runtime: one that observes. What it has seen before counts too."""
        self._totals: list[tuple[Observation, NDArray[np.float64]]] = [
            (observation, np.zeros(observation.sums.shape)) for observation in runtime.observations
        ]

    def take(self) -> None:
        """Take over what has been summed since the last time: each chunk or so, while float32 still resolves it."""
        for observation, total in self._totals:
            total += observation.sums
            observation.sums[:] = 0

    @property
    def sums(self) -> dict[str, InputSums]:
        """By the tensor's name. Raises ValueError if a sum is no finite number."""
        result = {}
        for observation, total in self._totals:
            if not np.isfinite(total).all():
                raise ValueError(f"the inputs of {observation.names[0]} are not finite numbers: the model is broken")
            for name in observation.names:
                result[name] = InputSums(total, observation.counts)
        return result


def collect(runtime: Runtime, chunks: Chunks, progress: Progress | None = None) -> tuple[dict[str, InputSums], Score]:
    """Run all chunks through an observing runtime. Returns the sums by tensor, and how well the text was predicted."""
    collector, score = Collector(runtime), Score()
    for done, chunk in enumerate(chunks, 1):
        for logits, targets in scored_logits(runtime, chunk, chunks.bos):
            score.add(logits, targets)
            collector.take()
        collector.take()
        if progress:
            progress(done, len(chunks), score)
    return collector.sums, score


def observe(
    runtime: Runtime, chunks: Chunks, progress: Callable[[int, int], None] | None = None
) -> dict[str, InputSums]:
    """The sums by tensor alone: without the score, the head need not be computed."""
    collector = Collector(runtime)
    for done, chunk in enumerate(chunks, 1):
        with closing(runtime.sequence()) as sequence:
            runtime.evaluate(sequence, chunk, logits="none")
        collector.take()
        if progress:
            progress(done, len(chunks))
    return collector.sums
