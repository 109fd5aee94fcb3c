"""Cosines and sines for rotary position embedding, by position, computed as far as a conversation has come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass
class RopeTable:
    """Cosines and sines of every position, as far as computed: float32 [context, pairs, 2]."""

    frequencies: NDArray[np.float32]
    magnitude: float
    values: NDArray[np.float32]
    filled: int = 0

    def fill(self, end: int) -> None:
        """Have positions up to `end`."""
        if end <= self.filled:
            return
        end = min(max(end, self.filled + 256), len(self.values))
        angles = np.arange(self.filled, end, dtype=np.float64)[:, None] * self.frequencies.astype(np.float64)
        self.values[self.filled : end, :, 0] = np.cos(angles) * self.magnitude
        self.values[self.filled : end, :, 1] = np.sin(angles) * self.magnitude
        self.filled = end
