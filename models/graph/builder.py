"""The builder that the architectures speak to: a method for each operation."""

from dataclasses import replace

import numpy as np

from qrun.formats import GGUFReader
from qrun.models.graph.experts import Adjustment, Gating, MoE
from qrun.models.graph.graph import Graph, Operation
from qrun.models.graph.row_operations import (
    Activate,
    ActivateAlone,
    Activation,
    Add,
    Affine,
    Alone,
    Balance,
    Clamp,
    Dot,
    Embed,
    Gate,
    GateKind,
    GaussianTopK,
    HeadLinear,
    Input,
    Join,
    LayerNorm,
    Linear,
    MatchMagnitude,
    Mix,
    MixByScore,
    RMSNorm,
    Rope,
    Rotation,
    Scale,
    SelectRows,
    Slice,
    Softcap,
)
from qrun.models.graph.sequence_operations import (
    WKV,
    WKV_MULTIPLE,
    Attention,
    CacheLayer,
    Choose,
    Chosen,
    Convolution,
    EmbedHashes,
    Hashes,
    Index,
    Keep,
    LinearAttention,
    Pool,
    SelectiveScan,
)
from qrun.models.graph.tensors import FileTensors
from qrun.models.graph.values import Constant, Indices, Value, Weight


class GraphBuilder(FileTensors):
    """Appends operations; each method takes the values and the tensor names of one, and returns its result.

    Names are those of the file without their ending (`blk.0.attn_q`): `.weight` must be there, `.bias` may be. Nothing
    is merged or reordered; tensors that nobody asks for are fine.
    """

    def __init__(self, reader: GGUFReader) -> None:
        super().__init__(reader)
        self.operations: list[Operation] = []
        self.cache_layers: list[CacheLayer] = []
        self.encoder: Graph | None = None
        self.start = 0
        self._n_values = self._n_states = 0

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
        chosen: Chosen | None = None,
    ) -> Value:
        """Causal attention of the next layer; `cache` says how its cache is laid out.

        entries: rows beside the keys, of which every `every`-th counts. chosen: what rows see in a long context.
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
        if chosen is not None:
            index = chosen.index
            assert softcap is None and slopes is None and biases is None and index.n_groups in (1, cache.n_kv_heads)
            assert cache.window is None if entries is None else index.of_entries and index.every == every
        out = self._value(cache.n_heads * cache.head_dim_v)
        return self._append(
            Attention(
                out, q, k, v, layer, scale, softcap, sinks, slopes, entries, entries_layer, biases,
                chosen.value if chosen else None, chosen.index if chosen else None,
            )
        )  # fmt: skip

    def choose(self, q: Value, k: Value, weights: Value | None, index: Index) -> Chosen:
        """What rows attend to in a context longer than `index.start`. k: a row counts at the end of `index.every`."""
        assert q.width == index.n_heads * index.dim and k.width == index.dim and index.n_heads % index.n_groups == 0
        assert weights is None or weights.width == index.n_heads
        assert index.n_local <= index.budget
        layer = self._cache(CacheLayer(index.n_heads, 1, index.dim, 0, None, half=True, every=index.every))
        out = self._value(index.n_groups * (1 + index.most))
        return Chosen(self._append(Choose(out, q, k, weights, layer, index)), index)

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

    def pool(self, x: Value, scores: Value, by_place: str | None, every: int, *, overlap: bool) -> Value:
        """The rows of every `every` positions as one, by scores; by_place: a tensor's name, or None for 0."""
        width = x.width // 2 if overlap else x.width
        assert scores.width == x.width and (not overlap or x.width % 2 == 0)
        shape = every, x.width
        places = np.zeros(shape, np.float32) if by_place is None else self.constant(f"{by_place}.weight", *shape)
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
        layers = self.cache_layers
        if self.in_float32:
            layers = [replace(layer, precise=True) for layer in layers]
        return Graph(
            architecture, self.operations, logits, layers, n_vocab, n_embd, context_length, context,
            n_states=self._n_states, embeds=embeds_tokens is not None,
            uses=self._uses, encoder=self.encoder, start=self.start, path=self.reader.path,
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
