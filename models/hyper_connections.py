"""Hyper-connections (arXiv:2409.19606): several residual streams side by side. Each part of a block reads a mixture of
them, and adds what it makes to each by a weight of its own; the weights come from the streams themselves."""


import numpy as np

from qrun.formats.dataclass import dataclass
from qrun.models.graph import Constant, GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata

MAX_STREAMS = 64
MAX_ROUNDS = 100
INTO_STREAM = 2.0
"""What a part of a block makes goes into a balanced stream by at most this weight."""


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

@dataclass(frozen=True)
class BalancedStreams:
    """Streams that are mixed with each other, too, by matrices whose rows and columns have about the sum 1 (mHC:
    arXiv:2512.24880). rounds: of making them so."""

    count: int
    eps: float
    rounds: int

    @classmethod
    def read(cls, metadata: Metadata) -> "BalancedStreams":
        """From the keys under `hyper_connection`."""
        count = metadata.integer("hyper_connection.count", low=2, high=MAX_STREAMS)
        eps = metadata.real("hyper_connection.epsilon", high=1.0)
        return cls(count, eps, max(metadata.integer("hyper_connection.sinkhorn_iterations", low=0, high=MAX_ROUNDS), 1))

    def enter(
        self, builder: GraphBuilder, h: Hyperparameters, streams: Value, name: str
    ) -> tuple[Value, tuple[Value, Value]]:
        """What a part of a block reads; and the weights of the way back, of what it makes and of the streams."""
        n = self.count
        mixed = builder.rms_norm_with(streams, None, h.rms_eps)
        mixed = builder.linear(mixed, f"{name}_fn", (2 + n) * n, bias=False)
        scales = np.repeat(builder.constant(f"{name}_scale.weight", 3), (n, n, n * n))
        mixed = builder.affine(mixed, scales, builder.constant(f"{name}_base.weight", (2 + n) * n))
        opened = builder.activate_alone(builder.slice(mixed, 0, 2 * n), "sigmoid")
        factors = np.repeat(np.array([1.0, INTO_STREAM], np.float32), n)
        opened = builder.affine(opened, factors, np.repeat(np.array([self.eps, 0.0], np.float32), n))
        between = builder.balance(builder.slice(mixed, 2 * n, n * n), n, self.rounds, self.eps)
        return builder.mix(streams, builder.slice(opened, 0, n), 1), (builder.slice(opened, n, n), between)

    def leave(self, builder: GraphBuilder, streams: Value, y: Value, back: tuple[Value, Value]) -> Value:
        """The streams, mixed, and what a part of a block made of them."""
        into, between = back
        return builder.mix(y, into, self.count, add=builder.mix(streams, between, self.count))

    def mean(self, builder: GraphBuilder, streams: Value) -> Value:
        """Of all streams."""
        return mean(builder, streams, self.count)


@dataclass(frozen=True)
class GatedStreams:
    """Streams with a gate for each of their values on the way in, through a narrow row (Qwen 4)."""

    count: int
    narrow: int

    @classmethod
    def read(cls, metadata: Metadata) -> "GatedStreams":
        """From the keys under `hyper_connection`."""
        count = metadata.integer("hyper_connection.count", low=2, high=MAX_STREAMS)
        return cls(count, metadata.integer("hyper_connection.low_rank"))

    def enter(self, builder: GraphBuilder, h: Hyperparameters, streams: Value, name: str) -> tuple[Value, Value]:
        """What a part of a block reads; and the streams' norms, from which the way back follows."""
        normed = self.norm(builder, h, streams, f"{name}_norm")
        narrow = builder.scale(builder.linear(normed, f"{name}_down", self.narrow), 1.0 / self.count)
        gate = builder.linear(builder.activate_alone(narrow, "silu"), f"{name}_up", streams.width)
        return mean(builder, builder.gate(gate, normed, "sigmoid"), self.count), normed

    def leave(self, builder: GraphBuilder, streams: Value, y: Value, normed: Value, name: str) -> Value:
        """The streams and what a part of a block made of them, by weights about 1."""
        into = builder.scale(builder.linear(normed, f"{name}_inject", self.count), 1.0 / self.count)
        into = builder.scale(builder.activate_alone(into, "sigmoid"), INTO_STREAM)
        return builder.mix(y, into, self.count, add=streams)

    def norm(self, builder: GraphBuilder, h: Hyperparameters, streams: Value, name: str) -> Value:
        """Each stream normed, with weights of its own."""
        weight = builder.loose_constant(f"{name}.weight", self.count, streams.width // self.count)
        return builder.rms_norm_with(streams, weight, h.rms_eps, self.count)


def mean(builder: GraphBuilder, streams: Value, count: int) -> Value:
    """Of all streams."""
    width = streams.width // count
    total = builder.slice(streams, 0, width)
    for i in range(1, count):
        total = builder.add(total, builder.slice(streams, i * width, width))
    return builder.scale(total, 1.0 / count)
