"""The forward pass of any graph in plain NumPy: what the operations mean, and the yardstick for the engine.

One page, no cache, no cleverness. Weights are dequantised to float32, matrices are multiplied in float32, and sums
within a row (norms, softmax, angles) are done in float64.
"""

from collections.abc import Sequence

import numpy as np

from qrun.formats import dequantize
from qrun.models.graph import (
    Activate,
    Add,
    Attention,
    CacheLayer,
    Embed,
    Graph,
    Linear,
    MoE,
    Operation,
    RMSNorm,
    Rope,
    Scale,
    SelectRows,
    Slice,
    Softcap,
    Value,
    Weight,
)

Array = np.ndarray


def forward(graph: Graph, tokens: Sequence[int]) -> Array:
    """Logits after each of the tokens of one sequence: float32 [n_tokens, n_vocab]."""
    values: dict[int, Array] = {}
    for operation in graph.operations:
        values[operation.out.id] = compute(operation, values, graph, np.asarray(tokens)).astype(np.float32)
        assert values[operation.out.id].shape == (len(tokens), operation.out.width)
    return values[graph.logits.id]


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
        chosen, _ = routing(x, operation)
        found[operation.router.name] = total
        for weight in (operation.gate, operation.up, operation.down):
            found[weight.name] = np.zeros((weight.shape[0], weight.shape[-1])), np.zeros(weight.shape[0], int)
        for expert in np.unique(chosen):
            rows = x[np.nonzero(chosen == expert)[0]]
            inner = expert_inner(rows, operation, expert)
            for weight, inputs in ((operation.gate, rows), (operation.up, rows), (operation.down, inner)):
                found[weight.name][0][expert] = (inputs**2).sum(0)
                found[weight.name][1][expert] = len(inputs)
    return found


def compute(operation: Operation, values: dict[int, Array], graph: Graph, tokens: Array) -> Array:
    """The result of one operation: [n_tokens, width]."""
    match operation:
        case Embed(weight=weight, scale=scale):
            return decode(weight, tokens) * scale
        case RMSNorm(x=x, weight=weight, eps=eps, groups=groups):
            return rms_norm(values[x.id], weight, eps, groups)
        case Linear(x=x, weight=weight, bias=bias, scale=scale):
            out = scale * multiply(values[x.id], weight)
            return out if bias is None else out + bias
        case Slice(x=x, start=start, out=out):
            return values[x.id][:, start : start + out.width]
        case Rope(x=x):
            return rope(values[x.id], operation)
        case Attention(q=q, layer=layer, scale=scale, softcap=cap):
            k, v = keys_and_values(graph, layer)
            return attention(values[q.id], values[k.id], values[v.id], graph.cache_layers[layer], scale, cap)
        case Activate(gate=gate, up=up, kind=kind):
            return activate(values[gate.id], kind) * values[up.id]
        case Add(a=a, b=b):
            return values[a.id] + values[b.id]
        case Scale(x=x, factor=factor):
            return factor * values[x.id]
        case Softcap(x=x, cap=cap):
            return cap * np.tanh(values[x.id] / cap)
        case MoE(x=x):
            return mixture_of_experts(values[x.id], operation)
        case SelectRows(x=x):
            return values[x.id]


def decode(weight: Weight, rows: Array | slice) -> Array:
    """Some rows of a tensor, all its leading dimensions seen as one: float32 [n_rows, columns]."""
    columns = weight.shape[-1]
    raw = weight.raw.reshape(np.prod(weight.shape[:-1]), -1)[rows]
    return dequantize(np.ascontiguousarray(raw).reshape(-1), weight.type, (len(raw), columns))


def multiply(x: Array, weight: Weight, first: int = 0, n_rows: int | None = None) -> Array:
    """x @ weight.T for `n_rows` rows of the weight, a few at a time: an output matrix can be larger than memory."""
    last = first + (weight.shape[0] if n_rows is None else n_rows)
    parts = [x @ decode(weight, slice(row, min(row + 8192, last))).T for row in range(first, last, 8192)]
    return np.concatenate(parts, axis=1)


def rms_norm(x: Array, weight: Array | None, eps: float, groups: int) -> Array:
    """Each group of columns divided by its root mean square."""
    x = x.reshape(len(x), groups, -1).astype(np.float64)
    x = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return (x if weight is None else x * weight).reshape(len(x), -1)


def rope(x: Array, operation: Rope) -> Array:
    """Each pair of each head turned by position times frequency."""
    n_rot, half = operation.n_rot, operation.n_rot // 2
    heads = x.reshape(len(x), -1, operation.head_dim).astype(np.float64)
    pairs = np.arange(half)
    first, second = (2 * pairs, 2 * pairs + 1) if operation.interleaved else (pairs, pairs + half)
    positions = np.arange(len(x))[:, None, None]
    angle = positions * operation.frequencies.astype(np.float64)
    magnitude: Array | float = operation.magnitude
    if operation.temperature is not None:
        scale, length = operation.temperature.scale, operation.temperature.length
        magnitude = magnitude * (1 + scale * np.log(1 + np.floor(positions / length)))
    cos, sin = np.cos(angle) * magnitude, np.sin(angle) * magnitude
    out = heads.copy()
    assert n_rot == 2 * len(operation.frequencies)
    out[:, :, first] = heads[:, :, first] * cos - heads[:, :, second] * sin
    out[:, :, second] = heads[:, :, first] * sin + heads[:, :, second] * cos
    return out.reshape(len(x), -1)


def keys_and_values(graph: Graph, layer: int) -> tuple[Value, Value]:
    """What is appended to the cache of a layer."""
    for operation in graph.operations:
        if isinstance(operation, Attention) and operation.layer == layer and operation.k and operation.v:
            return operation.k, operation.v
    raise AssertionError(f"nothing is appended to the cache of layer {layer}")


def attention(q: Array, k: Array, v: Array, cache: CacheLayer, scale: float, softcap: float | None) -> Array:
    """Every position looks at itself and those before it, as far as the window reaches."""
    n = len(q)
    shared_by = cache.n_heads // cache.n_kv_heads
    q = q.reshape(n, cache.n_heads, cache.head_dim_k)
    k = k.reshape(n, cache.n_kv_heads, cache.head_dim_k)
    v = v.reshape(n, cache.n_kv_heads, cache.head_dim_v)
    distance = np.arange(n)[:, None] - np.arange(n)
    visible = (distance >= 0) & (distance < (cache.window or n))
    out = np.empty((n, cache.n_heads, cache.head_dim_v))
    for head in range(cache.n_heads):
        scores = scale * (q[:, head] @ k[:, head // shared_by].T).astype(np.float64)
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        out[:, head] = softmax(np.where(visible, scores, -np.inf)) @ v[:, head // shared_by]
    return out.reshape(n, -1)


def product(x: Array, moe: MoE, weight: Weight, expert: int = 0) -> Array:
    """x through a matrix of an expert (or the router), and through what adapters add to it."""
    out = multiply(x, weight, expert * weight.shape[-2], weight.shape[-2])
    for change in moe.changes:
        if change.weight is weight:
            inner = multiply(x, change.a, expert * change.a.shape[-2], change.a.shape[-2])
            out = out + change.scale * multiply(inner, change.b, expert * weight.shape[-2], weight.shape[-2])
    return out


def routing(x: Array, moe: MoE) -> tuple[Array, Array]:
    """The experts that the router prefers for each row, and their shares: two [rows, n_used]."""
    scores = product(x, moe, moe.router).astype(np.float64)
    if moe.router_bias is not None:
        scores = scores + moe.router_bias
    probabilities = softmax(scores) if moe.gating == "softmax" else 1 / (1 + np.exp(-scores))
    chosen = np.argsort(-probabilities, axis=1, kind="stable")[:, : moe.n_used]
    shares = np.take_along_axis(probabilities, chosen, axis=1)
    if moe.normalize:
        shares = shares / shares.sum(axis=1, keepdims=True)
    return chosen, shares


def expert_inner(x: Array, moe: MoE, expert: int) -> Array:
    """What an expert's last matrix takes."""
    gate, up = (product(x, moe, weight, expert) for weight in (moe.gate, moe.up))
    return activate(gate, moe.kind) * up


def mixture_of_experts(x: Array, moe: MoE) -> Array:
    """Each row through the experts that its router prefers."""
    chosen, shares = routing(x, moe)
    out = np.zeros(x.shape)
    for expert in np.unique(chosen):
        rows, ranks = np.nonzero(chosen == expert)
        y = product(expert_inner(x[rows], moe, expert), moe, moe.down, expert)
        out[rows] += moe.scale * shares[rows, ranks, None] * y
    return out


def activate(x: Array, kind: str) -> Array:
    """SiLU, or the tanh approximation of GELU."""
    if kind == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(scores: Array) -> Array:
    """Over the last axis."""
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
