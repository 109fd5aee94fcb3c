"""The parts that these architectures share, where the logic really is the same."""

from typing import Literal

import numpy as np

from qrun.models.graph import Activation, CacheLayer, Gating, GraphBuilder, Rotation, Value
from qrun.models.hyperparameters import MAX_CONTEXT, MAX_LAYERS, Hyperparameters, Metadata

GATINGS: tuple[Gating, ...] = ("softmax", "sigmoid")
"""As files number them, from 1."""
QKNorm = Literal["heads", "rows", "turned"]
"""How queries and keys are normed: each head, or all heads of a row as one, before they turn; or each head after."""


def attention(
    builder: GraphBuilder,
    h: Hyperparameters,
    x: Value,
    block: str,
    cache: CacheLayer,
    rotation: Rotation | None,
    *,
    qk_norm: QKNorm | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: bool = True,
) -> Value:
    """Self-attention of one block: `attend`, and its output matrix. bias: False leaves one out that a file may have."""
    y = attend(builder, h, x, block, cache, rotation, qk_norm=qk_norm, scale=scale, softcap=softcap)
    return builder.linear(y, f"{block}.attn_output", h.n_embd, bias=bias)


def attend(
    builder: GraphBuilder,
    h: Hyperparameters,
    x: Value,
    block: str,
    cache: CacheLayer,
    rotation: Rotation | None,
    *,
    qk_norm: QKNorm | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Value:
    """Self-attention of one block, up to its output matrix.

    rotation: None leaves queries and keys as they are. scale: of their products, 1 / sqrt(head_dim) by default.
    """
    q, k, v = project_qkv(builder, x, block, cache)
    if qk_norm in ("heads", "rows"):
        q, k = norm_qk(builder, h, q, k, block, cache, qk_norm)
    if rotation is not None:
        q = builder.rope(q, cache.head_dim_k, rotation, query=True)
        k = builder.rope(k, cache.head_dim_k, rotation)
    if qk_norm == "turned":
        q, k = norm_qk(builder, h, q, k, block, cache, qk_norm)
    return builder.attention(q, k, v, cache, cache.head_dim_k**-0.5 if scale is None else scale, softcap)


def norm_qk(
    builder: GraphBuilder, h: Hyperparameters, q: Value, k: Value, block: str, cache: CacheLayer, kind: QKNorm
) -> tuple[Value, Value]:
    """Root mean square norms of queries and keys."""
    q_groups, k_groups = (1, 1) if kind == "rows" else (cache.n_heads, cache.n_kv_heads)
    q = builder.rms_norm(q, f"{block}.attn_q_norm", h.rms_eps, q_groups)
    return q, builder.rms_norm(k, f"{block}.attn_k_norm", h.rms_eps, k_groups)


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


def feed_forward(builder: GraphBuilder, x: Value, block: str, n_ff: int, kind: Activation, suffix: str = "") -> Value:
    """The gated feed-forward network: down(act(gate(x)) * up(x)) (Shazeer, arXiv:2002.05202).

    suffix: of the tensors' names, as `_shexp` for the expert that all tokens share.
    """
    if not n_ff:
        raise builder.error(f"{block} has a feed-forward network, and the metadata give it no width")
    gate = builder.linear(x, f"{block}.ffn_gate{suffix}", n_ff)
    up = builder.linear(x, f"{block}.ffn_up{suffix}", n_ff)
    return builder.linear(builder.activate(gate, up, kind), f"{block}.ffn_down{suffix}", x.width)


def joined_feed_forward(
    builder: GraphBuilder, x: Value, block: str, n_ff: int, kind: Activation, suffix: str = ""
) -> Value:
    """The same, from one matrix that holds the gate's rows and then those of up, under the name of up."""
    gate_up = builder.linear(x, f"{block}.ffn_up{suffix}", 2 * n_ff)
    gate, up = builder.slice(gate_up, 0, n_ff), builder.slice(gate_up, n_ff, n_ff)
    return builder.linear(builder.activate(gate, up, kind), f"{block}.ffn_down{suffix}", x.width)


def experts(
    builder: GraphBuilder,
    h: Hyperparameters,
    x: Value,
    block: str,
    n_ff: int,
    kind: Activation = "silu",
    *,
    normalize: bool = True,
    scale: float = 1.0,
    gating: Gating = "softmax",
) -> Value:
    """A mixture of experts (see `graph.MoE`); `n_ff` is the width of one expert."""
    if not h.n_expert:
        raise h.metadata.error("expert_count", "is 0, and this architecture has experts")
    if not n_ff:
        raise h.metadata.error("expert_feed_forward_length", "is missing")
    if h.n_groups > 1:
        raise h.metadata.error("expert_group_count", f"is {h.n_groups}: choosing groups of experts is not supported")
    return builder.moe(
        x, block, n_expert=h.n_expert, n_used=h.n_used, n_ff=n_ff, kind=kind, normalize=normalize, scale=scale,
        gating=gating,
    )  # fmt: skip


def shared_expert(builder: GraphBuilder, x: Value, block: str, n_ff: int) -> Value:
    """The expert, or several as one, that every token goes to."""
    return feed_forward(builder, x, block, n_ff, "silu", "_shexp")


def experts_scale(metadata: Metadata) -> float:
    """What the weights of experts are multiplied by. A 0 means that they are not."""
    return metadata.real("expert_weights_scale", 0.0, low=-1e6, high=1e6) or 1.0


def read_gating(metadata: Metadata, default: Gating) -> Gating:
    """How the router's logits become probabilities. A 0 means that the file does not say."""
    number = metadata.integer("expert_gating_func", 0, low=0, high=len(GATINGS))
    return GATINGS[number - 1] if number else default


def head(builder: GraphBuilder, x: Value, h: Hyperparameters, *, bias: bool = True) -> Value:
    """Logits of the rows that are wanted. Without an output matrix of its own, a model reuses its embedding."""
    x = builder.rms_norm(builder.select_rows(x), "output_norm", h.rms_eps)
    return builder.linear(x, "output" if builder.has("output.weight") else "token_embd", h.n_vocab, bias=bias)


def softcapped(builder: GraphBuilder, logits: Value, metadata: Metadata, default: float) -> Value:
    """Logits under the soft cap that the file gives them. A 0 means that they have none."""
    cap = metadata.real("final_logit_softcapping", default)
    return builder.softcap(logits, cap) if cap else logits


def windows(metadata: Metadata, n_layer: int) -> tuple[int | None, ...]:
    """The window of each layer, None for those that see everything, of architectures that mostly have none.

    It counts only with a flag for each layer: there are files with a window that was never used, which the reference
    engine ignores.
    """
    flags = metadata.flags("attention.sliding_window_pattern", n_layer)
    window = read_window(metadata)
    if flags is None or not window:
        return (None,) * n_layer
    return tuple(window if flag else None for flag in flags)


def read_window(metadata: Metadata, default: int = 0) -> int:
    """How many positions layers with a window see, themselves included. A 0 means that there are no windows."""
    return metadata.integer("attention.sliding_window", default, low=0, high=MAX_CONTEXT)


def sliding_layers(metadata: Metadata, n_layer: int, period: int, *, full_first: bool = False) -> tuple[bool, ...]:
    """Which layers see a sliding window only: all but the last (or the first) of every `period`.

    The file may give a period of its own, or a flag for each layer. A period of 0 means every layer.
    """
    key = "attention.sliding_window_pattern"
    flags = metadata.flags(key, n_layer)
    if flags is not None:
        return flags
    period = metadata.integer(key, period, low=0, high=MAX_LAYERS)
    if full_first:
        return tuple(period == 0 or layer % period > 0 for layer in range(n_layer))
    return tuple(period == 0 or layer % period < period - 1 for layer in range(n_layer))
