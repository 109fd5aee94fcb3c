"""The parts that these architectures share, where the logic really is the same."""

import numpy as np

from qrun.models.graph import Activation, CacheLayer, GraphBuilder, Rotation, Value
from qrun.models.hyperparameters import MAX_CONTEXT, MAX_LAYERS, Hyperparameters, Metadata


def attention(
    builder: GraphBuilder,
    h: Hyperparameters,
    x: Value,
    block: str,
    cache: CacheLayer,
    rotation: Rotation | None,
    *,
    qk_norms: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> Value:
    """Self-attention of one block, up to its output matrix.

    qk_norms: a norm of each head's query and key before they turn. rotation: None leaves them as they are.
    scale: of the products of queries and keys, 1 / sqrt(head_dim) by default.
    """
    q, k, v = project_qkv(builder, x, block, cache)
    if qk_norms:
        q = builder.rms_norm(q, f"{block}.attn_q_norm", h.rms_eps, groups=cache.n_heads)
        k = builder.rms_norm(k, f"{block}.attn_k_norm", h.rms_eps, groups=cache.n_kv_heads)
    if rotation is not None:
        q = builder.rope(q, cache.head_dim_k, rotation)
        k = builder.rope(k, cache.head_dim_k, rotation)
    y = builder.attention(q, k, v, cache, cache.head_dim_k**-0.5 if scale is None else scale, softcap)
    return builder.linear(y, f"{block}.attn_output", h.n_embd)


def project_qkv(builder: GraphBuilder, x: Value, block: str, cache: CacheLayer) -> tuple[Value, Value, Value]:
    """Queries, keys and values of x: from one matrix that holds all three, or from three."""
    widths = {
        "attn_q": cache.n_heads * cache.head_dim_k,
        "attn_k": cache.n_kv_heads * cache.head_dim_k,
        "attn_v": cache.n_kv_heads * cache.head_dim_v,
    }
    if not builder.has(f"{block}.attn_qkv.weight"):
        q, k, v = (builder.linear(x, f"{block}.{name}", width) for name, width in widths.items())
        return q, k, v
    total = sum(widths.values())
    bias = builder.optional_constant(f"{block}.attn_qkv.bias", total)
    if bias is None and all(builder.has(f"{block}.{name}.bias") for name in widths):
        # Files of some older converters joined the matrices and left the biases apart.
        bias = np.concatenate([builder.constant(f"{block}.{name}.bias", width) for name, width in widths.items()])
    qkv = builder.linear_with(x, builder.weight(f"{block}.attn_qkv.weight", total, x.width), bias)
    q_width, k_width, v_width = widths.values()
    return (
        builder.slice(qkv, 0, q_width),
        builder.slice(qkv, q_width, k_width),
        builder.slice(qkv, q_width + k_width, v_width),
    )


def feed_forward(builder: GraphBuilder, x: Value, block: str, n_ff: int, kind: Activation) -> Value:
    """The gated feed-forward network: down(act(gate(x)) * up(x)) (Shazeer, arXiv:2002.05202)."""
    gate = builder.linear(x, f"{block}.ffn_gate", n_ff)
    up = builder.linear(x, f"{block}.ffn_up", n_ff)
    return builder.linear(builder.activate(gate, up, kind), f"{block}.ffn_down", x.width)


def head(builder: GraphBuilder, x: Value, h: Hyperparameters) -> Value:
    """Logits of the rows that are wanted. Without an output matrix of its own, a model reuses its embedding."""
    x = builder.rms_norm(builder.select_rows(x), "output_norm", h.rms_eps)
    return builder.linear(x, "output" if builder.has("output.weight") else "token_embd", h.n_vocab)


def windows(metadata: Metadata, n_layer: int) -> tuple[int | None, ...]:
    """The window of each layer, None for those that see everything, of architectures that mostly have none.

    It counts only with a flag for each layer: there are files with a window that was never used, which the reference
    engine ignores.
    """
    flags = metadata.flags("attention.sliding_window_pattern", n_layer)
    window = metadata.integer("attention.sliding_window", 0, low=0, high=MAX_CONTEXT)
    if flags is None or not window:
        return (None,) * n_layer
    return tuple(window if flag else None for flag in flags)


def sliding_layers(metadata: Metadata, n_layer: int, period: int) -> tuple[bool, ...]:
    """Which layers see a sliding window only: all but the last of every `period`, unless the file says otherwise.

    The file may give a period of its own, or a flag for each layer. A period of 0 means every layer.
    """
    key = "attention.sliding_window_pattern"
    flags = metadata.flags(key, n_layer)
    if flags is not None:
        return flags
    period = metadata.integer(key, period, low=0, high=MAX_LAYERS)
    return tuple(period == 0 or layer % period < period - 1 for layer in range(n_layer))
