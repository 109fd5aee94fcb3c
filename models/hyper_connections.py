"""Hyper-connections (arXiv:2409.19606): several residual streams side by side. Each part of a block reads a mixture of
them, and adds what it makes to each by a weight of its own; the weights come from the streams themselves."""

from dataclasses import dataclass

import numpy as np

from qrun.models.graph import Constant, GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata

MAX_STREAMS = 64


@dataclass(frozen=True)
class Streams:
    """How many there are; what is added to weights, and what those of the way back are multiplied by."""

    count: int
    eps: float
    magnitude: float

    @classmethod
    def read(cls, metadata: Metadata) -> "Streams":
        """From the keys under `hyper_connection`."""
        count = metadata.integer("hyper_connection.count", high=MAX_STREAMS)
        eps = metadata.real("hyper_connection.epsilon", high=1.0)
        return cls(count, eps, metadata.real("hyper_connection.magnitude", high=1e6))

    def read_weights(self, builder: GraphBuilder, h: Hyperparameters, streams: Value, name: str) -> Value:
        """Weights of the way in [count], where the way back has none."""
        return self._weights(builder, h, streams, name, magnitudes=(1.0,))

    def both_weights(self, builder: GraphBuilder, h: Hyperparameters, streams: Value, name: str) -> tuple[Value, Value]:
        """Weights of the way in and of the way back, both [count]."""
        both = self._weights(builder, h, streams, name, magnitudes=(1.0, self.magnitude))
        return builder.slice(both, 0, self.count), builder.slice(both, self.count, self.count)

    def _weights(
        self, builder: GraphBuilder, h: Hyperparameters, streams: Value, name: str, magnitudes: tuple[float, ...]
    ) -> Value:
        width = self.count * len(magnitudes)
        mixed = builder.linear(builder.rms_norm_with(streams, None, h.rms_eps), f"{name}_fn", width, bias=False)
        scales = builder.constant(f"{name}_scale.weight", len(magnitudes))
        base = builder.constant(f"{name}_base.weight", width)
        opened = builder.activate_alone(builder.affine(mixed, self._each(scales), base), "sigmoid")
        return builder.affine(opened, self._each(magnitudes), np.full(width, self.eps, np.float32))

    def _each(self, values: Constant | tuple[float, ...]) -> Constant:
        return np.repeat(np.asarray(values, np.float32), self.count)
