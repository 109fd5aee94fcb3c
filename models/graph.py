"""The vocabulary in which a model is described, and the builder that the architectures speak to.

A graph is a list of operations in the order in which they run. Nothing here computes: the engine compiles the
operations, and the tests interpret them with NumPy (`tests/reference.py`), which is also their exact definition.
Every `Value` is a float32 array [rows, width]; the rows are the tokens of one step.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import field, replace
from math import prod
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qrun.formats import FormatError, GGUFReader, TensorInfo, TensorType
from qrun.formats.blocks import BLOCK_FORMATS
from qrun.formats.dataclass import dataclass
from qrun.models.support import type_problem

Activation = Literal["silu", "gelu", "relu", "clamped_silu", "limited_silu", "swiglu_oai", "situ"]
"""What a gate makes of what it lets through: act(gate) * up. `gelu` is the tanh approximation. `clamped_silu` is silu
with the gate at most a limit, and up between -limit and limit; `limited_silu` has silu(gate) at most it. `swiglu_oai`
is gpt-oss's: gate * sigmoid(1.702 gate) * (up + 1), with the gate at most 7, and up between -7 and 7. `situ` is Kimi
K3's: sigmoid(gate) * bent(gate) * bent(up), with bent(x) = limit * tanh(x / limit); up has a limit of its own, or none
where that is 0."""
Alone = Literal["gelu", "relu", "relu_squared", "xielu", "silu", "sigmoid", "softplus", "signed_root", "exp"]
"""Activations that multiply nothing. `signed_root` is sign(x) * sqrt(max(|x|, 1e-6))."""
GateKind = Literal["sigmoid", "softplus", "silu", "identity"]
Side = Literal["text", "source", "encoder"]
"""Whose keys and values a layer has: those of the text; of the source that a text answers, which all its rows see; or
of the source while an encoder reads it (see `Graph.encoder`)."""
Gating = Literal["softmax", "sigmoid", "sqrt_softplus"]
Constant = NDArray[np.float32]
Indices = NDArray[np.int32]


@dataclass(frozen=True)
class Value:
    """The result of one operation: float32 [rows, width]."""

    id: int
    width: int


@dataclass(frozen=True, eq=False)
class Weight:
    """A tensor of the file, in file layout. Its existence, shape and type have been checked.

    `shape` is row-major, as NumPy has it: a matrix is (rows, columns), experts are (n_expert, rows, columns).
    `raw` is a flat uint8 view of the mapped file. One tensor is one `Weight` object, however often it is used.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    raw: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Embed:
    """out[i] = weight[token[i]] * scale, or with `by_position` weight[position[i]] * scale."""

    out: Value
    weight: Weight
    scale: float
    by_position: bool = False


@dataclass(frozen=True)
class Hashes:
    """Numbers for the last few tokens: (t[0] * multipliers[0] xor ... t[-i] * multipliers[i]) % size + offset, in 64
    bits without a sign.

    Of the last two tokens there are `per_length` numbers, of the last three as many more, and so on up to all that have
    a multiplier. `sizes` and `offsets` are those of each number. What is before the first token, or before an `end` or
    that itself, counts as `end`, except for the last token.
    """

    multipliers: tuple[int, ...]
    per_length: int
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    end: int


@dataclass(frozen=True, eq=False)
class EmbedHashes:
    """out[i] = weight[number] of all numbers that the tokens up to i have, side by side. `state` is its number in
    `Graph.states`."""

    out: Value
    weight: Weight
    hashes: Hashes
    state: int


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
class Attention:
    """Appends k and v to the cache of `layer`, then attention over that cache: causal, or of a whole text that was
    appended in one step (`CacheLayer.causal`).

    Without v, values are a part of the keys (`CacheLayer.values_in_keys`). Without both, the layer has no keys and
    values of its own, and attends to those that another one appended there.
    Per head: softmax(cap(scale * q . k)) . v, with cap(s) = softcap * tanh(s / softcap) where there is one.
    Head counts, head sizes and the window are in `Graph.cache_layers[layer]`; query head h reads key and value head
    h // (n_heads / n_kv_heads).

    With `sinks` [n_heads], each head's softmax is over one score more, its sink, whose weight is then dropped. With
    `slopes` [n_heads], each score gets -slope * distance (ALiBi: arXiv:2108.12409). With `biases` [n_heads, 2 n + 1],
    each score gets the one of how far behind the query its key is: from -n on, and of what is farther the outermost.

    With `entries`, there is a second cache beside it, that of `entries_layer`, which gets a row of them at the end of
    every `CacheLayer.every` positions. Each row sees all of those up to itself, too, in the same softmax.
    """

    out: Value
    q: Value
    k: Value | None
    v: Value | None
    layer: int
    scale: float
    softcap: float | None
    sinks: Constant | None = None
    slopes: Constant | None = None
    entries: Value | None = None
    entries_layer: int | None = None
    biases: Constant | None = None


@dataclass(frozen=True, eq=False)
class Keep:
    """Puts k and v into the cache of `layer`, for attention of another graph. out = k."""

    out: Value
    k: Value
    v: Value
    layer: int


@dataclass(frozen=True, eq=False)
class Pool:
    """The rows of every `every` positions as one, each column by itself: out = sum over these rows of share * x, with
    the softmax of their scores for shares. All rows but the last of `every` get 0.

    A row's scores get those of its place among them, `by_place` [every, width]. x and the scores are as wide as out.
    With `overlap` they are twice as wide: the second half counts as above, and the first one together with it in the
    next result, if there is one before. Rows lie in the cache of `layer` (`CacheLayer.exact`).
    """

    out: Value
    x: Value
    scores: Value
    by_place: Constant
    every: int
    overlap: bool
    layer: int


@dataclass(frozen=True, eq=False)
class Convolution:
    """Each column of x with those of the rows before it: out[t] = act(sum of weight[j] * x[t - taps + 1 + j] + bias).

    `weight` is [taps, width]; rows before the first are 0. With `silu`, act is x * sigmoid(x), else nothing. `state` is
    its number in `Graph.states`.
    """

    out: Value
    x: Value
    weight: Constant
    bias: Constant | None
    silu: bool
    state: int


@dataclass(frozen=True, eq=False)
class LinearAttention:
    """Each head keeps a matrix S [dim_k, dim_v], at first 0, which every row changes before it is asked:
    S = exp(decay) S + k^T u; out = scale * q S.

    u is v, or with `beta` (the delta rule) beta * (v - k exp(decay) S). q and k are [rows, n_key_heads, dim_k], v is
    [rows, n_heads, dim_v]; head h has the query and key of head h % n_key_heads if `tiled`, else of head
    h // (n_heads / n_key_heads). `decay` has a number for each head, or for each dimension of its keys; all rows have
    the same if it is a constant.
    """

    out: Value
    q: Value
    k: Value
    v: Value
    decay: Value | Constant
    beta: Value | None
    n_heads: int
    n_key_heads: int
    tiled: bool
    scale: float
    state: int

    @property
    def dim_k(self) -> int:
        """Dimensions of a key."""
        return self.k.width // self.n_key_heads

    @property
    def dim_v(self) -> int:
        """Dimensions of a value."""
        return self.v.width // self.n_heads

    @property
    def fades_by_dimension(self) -> bool:
        """Has each dimension of a head its own decay?"""
        width = self.decay.width if isinstance(self.decay, Value) else len(self.decay)
        return width != self.n_heads


@dataclass(frozen=True, eq=False)
class SelectiveScan:
    """Each channel keeps a vector h [n_state], at first 0, which every row changes before it is asked (Gu and Dao,
    "Mamba", 2023): h = exp(time * fading) h + time * x * b; out = c . h + kept * x.

    x and `time` have a number for each channel, b and c are rows [n_state] that all channels share. `fading` is
    [width, n_state], `kept` is [width].
    """

    out: Value
    x: Value
    time: Value
    b: Value
    c: Value
    fading: Constant
    kept: Constant
    state: int

    @property
    def n_state(self) -> int:
        """Numbers in the state of a channel."""
        return self.b.width


@dataclass(frozen=True, eq=False)
class WKV:
    """Each head keeps a matrix S [dim, dim], at first 0, which every row changes before it is asked (RWKV-7:
    arXiv:2503.14456): S = kept S + b^T (a S) + k^T v; out = r S. Without a and b there is no such term.

    All are rows [n_heads, dim]; `kept` has a factor for each row of S. `dim` is a multiple of `WKV_MULTIPLE`.
    """

    out: Value
    r: Value
    kept: Value
    k: Value
    v: Value
    a: Value | None
    b: Value | None
    n_heads: int
    state: int

    @property
    def dim(self) -> int:
        """Dimensions of a head."""
        return self.k.width // self.n_heads


WKV_MULTIPLE = 16


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


@dataclass(frozen=True, eq=False)
class SelectRows:
    """The rows of x whose logits are wanted; all operations after this one belong to the head."""

    out: Value
    x: Value


Operation = (
    Embed | EmbedHashes | Input | RMSNorm | LayerNorm | Linear | HeadLinear | Join | Slice | Rope | Attention | Keep
    | Pool | Convolution | LinearAttention | SelectiveScan | WKV | Activate | ActivateAlone | Gate | Clamp | Add | Mix
    | MixByScore | Balance | Dot | MatchMagnitude | GaussianTopK | Scale | Affine | Softcap | MoE | SelectRows
)  # fmt: skip

STATEFUL = (Attention, Keep, Pool, EmbedHashes, Convolution, LinearAttention, SelectiveScan, WKV)
"""Operations whose rows depend on the rows before them."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """How a model turns its heads: what queries and keys of a layer have in common (see `Rope`)."""

    frequencies: Constant
    magnitude: float
    interleaved: bool
    temperature: Temperature | None = None
    """Of queries alone."""


@dataclass(frozen=True)
class CacheLayer:
    """What the KV cache of one layer holds. A position sees itself and the window - 1 positions before it, or if
    `chunked` those of its own chunk of `window` positions. If not `causal` it sees all, or those that are not farther
    away than half a window, on either side."""

    n_heads: int
    n_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    window: int | None
    chunked: bool = False
    values_in_keys: bool = False
    """Values are the first `head_dim_v` dimensions of keys, and nothing beside them."""
    precise: bool = False
    """Kept in float32 where caches are otherwise float16."""
    exact: bool = False
    """Kept in float32 always."""
    every: int = 1
    """How many positions share one entry."""
    causal: bool = True
    side: Side = "text"

    @property
    def behind(self) -> int | None:
        """How many positions one sees, itself and those before it; None for all."""
        return self.window if self.causal or self.window is None else self.window // 2 + 1

    @property
    def ahead(self) -> int:
        """How many positions one sees behind itself."""
        if self.causal:
            return 0
        return 1 << 40 if self.window is None else self.window // 2


@dataclass
class Graph:
    """A model, ready to be compiled. `context_length` is the trained one, in tokens; `context` the one to run it with,
    for which it was built, and `max_context` the longest one for which it is what the file describes."""

    architecture: str
    operations: list[Operation]
    logits: Value
    cache_layers: list[CacheLayer]
    n_vocab: int
    n_embd: int
    context_length: int
    context: int = 0
    n_states: int = 0
    """How many operations keep a state of their own for each sequence."""
    max_context: int | None = None
    embeds: bool = False
    """Of `logits`, which are none then but rows of n_embd numbers, embeddings are made."""
    hidden: Value | None = None
    """What draft layers go on from (see `models.drafts`), if somebody wants it: of every row, or of those selected."""
    uses: Mapping[str, int] = field(default_factory=dict)
    """How many times the builder asked for each tensor: what was asked for once has one use."""
    encoder: "Graph | None" = None
    """What reads the source that a text answers, of models with two halves: it leaves keys and values of the source in
    some of the cache's layers, which both share."""
    start: int = 0
    """The token with which an answer to a source begins."""

    @property
    def causal(self) -> bool:
        """Does a token see those before it only? Else a text is computed as a whole, in one step."""
        return all(layer.causal for layer in self.cache_layers if layer.side == "text")


class GraphBuilder:
    """Appends operations; each method takes the values and the tensor names of one, and returns its result.

    Names are those of the file without their ending (`blk.0.attn_q`): `.weight` must be there, `.bias` may be. A
    tensor that is missing, or has another shape than the operation needs, or a type that cannot be decoded, raises
    `FormatError` with the file and the tensor. Nothing is merged or reordered; tensors that nobody asks for are fine.
    """

    def __init__(self, reader: GGUFReader) -> None:
        self.reader = reader
        self.operations: list[Operation] = []
        self.cache_layers: list[CacheLayer] = []
        self.max_context: int | None = None
        self.encoder: Graph | None = None
        self.start = 0
        self._n_values = self._n_states = 0
        self._weights: dict[str, Weight] = {}
        self._uses: Counter[str] = Counter()

    # Tensors

    def has(self, name: str) -> bool:
        """Is there a tensor of this full name?"""
        return name in self.reader.tensors

    def n_rows(self, name: str) -> int:
        """How many rows the matrix of this full name has, or 0 if there is none."""
        tensor = self.reader.tensors.get(name)
        return tensor.shape[0] if tensor is not None and len(tensor.shape) == 2 else 0

    def count(self, name: str) -> int:
        """How many values the tensor of this full name has, or 0 if there is none."""
        tensor = self.reader.tensors.get(name)
        return prod(tensor.shape) if tensor is not None else 0

    def weight(self, name: str, *shape: int) -> Weight:
        """The tensor of this full name, to be read by kernels in file layout."""
        info = self._tensor(name, shape)
        return self._weights.setdefault(name, Weight(name, info.type, shape, info.raw))

    def constant(self, name: str, *shape: int) -> Constant:
        """The tensor of this full name as float32: norms, biases, rope factors."""
        values = self._tensor(name, shape).dequantize().reshape(shape)
        if not np.isfinite(values).all():
            raise self.error(f"tensor {name} has values that are not finite")
        return values

    def loose_constant(self, name: str, *shape: int) -> Constant:
        """The same where files have it in that shape, with dimensions of one anywhere between, or all in one row."""
        info = self.reader.tensors.get(name)
        found = None if info is None else _without_ones(info.shape)
        fits = found in (_without_ones(shape), _without_ones((prod(shape),)))
        return self.constant(name, *(info.shape if info is not None and fits else shape)).reshape(shape)

    def rows_constant(self, name: str, width: int) -> Constant:
        """The same as rows of that width, as many as there are."""
        return self.loose_constant(name, self.count(name) // width, width)

    def optional_constant(self, name: str, *shape: int) -> Constant | None:
        """As `constant`, or None if the file has no such tensor."""
        return self.constant(name, *shape) if self.has(name) else None

    def indices(self, name: str, *shape: int, below: int) -> Indices:
        """The tensor of this full name, of whole numbers from 0 on and below a limit."""
        info = self.reader.tensors.get(name)
        if info is None:
            raise self.error(f"tensor {name} is missing")
        if info.shape != shape or info.type is not TensorType.I32:
            raise self.error(f"tensor {name} is {info.type.name} {info.shape}, expected I32 {shape}")
        values = np.frombuffer(info.raw.tobytes(), "<i4").astype(np.int32).reshape(shape)
        if values.size and not (values.min() >= 0 and values.max() < below):
            raise self.error(f"tensor {name} has numbers outside of 0 to {below - 1}")
        return values

    def _tensor(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self.reader.tensors.get(name)
        if info is None:
            raise self.error(f"tensor {name} is missing")
        if _significant(info.shape) != _significant(shape):
            raise self.error(f"tensor {name} has shape {info.shape}, expected {shape}")
        if info.type not in BLOCK_FORMATS:
            raise self.error(type_problem(info, self.reader.tensors.values()))
        self._uses[name] += 1
        return info

    def error(self, problem: str) -> FormatError:
        """The error to raise about this file."""
        return FormatError(self.reader.path, problem)

    def limit_context(self, n: int) -> None:
        """Say that the graph is what the file describes for contexts of up to n tokens only."""
        self.max_context = n

    # Operations

    def embed(self, name: str, n_vocab: int, n_embd: int, scale: float = 1.0) -> Value:
        """Token ids to rows of an embedding matrix [n_vocab, n_embd]."""
        return self._append(Embed(self._value(n_embd), self.weight(f"{name}.weight", n_vocab, n_embd), scale))

    def input(self, width: int) -> Value:
        """Rows that come from outside."""
        return self._append(Input(self._value(width)))

    def embed_positions(self, name: str, n_positions: int, n_embd: int) -> Value:
        """Positions to rows of a matrix [n_positions, n_embd]."""
        weight = self.weight(f"{name}.weight", n_positions, n_embd)
        return self._append(Embed(self._value(n_embd), weight, 1.0, by_position=True))

    def embed_hashes(self, name: str, n_rows: int, dim: int, hashes: Hashes) -> Value:
        """The last tokens to rows of a matrix [n_rows, dim], as many as they have numbers."""
        assert all(offset + size <= n_rows for offset, size in zip(hashes.offsets, hashes.sizes, strict=True))
        weight = self.weight(f"{name}.weight", n_rows, dim)
        return self._append(EmbedHashes(self._value(dim * len(hashes.sizes)), weight, hashes, self._state()))

    def rms_norm(self, x: Value, name: str, eps: float, groups: int = 1, *, bias: bool = False) -> Value:
        """Root mean square norm, of the whole row or of each of `groups` equal parts by the same weight.

        bias: with the one that the file has, if it has one.
        """
        weight = self.constant(f"{name}.weight", x.width // groups)
        b = self.optional_constant(f"{name}.bias", x.width // groups) if bias else None
        return self._append(RMSNorm(self._value(x.width), x, weight, eps, groups, b, name))

    def rms_norm_with(self, x: Value, weight: Constant | None, eps: float, groups: int = 1) -> Value:
        """A norm whose weight has been looked up already, or that has none."""
        assert x.width % groups == 0
        return self._append(RMSNorm(self._value(x.width), x, weight, eps, groups))

    def layer_norm(self, x: Value, name: str, eps: float) -> Value:
        """Layer norm of the row, with a bias if the file has one."""
        weight, bias = self.constant(f"{name}.weight", x.width), self.optional_constant(f"{name}.bias", x.width)
        return self._append(LayerNorm(self._value(x.width), x, weight, bias, eps, name=name))

    def layer_norm_with(
        self, x: Value, weight: Constant | None, bias: Constant | None, eps: float, groups: int = 1
    ) -> Value:
        """A norm whose weight and bias have been looked up already, or that has none."""
        assert x.width % groups == 0
        return self._append(LayerNorm(self._value(x.width), x, weight, bias, eps, groups))

    def linear(self, x: Value, name: str, width: int, *, bias: bool = True) -> Value:
        """A matrix [width, x.width], and its bias and its scale if the file has one.

        bias: False leaves one out, where the reference engine does not add what a file has.
        """
        weight = self.weight(f"{name}.weight", width, x.width)
        return self.linear_with(x, weight, self.optional_constant(f"{name}.bias", width) if bias else None)

    def linear_row(self, x: Value, name: str) -> Value:
        """A matrix of one row, which the file has as a vector: [rows, 1]."""
        flat = self.weight(f"{name}.weight", x.width)
        return self.linear_with(x, Weight(flat.name, flat.type, (1, x.width), flat.raw), None)

    def linear_with(self, x: Value, weight: Weight, bias: Constant | None) -> Value:
        """A matrix and a bias that have been looked up already."""
        scale = self.optional_constant(f"{weight.name.removesuffix('.weight')}.scale", 1)
        factor = 1.0 if scale is None else float(scale[0])
        return self._append(Linear(self._value(weight.shape[0]), x, weight, bias, factor))

    def head_linear(self, x: Value, name: str, n_heads: int, width: int, columns: int, start: int = 0) -> Value:
        """A matrix [width, columns] for each head, which takes its dimensions from `start` on.

        The file may have them as one, below each other.
        """
        assert start + columns <= x.width // n_heads
        if self.n_rows(f"{name}.weight") and n_heads > 1:
            flat = self.weight(f"{name}.weight", n_heads * width, columns)
            weight = Weight(flat.name, flat.type, (n_heads, width, columns), flat.raw)
        else:
            weight = self.weight(f"{name}.weight", n_heads, width, columns)
        return self._append(HeadLinear(self._value(n_heads * width), x, weight, start))

    def join(
        self, x: Value, of_x: range, n_heads: int, z: Value | None = None, of_z: range = range(0), z_heads: int = 1
    ) -> Value:
        """A part of each head of x, and with z a part of each of its heads, or of its only one, behind that."""
        assert of_x.stop <= x.width // n_heads and z_heads in (1, n_heads)
        assert z is None or of_z.stop <= z.width // z_heads
        out = self._value(n_heads * (len(of_x) + len(of_z)))
        return self._append(Join(out, x, z, n_heads, of_x, of_z, z_heads))

    def repeat(self, x: Value, count: int) -> Value:
        """The row `count` times, side by side."""
        return self.join(x, range(0), count, x, range(x.width))

    def slice(self, x: Value, start: int, width: int) -> Value:
        """The columns from `start` on."""
        assert start + width <= x.width
        return self._append(Slice(self._value(width), x, start))

    def rope(
        self, x: Value, head_dim: int, rotation: Rotation, *, query: bool = False, start: int = 0, behind: int = 0
    ) -> Value:
        """Rotates dimensions of every head, two for each frequency, from `start` on."""
        n_rot = 2 * len(rotation.frequencies)
        assert start + n_rot <= head_dim and x.width % head_dim == 0
        frequencies, magnitude, interleaved = rotation.frequencies, rotation.magnitude, rotation.interleaved
        temperature = rotation.temperature if query else None
        out = self._value(x.width)
        return self._append(
            Rope(out, x, head_dim, n_rot, interleaved, frequencies, magnitude, temperature, start, behind)
        )

    def attention(
        self,
        q: Value,
        k: Value,
        v: Value | None,
        cache: CacheLayer,
        scale: float,
        softcap: float | None = None,
        sinks: Constant | None = None,
        slopes: Constant | None = None,
        entries: Value | None = None,
        every: int = 1,
        biases: Constant | None = None,
    ) -> Value:
        """Causal attention of the next layer; `cache` says how its cache is laid out.

        entries: rows beside the keys, of which every `every`-th counts.
        """
        assert q.width == cache.n_heads * cache.head_dim_k
        assert k.width == cache.n_kv_heads * cache.head_dim_k
        if v is None:
            assert cache.values_in_keys and cache.head_dim_v <= cache.head_dim_k
        else:
            assert not cache.values_in_keys and v.width == cache.n_kv_heads * cache.head_dim_v
        assert all(row is None or row.shape == (cache.n_heads,) for row in (sinks, slopes))
        assert biases is None or (len(biases) == cache.n_heads and biases.shape[1] % 2 == 1)
        layer, entries_layer = self._cache(cache), None
        if entries is not None:
            assert v is None and entries.width == k.width and not cache.chunked and slopes is None
            entries_layer = self._cache(replace(cache, window=None, every=every))
        out = self._value(cache.n_heads * cache.head_dim_v)
        return self._append(
            Attention(out, q, k, v, layer, scale, softcap, sinks, slopes, entries, entries_layer, biases)
        )

    def shared_attention(self, q: Value, layer: int, scale: float) -> Value:
        """Causal attention to the keys and values of an earlier layer."""
        cache = self.cache_layers[layer]
        assert q.width == cache.n_heads * cache.head_dim_k
        out = self._value(cache.n_heads * cache.head_dim_v)
        return self._append(Attention(out, q, None, None, layer, scale, None))

    def keep(self, k: Value, v: Value, cache: CacheLayer) -> int:
        """Keys and values for the cache of a layer of another graph: its number."""
        assert k.width == cache.n_kv_heads * cache.head_dim_k and v.width == cache.n_kv_heads * cache.head_dim_v
        layer = self._cache(cache)
        self._append(Keep(self._value(k.width), k, v, layer))
        return layer

    def beside(self) -> "GraphBuilder":
        """A builder for another graph of the same file, with the same layers of the cache."""
        other = GraphBuilder(self.reader)
        other.cache_layers, other._weights = self.cache_layers, self._weights
        return other

    def pool(self, x: Value, scores: Value, by_place: str, every: int, *, overlap: bool) -> Value:
        """The rows of every `every` positions as one, by scores; by_place: a tensor's name."""
        width = x.width // 2 if overlap else x.width
        assert scores.width == x.width and (not overlap or x.width % 2 == 0)
        places = self.constant(f"{by_place}.weight", every, x.width)
        kept = CacheLayer(2, 2, x.width, x.width, 2 * every if overlap else every, values_in_keys=True, exact=True)
        return self._append(Pool(self._value(width), x, scores, places, every, overlap, self._cache(kept)))

    def convolution(self, x: Value, name: str, taps: int, *, silu: bool = True, apart: int = 1) -> Value:
        """A convolution over time of each column: a matrix [x.width, taps], and a bias if the file has one.

        apart: how many tokens lie between those that taps are for.
        """
        taps_only = self.loose_constant(f"{name}.weight", x.width, taps).T
        weight = np.zeros(((taps - 1) * apart + 1, x.width), np.float32)
        weight[::apart] = taps_only
        bias = self.optional_constant(f"{name}.bias", x.width)
        return self._append(Convolution(self._value(x.width), x, weight, bias, silu, self._state()))

    def linear_attention(
        self, q: Value, k: Value, v: Value, decay: Value | Constant, beta: Value | None, *, n_heads: int,
        n_key_heads: int, scale: float, tiled: bool = False,
    ) -> Value:  # fmt: skip
        """Attention to a matrix that each head keeps, with the delta rule where there is a beta."""
        assert q.width == k.width and k.width % n_key_heads == 0 and v.width % n_heads == 0
        operation = LinearAttention(
            self._value(v.width), q, k, v, decay, beta, n_heads, n_key_heads, tiled, scale, self._state()
        )
        width = decay.width if isinstance(decay, Value) else len(decay)
        assert width == n_heads * (operation.dim_k if operation.fades_by_dimension else 1)
        return self._append(operation)

    def selective_scan(self, x: Value, time: Value, b: Value, c: Value, fading: Constant, kept: Constant) -> Value:
        """Each channel through a state that fades by its time step."""
        assert x.width == time.width == len(kept) and b.width == c.width and fading.shape == (x.width, b.width)
        return self._append(SelectiveScan(self._value(x.width), x, time, b, c, fading, kept, self._state()))

    def shift(self, x: Value, now: float = 0.0) -> Value:
        """The row before, plus `now` times this one. Before the first there is 0."""
        weight = np.repeat(np.array([[1.0], [now]], np.float32), x.width, axis=1)
        return self._append(Convolution(self._value(x.width), x, weight, None, False, self._state()))

    def wkv(
        self, r: Value, kept: Value, k: Value, v: Value, n_heads: int, a: Value | None = None, b: Value | None = None
    ) -> Value:
        """A matrix that each head keeps and asks."""
        assert r.width == kept.width == k.width == v.width and k.width % n_heads == 0
        assert (a is None) == (b is None) and k.width // n_heads % WKV_MULTIPLE == 0
        return self._append(WKV(self._value(v.width), r, kept, k, v, a, b, n_heads, self._state()))

    def activate(
        self, gate: Value, up: Value, kind: Activation, limit: float = 0.0, up_limit: float = 0.0
    ) -> Value:
        """act(gate) * up."""
        assert gate.width == up.width
        return self._append(Activate(self._value(gate.width), gate, up, kind, limit, up_limit))

    def activate_alone(self, x: Value, kind: Alone, parameters: Constant | None = None) -> Value:
        """act(x)."""
        return self._append(ActivateAlone(self._value(x.width), x, kind, parameters))

    def gate(self, gate: Value, x: Value, kind: GateKind) -> Value:
        """act(gate) * x; the gate may be narrower, as with one value for each head."""
        assert x.width % gate.width == 0
        return self._append(Gate(self._value(x.width), gate, x, kind))

    def clamp(self, x: Value, limit: float) -> Value:
        """x, but not beyond -limit and limit."""
        return self._append(Clamp(self._value(x.width), x, limit))

    def add(self, a: Value, b: Value) -> Value:
        """a + b."""
        assert a.width == b.width
        return self._append(Add(self._value(a.width), a, b))

    def mix(self, x: Value, weights: Value, n_out: int, add: Value | None = None) -> Value:
        """`n_out` streams from those of x, by weights [n_out, streams of x] that each row has; and those of `add`."""
        n_in = weights.width // n_out
        assert weights.width == n_out * n_in and x.width % n_in == 0
        assert add is None or add.width == n_out * (x.width // n_in)
        return self._append(Mix(self._value(n_out * (x.width // n_in)), x, weights, add, n_out))

    def mix_by_score(self, x: Value, z: Value, name: str, eps: float) -> Value:
        """The streams of x and z, by how well they fit to the vector of this name."""
        assert x.width % z.width == 0
        weight = self.constant(f"{name}.weight", z.width)
        return self._append(MixByScore(self._value(z.width), x, z, weight, eps))

    def balance(self, x: Value, n: int, rounds: int, eps: float) -> Value:
        """A matrix [n, n] of each row, with rows and columns of about the sum 1, turned over."""
        assert x.width == n * n
        return self._append(Balance(self._value(x.width), x, n, rounds, eps))

    def match_magnitude(self, x: Value, like: Value) -> Value:
        """Each group of x, made as long as `like`."""
        assert x.width % like.width == 0
        return self._append(MatchMagnitude(self._value(x.width), x, like))

    def gaussian_top_k(self, x: Value, deviations: float) -> Value:
        """What of x exceeds its mean by so many standard deviations."""
        return self._append(GaussianTopK(self._value(x.width), x, deviations))

    def dot(self, a: Value, b: Value, groups: int) -> Value:
        """The sums of products of groups of columns."""
        assert a.width == b.width and a.width % groups == 0
        return self._append(Dot(self._value(groups), a, b))

    def scale(self, x: Value, factor: float) -> Value:
        """factor * x."""
        return self._append(Scale(self._value(x.width), x, factor))

    def affine(self, x: Value, weight: Constant | None, bias: Constant | None = None) -> Value:
        """x * weight + bias, by rows that have been looked up already."""
        assert all(row is None or row.shape == (x.width,) for row in (weight, bias))
        return self._append(Affine(self._value(x.width), x, weight, bias))

    def softcap(self, x: Value, cap: float) -> Value:
        """cap * tanh(x / cap)."""
        return self._append(Softcap(self._value(x.width), x, cap))

    def moe(
        self,
        x: Value,
        block: str,
        *,
        n_expert: int,
        n_used: int,
        n_ff: int,
        kind: Activation | Alone,
        gated: bool = True,
        normalize: bool = True,
        scale: float = 1.0,
        gating: Gating = "softmax",
        router_x: Value | None = None,
        n_groups: int = 1,
        n_groups_used: int = 1,
        together: int = 1,
        limit: float = 0.0,
        up_limit: float = 0.0,
        weigh_inputs: bool = False,
        suffix: str = "_exps",
        by_token: Indices | None = None,
    ) -> Value:
        """A mixture of experts from the tensors `<block>.ffn_gate_inp`, `.ffn_gate_exps`, `_up_exps`, `_down_exps`.

        Gate and up may be one tensor, `.ffn_gate_up_exps`; without `gated` there is no gate, and `kind` is of an
        activation that multiplies nothing. Experts may have scales and biases, and the router one for its choice,
        `.exp_probs_b`. suffix: of the names of the experts' matrices. There are n_expert / `together` of them.
        by_token: which experts a token goes to, [n_vocab, n_used]; then there is no choice, and no bias for it.
        """
        if self.has(f"{block}.ffn_gate.0.weight"):
            raise self.error(f"tensor {block}.ffn_gate.0.weight: a tensor per expert is an old layout, not supported")
        width = (router_x or x).width
        router = self.weight(f"{block}.ffn_gate_inp.weight", n_expert, width)
        router_bias = self.optional_constant(f"{block}.ffn_gate_inp.bias", n_expert)
        # Some files leave the ending out.
        selection = f"{block}.exp_probs_b" + (".bias" if self.has(f"{block}.exp_probs_b.bias") else "")
        selection_bias = None if by_token is not None else self.optional_constant(selection, n_expert)
        gate, n_matrices = None, n_expert // together
        if gated and self.has(f"{block}.ffn_gate_up{suffix}.weight"):
            gate = up = self.weight(f"{block}.ffn_gate_up{suffix}.weight", n_matrices, 2 * n_ff, x.width)
        else:
            if gated:
                gate = self.weight(f"{block}.ffn_gate{suffix}.weight", n_matrices, n_ff, x.width)
            up = self.weight(f"{block}.ffn_up{suffix}.weight", n_matrices, n_ff, x.width)
        down = self.weight(f"{block}.ffn_down{suffix}.weight", n_matrices, x.width, n_ff)
        found = (self._adjustment(weight) for weight in dict.fromkeys((gate, up, down)) if weight is not None)
        return self._append(
            MoE(
                self._value(x.width), x, router, router_bias, gate, up, down, n_used, kind, normalize, scale, gating,
                router_x=router_x, selection_bias=selection_bias, n_groups=n_groups, n_groups_used=n_groups_used,
                together=together, limit=limit, up_limit=up_limit, weigh_inputs=weigh_inputs,
                adjustments=tuple(adjustment for adjustment in found if adjustment is not None), by_token=by_token,
            )
        )  # fmt: skip

    def _adjustment(self, weight: Weight) -> Adjustment | None:
        """What the file has to do to the products of an experts' matrix."""
        name, (n_expert, rows, _) = weight.name.removesuffix(".weight"), weight.shape
        scale = self.optional_constant(f"{name}.scale", n_expert)
        bias = self.optional_constant(f"{name}.bias", n_expert, rows)
        return None if scale is None and bias is None else Adjustment(weight, scale, bias)

    def select_rows(self, x: Value) -> Value:
        """The rows whose logits are wanted."""
        return self._append(SelectRows(self._value(x.width), x))

    def finish(
        self, architecture: str, logits: Value, n_embd: int, context_length: int, context: int,
        embeds_tokens: int | None = None,
    ) -> Graph:  # fmt: skip
        """The graph of everything said so far. embeds_tokens: of a model that makes embeddings, of how many tokens."""
        n_vocab = embeds_tokens or logits.width
        return Graph(
            architecture, self.operations, logits, self.cache_layers, n_vocab, n_embd, context_length, context,
            n_states=self._n_states, max_context=self.max_context, embeds=embeds_tokens is not None,
            uses=self._uses, encoder=self.encoder, start=self.start,
        )  # fmt: skip

    def _append(self, operation: Operation) -> Value:
        self.operations.append(operation)
        return operation.out

    def _cache(self, layer: CacheLayer) -> int:
        self.cache_layers.append(layer)
        return len(self.cache_layers) - 1

    def _state(self) -> int:
        self._n_states += 1
        return self._n_states - 1

    def _value(self, width: int) -> Value:
        self._n_values += 1
        return Value(self._n_values - 1, width)


def _significant(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without dimensions of one before all others, of which files have any number: a row is a vector too."""
    first = next((place for place, size in enumerate(shape[:-1]) if size != 1), len(shape) - 1)
    return shape[first:]


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)
