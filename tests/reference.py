"""The forward pass of any graph in plain NumPy: what the operations mean, and the yardstick for the engine.

One page, no cache, no cleverness. Weights are dequantised to float32, matrices are multiplied in float32, and sums
within a row (norms, softmax, angles) are done in float64.
"""

from collections.abc import Sequence

import numpy as np

from qrun.formats import dequantize
from qrun.models.graph import (
    WKV,
    Activate,
    ActivateAlone,
    Add,
    Affine,
    Attention,
    Balance,
    CacheLayer,
    Choose,
    Clamp,
    Convolution,
    Dot,
    Embed,
    EmbedHashes,
    Gate,
    GaussianTopK,
    Graph,
    Hashes,
    HeadLinear,
    Index,
    Input,
    Join,
    Keep,
    LayerNorm,
    Linear,
    LinearAttention,
    MatchMagnitude,
    Mix,
    MixByScore,
    MoE,
    Operation,
    Pool,
    RMSNorm,
    Rope,
    Scale,
    SelectiveScan,
    SelectRows,
    Slice,
    Softcap,
    Value,
    Weight,
)

Array = np.ndarray
KEYS_OF_INDEXES = np.float16
Kept = dict[int, tuple[Array, Array]]


def forward(graph: Graph, tokens: Sequence[int], source: Sequence[int] | None = None) -> Array:
    """Logits after each of the tokens of one sequence: float32 [n_tokens, n_vocab]. source: what it answers."""
    assert (source is None) is (graph.encoder is None)
    kept: Kept = {}
    if graph.encoder is not None:
        of_source = values_of(graph.encoder, source or ())
        operations = [operation for operation in graph.encoder.operations if isinstance(operation, Keep)]
        kept = {o.layer: (of_source[o.k.id], of_source[o.v.id]) for o in operations}
    return values_of(graph, tokens, kept=kept)[graph.logits.id]


def values_of(
    graph: Graph, tokens: Sequence[int], inputs: Array | None = None, kept: "Kept | None" = None
) -> dict[int, Array]:
    """The results of all operations, by their ids. inputs: what comes from outside, [n_tokens, width]. kept: keys and
    values that lie in the cache already."""
    values: dict[int, Array] = {}
    for operation in graph.operations:
        if isinstance(operation, Input):
            assert inputs is not None
            values[operation.out.id] = inputs
        elif isinstance(operation, Attention) and operation.layer in (kept or {}):
            assert kept is not None and operation.k is None and operation.biases is None
            cache = graph.cache_layers[operation.layer]
            values[operation.out.id] = attention(
                values[operation.q.id], *kept[operation.layer], cache, operation.scale, None
            ).astype(np.float32)
        else:
            values[operation.out.id] = compute(operation, values, graph, np.asarray(tokens)).astype(np.float32)
        assert values[operation.out.id].shape == (len(tokens), operation.out.width)
    return values


def input_squares(graph: Graph, tokens: Sequence[int]) -> dict[str, tuple[Array, Array]]:
    """For each tensor that is multiplied with: the sums of squares of its inputs over all tokens [experts, inputs], and
    how many inputs there were [experts]; those of an expert are the tokens that its router sends there."""
    found: dict[str, tuple[Array, Array]] = {}
    values: dict[int, Array] = {}
    for operation in graph.operations:
        values[operation.out.id] = compute(operation, values, graph, np.asarray(tokens)).astype(np.float32)
        if not isinstance(operation, Linear | MoE):
            continue
        x = values[operation.x.id].astype(np.float64)
        total = (x**2).sum(0)[None], np.array([len(x)])
        if isinstance(operation, Linear):
            found[operation.weight.name] = total
            continue
        routed = x if operation.router_x is None else values[operation.router_x.id].astype(np.float64)
        chosen, _ = routing(routed, operation, np.asarray(tokens))
        found[operation.router.name] = (routed**2).sum(0)[None], np.array([len(x)])
        for weight in operation.matrices:
            found[weight.name] = np.zeros((weight.shape[0], weight.shape[-1])), np.zeros(weight.shape[0], int)
        for expert in np.unique(chosen):
            rows = x[np.nonzero(chosen == expert)[0]]
            inner = expert_inner(rows, operation, expert)
            for weight in operation.matrices:
                inputs = inner if weight is operation.down else rows
                found[weight.name][0][expert] = (inputs**2).sum(0)
                found[weight.name][1][expert] = len(inputs)
    return found


def compute(operation: Operation, values: dict[int, Array], graph: Graph, tokens: Array) -> Array:
    """The result of one operation: [n_tokens, width]."""
    match operation:
        case Embed(weight=weight, scale=scale, by_position=by_position):
            return decode(weight, np.arange(len(tokens)) if by_position else tokens) * scale
        case EmbedHashes(weight=weight, hashes=hashes):
            numbers = [hash_numbers(hashes, tokens.tolist()[: i + 1]) for i in range(len(tokens))]
            return np.stack([decode(weight, np.array(row)).reshape(-1) for row in numbers])
        case RMSNorm(x=x, weight=weight, bias=bias, eps=eps, groups=groups):
            return rms_norm(values[x.id], weight, eps, groups, bias)
        case LayerNorm(x=x, weight=weight, bias=bias, eps=eps, groups=groups):
            return layer_norm(values[x.id], weight, bias, eps, groups)
        case Linear(x=x, weight=weight, bias=bias, scale=scale):
            out = scale * multiply(values[x.id], weight)
            return out if bias is None else out + bias
        case HeadLinear(x=x, weight=weight, start=start):
            n_heads, width, columns = weight.shape
            heads = values[x.id].reshape(len(tokens), n_heads, -1)[..., start : start + columns]
            return np.concatenate([multiply(heads[:, i], weight, i * width, width) for i in range(n_heads)], axis=1)
        case Join(x=x, z=z, n_heads=n_heads, of_x=of_x, of_z=of_z, z_heads=z_heads):
            parts = [values[x.id].reshape(len(tokens), n_heads, -1)[..., of_x]] if len(of_x) else []
            if z is not None:
                of_heads = values[z.id].reshape(len(tokens), z_heads, -1)[..., of_z]
                parts.append(np.broadcast_to(of_heads, (len(tokens), n_heads, len(of_z))))
            return np.concatenate(parts, axis=-1).reshape(len(tokens), -1)
        case Slice(x=x, start=start, out=out):
            return values[x.id][:, start : start + out.width]
        case Rope(x=x):
            return rope(values[x.id], operation)
        case Attention(q=q, layer=layer, scale=scale, softcap=cap, sinks=sinks, slopes=slopes):
            k, v = keys_and_values(graph, layer)
            cache, keys = graph.cache_layers[layer], values[k.id]
            if v is None:
                part = keys.reshape(len(tokens), cache.n_kv_heads, -1)[..., : cache.head_dim_v].reshape(len(tokens), -1)
            both = keys, part if v is None else values[v.id]
            chosen = None
            if operation.chosen is not None and operation.index is not None:
                chosen = mask_of(values[operation.chosen.id], operation.index)
            if operation.entries is None:
                return attention(
                    values[q.id], *both, cache, scale, cap, sinks, slopes, biases=operation.biases, chosen=chosen
                )
            assert operation.entries_layer is not None and v is None
            every = graph.cache_layers[operation.entries_layer].every
            entries = values[operation.entries.id][every - 1 :: every]
            return attention(values[q.id], *both, cache, scale, cap, sinks, slopes, entries, every, chosen=chosen)
        case Keep(k=k):
            return values[k.id]
        case Choose(q=q, k=k, weights=weights, index=index):
            return choose(values[q.id], values[k.id], None if weights is None else values[weights.id], index)
        case Pool(x=x, scores=scores):
            return pool(values[x.id], values[scores.id], operation)
        case Convolution(x=x, weight=weight, bias=bias, silu=silu):
            return convolution(values[x.id], weight, bias, silu=silu)
        case LinearAttention():
            return linear_attention(values, operation)
        case SelectiveScan():
            return selective_scan(values, operation)
        case WKV():
            return wkv(values, operation)
        case Affine(x=x, weight=weight, bias=bias):
            return values[x.id] * (1 if weight is None else weight) + (0 if bias is None else bias)
        case Activate(gate=gate, up=up, kind=kind, limit=limit):
            return activate(values[gate.id], values[up.id], kind, limit, operation.up_limit)
        case ActivateAlone(x=x, kind=kind, parameters=parameters):
            return activate_alone(values[x.id], kind, parameters)
        case Gate(gate=gate, x=x, kind=kind):
            return values[x.id] * np.repeat(ALONE[kind](values[gate.id]), x.width // gate.width, axis=1)
        case Clamp(x=x, limit=limit):
            return np.clip(values[x.id], -limit, limit)
        case Add(a=a, b=b):
            return values[a.id] + values[b.id]
        case Mix(x=x, weights=weights, add=added, n_out=n_out):
            by_row = values[weights.id].reshape(len(tokens), n_out, -1)
            streams = values[x.id].reshape(len(tokens), by_row.shape[2], -1)
            out = (by_row @ streams).reshape(len(tokens), -1)
            return out if added is None else out + values[added.id]
        case MixByScore(x=x, z=z, weight=weight, eps=eps):
            streams = np.concatenate([values[x.id], values[z.id]], axis=1).astype(np.float64)
            n = streams.shape[1] // z.width
            scores = (rms_norm(streams, weight, eps, n).reshape(len(tokens), n, -1)).sum(-1)
            return (softmax(scores)[..., None] * streams.reshape(len(tokens), n, -1)).sum(1)
        case Balance(x=x, n=n, rounds=rounds, eps=eps):
            matrix = softmax(values[x.id].reshape(len(tokens), n, n).astype(np.float64)) + eps
            for number in range(rounds):
                if number:
                    matrix = matrix / (matrix.sum(2, keepdims=True) + eps)
                matrix = matrix / (matrix.sum(1, keepdims=True) + eps)
            return matrix.swapaxes(1, 2).reshape(len(tokens), -1)
        case Dot(a=a, b=b, out=out):
            products = values[a.id].astype(np.float64) * values[b.id]
            return products.reshape(len(tokens), out.width, -1).sum(-1)
        case MatchMagnitude(x=x, like=like):
            groups = values[x.id].reshape(len(tokens), -1, like.width).astype(np.float64)
            lengths = np.linalg.norm(values[like.id].astype(np.float64), axis=-1)[:, None, None]
            return (groups * lengths / np.maximum(np.linalg.norm(groups, axis=-1, keepdims=True), 1e-30)).reshape(
                len(tokens), -1
            )
        case GaussianTopK(x=x, deviations=deviations):
            y = values[x.id].astype(np.float64)
            spread = y.std(axis=1, ddof=1, keepdims=True)
            return np.maximum(y - y.mean(axis=1, keepdims=True) - deviations * spread, 0)
        case Scale(x=x, factor=factor):
            return factor * values[x.id]
        case Softcap(x=x, cap=cap):
            return cap * np.tanh(values[x.id] / cap)
        case MoE(x=x, router_x=router_x):
            return mixture_of_experts(values[x.id], operation, values[(router_x or x).id], tokens)
        case SelectRows(x=x):
            return values[x.id]


def hash_numbers(hashes: Hashes, tokens: list[int]) -> list[int]:
    """Those of the last tokens."""
    numbers: list[int] = []
    seen = tokens[-1:]
    for length in range(2, len(hashes.multipliers) + 1):
        before = tokens[-length] if length <= len(tokens) else hashes.end
        seen.append(hashes.end if hashes.end in seen[1:] else before)
        mixed = 0
        for token, multiplier in zip(seen, hashes.multipliers, strict=False):
            mixed ^= token * multiplier % 2**64
        these = slice((length - 2) * hashes.per_length, (length - 1) * hashes.per_length)
        numbers += [
            mixed % size + offset for size, offset in zip(hashes.sizes[these], hashes.offsets[these], strict=True)
        ]
    return numbers


def decode(weight: Weight, rows: Array | slice) -> Array:
    """Some rows of a tensor, all its leading dimensions seen as one: float32 [n_rows, columns]."""
    columns = weight.shape[-1]
    raw = weight.raw.reshape(np.prod(weight.shape[:-1]), -1)[rows]
    return dequantize(np.ascontiguousarray(raw).reshape(-1), weight.type, (len(raw), columns))


def multiply(x: Array, weight: Weight, first: int = 0, n_rows: int | None = None) -> Array:
    """x @ weight.T for `n_rows` rows of the weight, a few at a time: an output matrix can be larger than memory.

    In float64, for not every BLAS gives equal rows of x equal results to the bit, and keys of equal tokens are to be
    equal once they are in float16.
    """
    x = x.astype(np.float64)
    last = first + (weight.shape[0] if n_rows is None else n_rows)
    parts = [x @ decode(weight, slice(row, min(row + 8192, last))).T for row in range(first, last, 8192)]
    return np.concatenate(parts, axis=1)


def rms_norm(x: Array, weight: Array | None, eps: float, groups: int, bias: Array | None = None) -> Array:
    """Each group of columns divided by its root mean square."""
    x = x.reshape(len(x), groups, -1).astype(np.float64)
    x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    x = x if weight is None else x * weight
    return (x if bias is None else x + bias).reshape(len(x), -1)


def layer_norm(x: Array, weight: Array | None, bias: Array | None, eps: float, groups: int) -> Array:
    """Each group of columns less its mean, divided by its standard deviation."""
    x = x.reshape(len(x), groups, -1).astype(np.float64)
    x = x - np.mean(x, axis=-1, keepdims=True)
    return rms_norm(x.reshape(len(x), -1), weight, eps, groups, bias)


def rope(x: Array, operation: Rope) -> Array:
    """Each pair of each head turned by position times frequency."""
    n_rot, half = operation.n_rot, operation.n_rot // 2
    heads = x.reshape(len(x), -1, operation.head_dim).astype(np.float64)
    pairs = np.arange(half)
    first, second = (2 * pairs, 2 * pairs + 1) if operation.interleaved else (pairs, pairs + half)
    first, second = first + operation.start, second + operation.start
    positions = np.maximum(np.arange(len(x)) - operation.behind, 0)[:, None, None]
    angle = positions * operation.frequencies.astype(np.float64)
    magnitude: Array | float = operation.magnitude
    if operation.temperature is not None:
        scale, length, offset = vars(operation.temperature).values()
        magnitude = magnitude * (1 + scale * np.log(1 + np.floor((positions + offset) / length)))
    cos, sin = np.cos(angle) * magnitude, np.sin(angle) * magnitude
    out = heads.copy()
    assert n_rot == 2 * len(operation.frequencies)
    out[:, :, first] = heads[:, :, first] * cos - heads[:, :, second] * sin
    out[:, :, second] = heads[:, :, first] * sin + heads[:, :, second] * cos
    return out.reshape(len(x), -1)


def keys_and_values(graph: Graph, layer: int) -> tuple[Value, Value | None]:
    """What is appended to the cache of a layer. No values: they are a part of the keys."""
    for operation in graph.operations:
        if isinstance(operation, Attention) and operation.layer == layer and operation.k:
            return operation.k, operation.v
    raise AssertionError(f"nothing is appended to the cache of layer {layer}")


def attention(
    q: Array,
    k: Array,
    v: Array,
    cache: CacheLayer,
    scale: float,
    softcap: float | None,
    sinks: Array | None = None,
    slopes: Array | None = None,
    entries: Array | None = None,
    every: int = 1,
    biases: Array | None = None,
    chosen: Array | None = None,
) -> Array:
    """Every position looks at itself and those before it, as far as the window reaches; or in both directions. And at
    all entries, of which there is one for every so many positions, that are complete there. chosen: [groups, n, keys or
    entries], where rows do not see all of them."""
    n = len(q)
    shared_by = cache.n_heads // cache.n_kv_heads
    q = q.reshape(n, cache.n_heads, cache.head_dim_k)
    k = k.reshape(len(k), cache.n_kv_heads, cache.head_dim_k)
    v = v.reshape(len(v), cache.n_kv_heads, cache.head_dim_v)
    distance = np.arange(n)[:, None] - np.arange(len(k))
    visible = (distance >= 0) & (distance < (cache.window or n))
    if not cache.causal:
        visible = np.abs(distance) <= (n + len(k) if cache.window is None else cache.window // 2)
    if cache.chunked and cache.window:
        chunk = np.arange(n) // cache.window
        visible = (distance >= 0) & (chunk[:, None] == chunk)
    if entries is not None:
        entries = entries.reshape(-1, cache.n_kv_heads, cache.head_dim_k)
        k, v = np.concatenate([k, entries]), np.concatenate([v, entries[..., : cache.head_dim_v]])
        visible = np.concatenate([visible, np.arange(len(entries)) < (np.arange(n)[:, None] + 1) // every], axis=1)
    out = np.empty((n, cache.n_heads, cache.head_dim_v))
    for head in range(cache.n_heads):
        scores = scale * (q[:, head] @ k[:, head // shared_by].T).astype(np.float64)
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        if slopes is not None:
            scores = scores - slopes[head] * np.abs(distance)
        if biases is not None:
            reach = biases.shape[1] // 2
            scores = scores + biases[head, np.clip(-distance, -reach, reach) + reach]
        seen = visible
        if chosen is not None:
            of_group = chosen[head * len(chosen) // cache.n_heads]
            seen = visible & np.pad(of_group, ((0, 0), (visible.shape[1] - of_group.shape[1], 0)), constant_values=True)
        scores = np.where(seen, scores, -np.inf)
        if sinks is not None:
            scores = np.concatenate([scores, np.full((n, 1), sinks[head])], axis=1)
        out[:, head] = softmax(scores)[:, : len(v)] @ v[:, head // shared_by]
    return out.reshape(n, -1)


def choose(q: Array, k: Array, weights: Array | None, index: Index) -> Array:
    """For each row and group: how many positions (or entries) it attends to, and which. Keys are kept in float16."""
    n, keys = len(q), k[index.every - 1 :: index.every].astype(KEYS_OF_INDEXES).astype(np.float64)
    out = np.zeros((n, index.n_groups, 1 + index.most))
    for row in range(index.start, n):
        count = (row + 1) // index.every
        # As a matrix product, equal keys would not always have equal scores.
        products = (q[row].reshape(index.n_heads, 1, index.dim) * keys[:count]).sum(-1)
        products = np.maximum(products, 0) if index.clipped else products
        products = products if weights is None else products * weights[row][:, None]
        for group, scores in enumerate(products.reshape(index.n_groups, -1, count).sum(1)):
            firsts = np.arange(0, count, index.block)
            best = np.maximum.reduceat(scores, firsts)
            best[len(best) - min(index.n_local, len(best)) :] = np.inf
            taken = np.sort(np.argsort(-best, kind="stable")[: index.budget])
            size = index.block * (1 if index.of_entries else index.every)
            end = count if index.of_entries else count * index.every
            seen = [i for unit in taken for i in range(unit * size, min((unit + 1) * size, end))]
            seen += [] if index.of_entries else range(end, row + 1)
            assert len(seen) == len(set(seen))
            out[row, group, : 1 + len(seen)] = [len(seen), *seen]
    return out.reshape(n, -1)


def mask_of(chosen: Array, index: Index) -> Array:
    """What `choose` gives, as a mask [groups, n, positions or entries]."""
    n = len(chosen)
    mask = np.zeros((index.n_groups, n, n // index.every if index.of_entries else n), bool)
    mask[:, : index.start] = True
    for row in range(index.start, n):
        for group, (count, *seen) in enumerate(chosen[row].reshape(index.n_groups, -1).astype(int)):
            mask[group, row, seen[:count]] = True
    return mask


def pool(x: Array, scores: Array, o: Pool) -> Array:
    """The rows of every few positions as one."""
    width, every = o.out.width, o.every
    scores = scores + o.by_place[np.arange(len(x)) % every]
    out = np.zeros((len(x), width))
    for end in range(every, len(x) + 1, every):
        rows, ranked = (array[end - every : end, -width:].astype(np.float64) for array in (x, scores))
        if o.overlap:
            before = slice(max(end - 2 * every, 0), end - every)
            rows = np.concatenate([x[before, :width], rows])
            ranked = np.concatenate([scores[before, :width], ranked])
        out[end - 1] = (softmax(ranked.T).T * rows).sum(0)
    return out


def convolution(x: Array, weight: Array, bias: Array | None, *, silu: bool) -> Array:
    """Each row with those before it."""
    taps = len(weight)
    padded = np.concatenate([np.zeros((taps - 1, x.shape[1])), x])
    out = sum(weight[j] * padded[j : j + len(x)] for j in range(taps))
    out = out if bias is None else out + bias
    return out * sigmoid(out) if silu else out


def linear_attention(values: dict[int, Array], o: LinearAttention) -> Array:
    """Row by row, in float64."""
    n = len(values[o.v.id])
    q, k = (values[value.id].reshape(n, o.n_key_heads, o.dim_k).astype(np.float64) for value in (o.q, o.k))
    v = values[o.v.id].reshape(n, o.n_heads, o.dim_v).astype(np.float64)
    decay = values[o.decay.id] if isinstance(o.decay, Value) else np.tile(o.decay, (n, 1))
    kept = np.exp(decay.astype(np.float64)).reshape(n, o.n_heads, -1, 1)
    heads = np.arange(o.n_heads)
    of_key = heads % o.n_key_heads if o.tiled else heads // (o.n_heads // o.n_key_heads)
    q, k = q[:, of_key], k[:, of_key]
    state = np.zeros((o.n_heads, o.dim_k, o.dim_v))
    out = np.empty(v.shape)
    for t in range(n):
        state = kept[t] * state
        change = v[t]
        if o.beta is not None:
            known = np.einsum("hk,hkv->hv", k[t], state)
            change = values[o.beta.id][t, :, None] * (change - known)
        state = state + k[t, :, :, None] * change[:, None, :]
        out[t] = o.scale * np.einsum("hk,hkv->hv", q[t], state)
    return out.reshape(n, -1)


def selective_scan(values: dict[int, Array], o: SelectiveScan) -> Array:
    """Row by row, in float64."""
    x, time, b, c = (values[value.id].astype(np.float64) for value in (o.x, o.time, o.b, o.c))
    state = np.zeros((o.x.width, o.n_state))
    out = np.empty(x.shape)
    for t in range(len(x)):
        state = np.exp(time[t, :, None] * o.fading) * state + (time[t] * x[t])[:, None] * b[t]
        out[t] = state @ c[t] + o.kept * x[t]
    return out


def wkv(values: dict[int, Array], o: WKV) -> Array:
    """Row by row, in float64."""
    rows = (values[value.id].astype(np.float64) for value in (o.r, o.kept, o.k, o.v))
    r, kept, k, v = (row.reshape(-1, o.n_heads, o.dim) for row in rows)
    state = np.zeros((o.n_heads, o.dim, o.dim))
    out = np.empty(v.shape)
    for t in range(len(v)):
        change = k[t, :, :, None] * v[t, :, None, :]
        if o.a is not None and o.b is not None:
            a, b = (values[value.id][t].astype(np.float64).reshape(o.n_heads, -1) for value in (o.a, o.b))
            change += b[:, :, None] * np.einsum("hk,hkv->hv", a, state)[:, None, :]
        state = kept[t, :, :, None] * state + change
        out[t] = np.einsum("hk,hkv->hv", r[t], state)
    return out.reshape(len(out), -1)


def product(x: Array, moe: MoE, weight: Weight, expert: int = 0) -> Array:
    """x through a matrix of an expert (or the router), and through what adapters add to it."""
    out = multiply(x, weight, expert * weight.shape[-2], weight.shape[-2])
    for adjustment in moe.adjustments:
        if adjustment.weight is weight:
            out = out if adjustment.scale is None else out * adjustment.scale[expert]
            out = out if adjustment.bias is None else out + adjustment.bias[expert]
    for change in moe.changes:
        if change.weight is weight:
            inner = multiply(x, change.a, expert * change.a.shape[-2], change.a.shape[-2])
            out = out + change.scale * multiply(inner, change.b, expert * weight.shape[-2], weight.shape[-2])
    return out


def hangs_on_a_digit(graph: Graph, values: dict[int, Array]) -> bool:
    """Whether a choice of experts or positions might be another if last digits were others: the engine rounds elsewhere
    than the definition, and may take the other one. What is equal stays so: each column is moved as a whole.

    values: what `values_of` gave.
    """
    noise = np.random.default_rng(1)
    for operation in graph.operations:
        by = [values[value.id] for value in _chooses_by(operation)]
        if not by:
            continue
        moved = [[array * (1 + 1e-5 * noise.normal(size=array.shape[1])) for array in by] for _ in range(5)]
        if any(not np.array_equal(_choice(operation, arrays), _choice(operation, by)) for arrays in moved):
            return True
    return False


def _chooses_by(operation: Operation) -> list[Value]:
    """What says which experts or positions an operation chooses."""
    if isinstance(operation, MoE) and operation.by_token is None:
        return [operation.router_x or operation.x]
    if isinstance(operation, Choose):
        return [value for value in (operation.q, operation.k, operation.weights) if value is not None]
    return []


def _choice(operation: Operation, by: list[Array]) -> Array:
    if isinstance(operation, MoE):
        return routing(by[0], operation, np.empty(0, np.int64))[0]
    assert isinstance(operation, Choose)
    return choose(by[0], by[1], by[2] if len(by) > 2 else None, operation.index)


def routing(x: Array, moe: MoE, tokens: Array) -> tuple[Array, Array]:
    """The experts that the router prefers for each row, and their shares: two [rows, n_used]."""
    scores = product(x, moe, moe.router).astype(np.float64)
    if moe.router_bias is not None:
        scores = scores + moe.router_bias
    function, _, chosen_only = moe.gating.partition("_of_")
    probabilities = scores if chosen_only else GATINGS[function](scores)
    liking = probabilities if moe.selection_bias is None else probabilities + moe.selection_bias
    if moe.n_groups > 1:
        grouped = liking.reshape(len(x), moe.n_groups, -1)
        of_group = np.sort(grouped, axis=-1)[..., -2:].sum(-1)
        best = np.argsort(-of_group, axis=1, kind="stable")[:, : moe.n_groups_used]
        keep = np.zeros(of_group.shape, bool)
        np.put_along_axis(keep, best, True, axis=1)
        liking = np.where(keep[..., None], grouped, -np.inf).reshape(liking.shape)
    chosen = np.argsort(-liking, axis=1, kind="stable")[:, : moe.n_used] // moe.together
    if moe.by_token is not None:
        chosen = moe.by_token[tokens]
    shares = np.take_along_axis(probabilities, chosen, axis=1)
    shares = GATINGS[function](shares) if chosen_only else shares
    if moe.normalize:
        shares = shares / np.maximum(shares.sum(axis=1, keepdims=True), 2**-14)
    return chosen, shares


def expert_inner(x: Array, moe: MoE, expert: int) -> Array:
    """What an expert's last matrix takes."""
    if moe.gate is None:
        return activate_alone(product(x, moe, moe.up, expert), moe.kind)
    if moe.up is moe.gate:
        gate, up = np.split(product(x, moe, moe.gate, expert), 2, axis=1)
    else:
        gate, up = (product(x, moe, weight, expert) for weight in (moe.gate, moe.up))
    return activate(gate, up, moe.kind, moe.limit, moe.up_limit)


def mixture_of_experts(x: Array, moe: MoE, router_x: Array, tokens: Array) -> Array:
    """Each row through the experts that its router prefers."""
    chosen, shares = routing(router_x, moe, tokens)
    out = np.zeros(x.shape)
    for rank in range(moe.n_used):
        for expert in np.unique(chosen[:, rank]):
            rows = np.nonzero(chosen[:, rank] == expert)[0]
            share = moe.scale * shares[rows, rank, None]
            if moe.weigh_inputs:
                out[rows] += product(expert_inner(x[rows] * share, moe, expert), moe, moe.down, expert)
            else:
                out[rows] += share * product(expert_inner(x[rows], moe, expert), moe, moe.down, expert)
    return out


def activate(gate: Array, up: Array, kind: str, limit: float = 0.0, up_limit: float = 0.0) -> Array:
    """What a gate makes of what it lets through."""
    if kind == "situ":
        up = up_limit * np.tanh(up / up_limit) if up_limit > 0 else up
        return limit * np.tanh(gate / limit) * sigmoid(gate) * up
    if kind == "clamped_silu":
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    if kind in ("silu", "clamped_silu"):
        return gate * sigmoid(gate) * up
    if kind == "limited_silu":
        return np.minimum(gate * sigmoid(gate), limit) * np.clip(up, -limit, limit)
    if kind == "swiglu_oai":
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
        return gate * sigmoid(1.702 * gate) * (up + 1)
    return (np.maximum(gate, 0) if kind == "relu" else gelu(gate)) * up


def activate_alone(x: Array, kind: str, parameters: Array | None = None) -> Array:
    """Activations that multiply nothing."""
    if parameters is not None:
        return xielu(x.astype(np.float64), *parameters.astype(np.float64))
    return ALONE[kind](x)


def gelu(x: Array) -> Array:
    """The tanh approximation."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def xielu(x: Array, n: float, p: float, b: float, e: float) -> Array:
    """A parabola above 0, and an exponential function below."""
    return np.where(x > 0, p * x * x, n * (np.expm1(np.minimum(x, e)) - x)) + b * x


def sigmoid(x: Array) -> Array:
    """From 0 to 1."""
    return 1 / (1 + np.exp(-x))


ALONE = {
    "gelu": gelu,
    "relu": lambda x: np.maximum(x, 0),
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x * sigmoid(x),
    "sigmoid": sigmoid,
    "softplus": lambda x: np.logaddexp(x, 0),
    "identity": lambda x: x,
    "exp": np.exp,
    "signed_root": lambda x: np.sign(x) * np.sqrt(np.maximum(np.abs(x), 1e-6)),
}


def softmax(scores: Array) -> Array:
    """Over the last axis."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


GATINGS = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "sqrt_softplus": lambda x: np.sqrt(np.logaddexp(x, 0)),
}
