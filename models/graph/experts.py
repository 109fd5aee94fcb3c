"""The mixture of experts: of many feed-forward networks, each row goes through a few."""

from dataclasses import dataclass
from typing import Literal

from qrun.models.graph.row_operations import Activation, Alone
from qrun.models.graph.values import Constant, Indices, Value, Weight

Gating = Literal["softmax", "sigmoid", "sqrt_softplus"]


@dataclass(frozen=True, eq=False)
class Change:
    """What an adapter makes of one matrix of a `MoE`: it counts as weight + scale * b @ a, expert by expert.

    `a` is [n_expert, rank, columns], `b` is [n_expert, rows, rank]; those of the router have no experts.
    """

    weight: Weight
    a: Weight
    b: Weight
    scale: float


@dataclass(frozen=True, eq=False)
class Adjustment:
    """What is done to the product of one matrix of a `MoE`: `scale` [n_expert], then `bias` [n_expert, rows]."""

    weight: Weight
    scale: Constant | None
    bias: Constant | None


@dataclass(frozen=True, eq=False)
class MoE:
    """A mixture of experts: the `n_used` experts that the router likes best, summed by their weights.

    Probabilities are gating(router @ router_x + router_bias), with x for `router_x` if there is none. Experts are
    chosen by probability + `selection_bias`, and of `n_groups` groups of neighbouring experts only in those
    `n_groups_used` whose two best experts have the largest sum. The probabilities of the chosen are divided by their
    sum if `normalize` (by 2^-14 at least), then multiplied by `scale`.

    An expert is down @ (act(gate @ x) * (up @ x)), or without a gate down @ act(up @ x). `router` is [n_expert, width];
    the others are [n_expert, rows, columns]. Where `up` is `gate`, it holds the gate's rows and then those of up. Any
    of the four may have changes. Products of the file's own weights may be multiplied by a scale for each expert, and
    get a bias (`adjustments`).
    """

    out: Value
    x: Value
    router: Weight
    router_bias: Constant | None
    gate: Weight | None
    up: Weight
    down: Weight
    n_used: int
    kind: Activation | Alone
    normalize: bool
    scale: float
    gating: Gating
    changes: tuple[Change, ...] = ()
    router_x: Value | None = None
    selection_bias: Constant | None = None
    n_groups: int = 1
    n_groups_used: int = 1
    together: int = 1
    """So many neighbouring choices of the router are the same expert, chosen once or more. The weight of expert i is
    then made from probability i, whichever choice led to it."""
    limit: float = 0.0
    """Of the activations that have one."""
    weigh_inputs: bool = False
    """Are the inputs of experts multiplied by their weights, and not what they give?"""
    adjustments: tuple[Adjustment, ...] = ()
    up_limit: float = 0.0
    """The second limit of `situ`."""
    by_token: Indices | None = None
    """[n_vocab, n_used]: experts that follow from a row's token, whatever the router says; it still says how much they
    count."""

    @property
    def matrices(self) -> tuple[Weight, ...]:
        """Those of the experts, each once: gate and up may be one."""
        return tuple(dict.fromkeys(weight for weight in (self.gate, self.up, self.down) if weight is not None))
