"""Operations that make something of each row by itself, whatever the other rows of a step are."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qrun.models.graph.values import Constant, Value, Weight

Activation = Literal["silu", "gelu", "relu", "clamped_silu", "limited_silu", "swiglu_oai", "situ"]
"""What a gate makes of what it lets through: act(gate) * up. `gelu` is the tanh approximation. `clamped_silu` is silu
with the gate at most a limit, and up between -limit and limit; `limited_silu` has silu(gate) at most it. `swiglu_oai`
is gpt-oss's: gate * sigmoid(1.702 gate) * (up + 1), with the gate at most 7, and up between -7 and 7. `situ` is Kimi
K3's: sigmoid(gate) * bent(gate) * bent(up), with bent(x) = limit * tanh(x / limit); up has a limit of its own, or none
where that is 0."""
Alone = Literal["gelu", "relu", "relu_squared", "xielu", "silu", "sigmoid", "softplus", "signed_root", "exp"]
"""Activations that multiply nothing. `signed_root` is sign(x) * sqrt(max(|x|, 1e-6))."""
GateKind = Literal["sigmoid", "softplus", "silu", "identity"]


@dataclass(frozen=True, eq=False)
class Embed:
    """out[i] = weight[token[i]] * scale, or with `by_position` weight[position[i]] * scale."""

    out: Value
    weight: Weight
    scale: float
    by_position: bool = False


@dataclass(frozen=True, eq=False)
class Input:
    """Rows that come from outside: those of another graph's `hidden`."""

    out: Value


@dataclass(frozen=True, eq=False)
class RMSNorm:
    """out = x / sqrt(mean(x * x) + eps) * weight + bias, over x seen as [rows, groups, width / groups].

    `weight` and `bias` are [width / groups], or [groups, width / groups]; a norm of each head's query or key has a
    group per head. `name` is that of their tensors, without its ending, where they are taken as the file has them.
    """

    out: Value
    x: Value
    weight: Constant | None
    eps: float
    groups: int
    bias: Constant | None = None
    name: str | None = None


@dataclass(frozen=True, eq=False)
class LayerNorm:
    """out = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias, over groups as in `RMSNorm`, with its `name`."""

    out: Value
    x: Value
    weight: Constant | None
    bias: Constant | None
    eps: float
    groups: int = 1
    name: str | None = None


@dataclass(frozen=True, eq=False)
class Linear:
    """out = scale * (x @ weight.T) + bias, with `bias` [out.width]."""

    out: Value
    x: Value
    weight: Weight
    bias: Constant | None
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class HeadLinear:
    """Each head through a matrix of its own: out[head] = weight[head] @ x[head, start : start + columns].

    x is seen as [rows, n_heads, x.width / n_heads], `weight` is [n_heads, rows, columns].
    """

    out: Value
    x: Value
    weight: Weight
    start: int


@dataclass(frozen=True, eq=False)
class Join:
    """Heads from parts of others: out[head] = x[head, of_x] followed by z[head, of_z].

    out is [rows, n_heads, sizes of both]; `of_x` and `of_z` are ranges of a head's dimensions. Where z has a single
    head, all share it. Without z there is only the first part.
    """

    out: Value
    x: Value
    z: Value | None
    n_heads: int
    of_x: range
    of_z: range
    z_heads: int


@dataclass(frozen=True, eq=False)
class Slice:
    """out = x[:, start : start + out.width]."""

    out: Value
    x: Value
    start: int


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary position embedding of every head of x (Su et al., arXiv:2104.09864).

    Pair j of a head turns by position * frequencies[j] radians, and is multiplied by `magnitude`. Pairs are
    (2j, 2j + 1) if `interleaved`, else (j, j + n_rot / 2), counted from dimension `start` on. The other dimensions pass
    through unchanged.
    `frequencies` [n_rot / 2] has the base, the scaling and the rope factors folded in. With a `temperature`, the
    magnitude grows with the position (see `Temperature`).
    """

    out: Value
    x: Value
    head_dim: int
    n_rot: int
    interleaved: bool
    frequencies: Constant
    magnitude: float
    temperature: "Temperature | None" = None
    start: int = 0
    behind: int = 0
    """Rows turn as those so many positions before them do, the first ones not at all."""


@dataclass(frozen=True)
class Temperature:
    """Queries far behind the trained context are made longer: 1 + scale * log(1 + floor((position + offset) / length))
    times."""

    scale: float
    length: int
    offset: int = 0

    def at(self, positions: NDArray[np.integer]) -> NDArray[np.float64]:
        """By how much queries at some positions are multiplied."""
        return 1.0 + self.scale * np.log(1.0 + (positions + self.offset) // self.length)


@dataclass(frozen=True, eq=False)
class Rotation:
    """How a model turns its heads: what queries and keys of a layer have in common (see `Rope`)."""

    frequencies: Constant
    magnitude: float
    interleaved: bool
    temperature: Temperature | None = None
    """Of queries alone."""


@dataclass(frozen=True, eq=False)
class Activate:
    """out = act(gate) * up. `limit` is that of the kinds that have one, `up_limit` the second one of `situ`."""

    out: Value
    gate: Value
    up: Value
    kind: Activation
    limit: float = 0.0
    up_limit: float = 0.0


@dataclass(frozen=True, eq=False)
class ActivateAlone:
    """out = act(x): GELU, max(x, 0) and its square, x * sigmoid(x), sigmoid(x), log(1 + exp(x)), or xIELU
    (arXiv:2411.13010).

    The last is p x^2 + b x above 0, and n (exp(min(x, e)) - 1 - x) + b x below, with `parameters` n, p, b, e.
    """

    out: Value
    x: Value
    kind: Alone
    parameters: Constant | None = None


@dataclass(frozen=True, eq=False)
class Gate:
    """out = act(gate) * x, where each of the gate's values counts for x.width / gate.width neighbours of x."""

    out: Value
    gate: Value
    x: Value
    kind: GateKind


@dataclass(frozen=True, eq=False)
class Clamp:
    """out = x, but not beyond -limit and limit."""

    out: Value
    x: Value
    limit: float


@dataclass(frozen=True, eq=False)
class Add:
    """out = a + b."""

    out: Value
    a: Value
    b: Value


@dataclass(frozen=True, eq=False)
class Mix:
    """Streams from others, by weights of each row: out[i] = sum over j of weights[i, j] * x[j], plus add[i].

    out (and `add`, if there is one) is seen as [rows, n_out, width / n_out], x as [rows, n_in, ...] with as wide
    streams, and `weights` as [rows, n_out, n_in].
    """

    out: Value
    x: Value
    weights: Value
    add: Value | None
    n_out: int


@dataclass(frozen=True, eq=False)
class MixByScore:
    """The mean of streams, by how well they fit: out = sum of share * stream, with the softmax of weight . norm(stream)
    for shares, where norm is the root mean square norm.

    The streams are those of x [rows, n, width], and behind them z [rows, width]; `weight` is [width].
    """

    out: Value
    x: Value
    z: Value
    weight: Constant
    eps: float


@dataclass(frozen=True, eq=False)
class Balance:
    """Each row as a matrix [n, n] whose rows and columns have about the sum 1 (Sinkhorn and Knopp, 1967), turned over.

    First the softmax of every row, plus eps; then columns are divided by their sums + eps; then `rounds` - 1 times rows
    and columns.
    """

    out: Value
    x: Value
    n: int
    rounds: int
    eps: float


@dataclass(frozen=True, eq=False)
class MatchMagnitude:
    """Each of x.width / like.width groups of x, made as long as `like`: out = x * |like| / |x|, or 0 where x is 0."""

    out: Value
    x: Value
    like: Value


@dataclass(frozen=True, eq=False)
class GaussianTopK:
    """out = max(x - mean(x) - deviations * std(x), 0), with the standard deviation of a sample."""

    out: Value
    x: Value
    deviations: float


@dataclass(frozen=True, eq=False)
class Dot:
    """out[i] = the sum of the products of a and b, of each of `out.width` groups of their columns."""

    out: Value
    a: Value
    b: Value


@dataclass(frozen=True, eq=False)
class Scale:
    """out = factor * x."""

    out: Value
    x: Value
    factor: float


@dataclass(frozen=True, eq=False)
class Affine:
    """out = x * weight + bias, with a row [width] for each; one of them may be missing."""

    out: Value
    x: Value
    weight: Constant | None
    bias: Constant | None


@dataclass(frozen=True, eq=False)
class Softcap:
    """out = cap * tanh(x / cap)."""

    out: Value
    x: Value
    cap: float


@dataclass(frozen=True, eq=False)
class SelectRows:
    """The rows of x whose logits are wanted; all operations after this one belong to the head."""

    out: Value
    x: Value
