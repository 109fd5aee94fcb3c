"""Operations whose rows depend on the rows before them.

What they keep of a text lies in the KV cache, as a `CacheLayer` says, or in a state of the operation's own.
"""

from dataclasses import dataclass
from typing import Literal

from qrun.models.graph.values import Constant, Value, Weight

Side = Literal["text", "source", "encoder"]
"""Whose keys and values a layer has: those of the text; of the source that a text answers, which all its rows see; or
of the source while an encoder reads it (see `Graph.encoder`)."""


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


WKV_MULTIPLE = 16


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
