"""Cosines and sines for rotary position embedding, by position, computed as far as a conversation has come."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qrun.formats.dataclass import dataclass
from qrun.models.graph import Temperature


@dataclass
class RopeTable:
    """Cosines and sines of every position, as far as computed: float32 [context, pairs, 2], times a magnitude."""

    frequencies: NDArray[np.float32]
    magnitude: float
    values: NDArray[np.float32]
    filled: int = 0
    temperature: Temperature | None = None

    def fill(self, end: int) -> None:
        """Have positions up to `end`."""
        if end <= self.filled:
            return
        end = min(max(end, self.filled + 256), len(self.values))
        positions = np.arange(self.filled, end)[:, None]
        angles = positions.astype(np.float64) * self.frequencies.astype(np.float64)
        magnitude = self.magnitude * (1.0 if self.temperature is None else self.temperature.at(positions))
        self.values[self.filled : end, :, 0] = np.cos(angles) * magnitude
        self.values[self.filled : end, :, 1] = np.sin(angles) * magnitude
        self.filled = end
