"""The parts that these architectures share, where the logic really is the same."""

from typing import Literal

import numpy as np

from qrun.formats.dataclass import dataclass
from qrun.models.drafts import Block
from qrun.models.graph import (
    Activation,
    Alone,
    CacheLayer,
    Chosen,
    Constant,
    Gating,
    GraphBuilder,
    Indices,
    Rotation,
    Value,
)
from qrun.models.hyperparameters import MAX_CONTEXT, MAX_LAYERS, Hyperparameters, Metadata

GATINGS: dict[int, Gating] = {1: "softmax", 2: "sigmoid", 3: "softmax_of_chosen", 4: "sqrt_softplus"}
"""As files number them."""
ALIBI = 8.0
"""The largest bias of models that do not give one."""
LEAST_LIMIT = 1e-6
"""Of what a gate lets through: less is no limit."""
QKNorm = Literal["heads", "rows", "layer", "turned"]
"""How queries and keys are normed: each head, or all heads of a row as one, or these by a layer norm, before they turn;
or each head after."""


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
    sinks: Constant | None = None,
    alibi: float = 0.0,
    clamp: float = 0.0,
    bias: bool = True,
    chosen: Chosen | None = None,
) -> Value:
    """Self-attention of one block: `attend`, and its output matrix. bias: False leaves one out that a file may have."""
    y = attend(
        builder, h, x, block, cache, rotation, qk_norm=qk_norm, scale=scale, softcap=softcap, sinks=sinks,
        alibi=alibi, clamp=clamp, chosen=chosen,
    )  # fmt: skip
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
    sinks: Constant | None = None,
    alibi: float = 0.0,
    clamp: float = 0.0,
    chosen: Chosen | None = None,
) -> Value:
    """Self-attention of one block, up to its output matrix.

    rotation: None leaves queries and keys as they are. scale: of their products, 1 / sqrt(head_dim) by default.
    sinks: of each head (see `graph.Attention`). alibi: the largest bias (see `alibi_slopes`). clamp: of queries, keys
    and values. A 0 is none. chosen: what rows see in a long context.
    """
    q, k, v = project_qkv(builder, x, block, cache)
    if clamp:
        q, k, v = (builder.clamp(part, clamp) for part in (q, k, v))
    if qk_norm is not None and qk_norm != "turned":
        q, k = norm_qk(builder, h, q, k, block, cache, qk_norm)
    if rotation is not None:
        q = builder.rope(q, cache.head_dim_k, rotation, query=True)
        k = builder.rope(k, cache.head_dim_k, rotation)
    if qk_norm == "turned":
        q, k = norm_qk(builder, h, q, k, block, cache, qk_norm)
    scale = cache.head_dim_k**-0.5 if scale is None else scale
    slopes = alibi_slopes(cache.n_heads, alibi) if alibi else None
    return builder.attention(q, k, v, cache, scale, softcap, sinks, slopes, chosen=chosen)


def norm_qk(
    builder: GraphBuilder, h: Hyperparameters, q: Value, k: Value, block: str, cache: CacheLayer, kind: QKNorm
) -> tuple[Value, Value]:
    """Norms of queries and keys: root mean square norms, but for "layer"."""
    if kind == "layer":
        q = builder.layer_norm(q, f"{block}.attn_q_norm", h.norm_eps)
        return q, builder.layer_norm(k, f"{block}.attn_k_norm", h.norm_eps)
    q_groups, k_groups = (1, 1) if kind == "rows" else (cache.n_heads, cache.n_kv_heads)
    q = builder.rms_norm(q, f"{block}.attn_q_norm", h.rms_eps, q_groups)
    return q, builder.rms_norm(k, f"{block}.attn_k_norm", h.rms_eps, k_groups)


def qk_norm_of(builder: GraphBuilder, block: str, kind: QKNorm = "heads") -> QKNorm | None:
    """This kind, where the file has a norm of the block's queries."""
    return kind if builder.has(f"{block}.attn_q_norm.weight") else None


def project_qkv(
    builder: GraphBuilder, x: Value, block: str, cache: CacheLayer, *, biased: bool = True
) -> tuple[Value, Value, Value]:
    """Queries, keys and values of x: from one matrix that holds all three, or from three.

    biased: False leaves biases out that a file may have.
    """
    widths = {
        "attn_q": cache.n_heads * cache.head_dim_k,
        "attn_k": cache.n_kv_heads * cache.head_dim_k,
        "attn_v": cache.n_kv_heads * cache.head_dim_v,
    }
    if not builder.has(f"{block}.attn_qkv.weight"):
        q, k, v = (builder.linear(x, f"{block}.{name}", width, bias=biased) for name, width in widths.items())
        return q, k, v
    total = sum(widths.values())
    bias = builder.optional_constant(f"{block}.attn_qkv.bias", total) if biased else None
    if biased and bias is None and all(builder.has(f"{block}.{name}.bias") for name in widths):
        # Files of some older converters joined the matrices and left the biases apart.
        bias = np.concatenate([builder.constant(f"{block}.{name}.bias", width) for name, width in widths.items()])
    qkv = builder.linear_with(x, builder.weight(f"{block}.attn_qkv.weight", total, x.width), bias)
    q_width, k_width, v_width = widths.values()
    return (
        builder.slice(qkv, 0, q_width),
        builder.slice(qkv, q_width, k_width),
        builder.slice(qkv, q_width + k_width, v_width),
    )


def feed_forward(
    builder: GraphBuilder, x: Value, block: str, n_ff: int, kind: Activation, suffix: str = "", limit: float = 0.0,
    up_limit: float = 0.0, *, bias: bool = True,
) -> Value:
    """The gated feed-forward network: down(act(gate(x)) * up(x)) (Shazeer, arXiv:2002.05202).

    suffix: of the tensors' names, as `_shexp` for the expert that all tokens share. bias: False leaves biases out.
    """
    if not n_ff:
        raise builder.error(f"{block} has a feed-forward network, and the metadata give it no width")
    gate = builder.linear(x, f"{block}.ffn_gate{suffix}", n_ff, bias=bias)
    up = builder.linear(x, f"{block}.ffn_up{suffix}", n_ff, bias=bias)
    y = builder.activate(gate, up, kind, limit, up_limit)
    return builder.linear(y, f"{block}.ffn_down{suffix}", x.width, bias=bias)


def ungated_feed_forward(
    builder: GraphBuilder, x: Value, block: str, n_ff: int, kind: Alone, suffix: str = ""
) -> Value:
    """The feed-forward network without a gate: down(act(up(x)))."""
    y = builder.activate_alone(builder.linear(x, f"{block}.ffn_up{suffix}", n_ff), kind)
    return builder.linear(y, f"{block}.ffn_down{suffix}", x.width)


def joined_feed_forward(
    builder: GraphBuilder, x: Value, block: str, n_ff: int, kind: Activation, suffix: str = ""
) -> Value:
    """The same, from one matrix that holds the gate's rows and then those of up, under the name of up."""
    gate_up = builder.linear(x, f"{block}.ffn_up{suffix}", 2 * n_ff)
    gate, up = builder.slice(gate_up, 0, n_ff), builder.slice(gate_up, n_ff, n_ff)
    return builder.linear(builder.activate(gate, up, kind), f"{block}.ffn_down{suffix}", x.width)


@dataclass(frozen=True)
class Shares:
    """How much the chosen experts count (see `graph.MoE`)."""

    normalize: bool = True
    scale: float = 1.0
    gating: Gating = "softmax"

    @classmethod
    def read(cls, metadata: Metadata, gating: Gating, *, normalize: bool | None = None) -> "Shares":
        """From the file, which need not give the gating. normalize: where it does not count what the file says."""
        if normalize is None:
            normalize = metadata.flag("expert_weights_norm", False)
        return cls(normalize, read_experts_scale(metadata), read_gating(metadata, gating))


USUAL_SHARES = Shares()


def experts(
    builder: GraphBuilder,
    h: Hyperparameters,
    x: Value,
    block: str,
    n_ff: int,
    kind: Activation | Alone = "silu",
    shares: Shares = USUAL_SHARES,
    *,
    gated: bool = True,
    router_x: Value | None = None,
    together: int = 1,
    limit: float = 0.0,
    up_limit: float = 0.0,
    weigh_inputs: bool = False,
    suffix: str = "_exps",
    by_token: Indices | None = None,
) -> Value:
    """A mixture of experts (see `graph.MoE`); `n_ff` is the width of one expert.

    Experts over a narrower row than the router's take that row for x, and the router's for `router_x`.
    """
    if not h.n_expert:
        raise h.metadata.error("expert_count", "is 0, and this architecture has experts")
    if not n_ff:
        raise h.metadata.error("expert_feed_forward_length", "is missing")
    n_used = min(h.n_used, h.n_expert // together)
    return builder.moe(
        x, block, n_expert=h.n_expert, n_used=n_used, n_ff=n_ff, kind=kind, gated=gated, normalize=shares.normalize,
        scale=shares.scale, gating=shares.gating, router_x=router_x, n_groups=h.n_groups,
        n_groups_used=h.n_groups_used, together=together, limit=limit, up_limit=up_limit,
        weigh_inputs=weigh_inputs, suffix=suffix, by_token=by_token,
    )  # fmt: skip


def dense_or_experts(
    builder: GraphBuilder,
    h: Hyperparameters,
    x: Value,
    layer: int,
    shares: Shares,
    n_ff_shared: int,
    kind: Activation = "silu",
    limit: float = 0.0,
    shared_limit: float = 0.0,
) -> Value:
    """A plain network in the first layers, and then a mixture of experts and one that all tokens share, side by side.

    n_ff_shared: how wide that one is, or 0 if there is none. The limits are those of gates (see `limited`), the second
    of the networks that are no choice.
    """
    block, dense_kind = f"blk.{layer}", limited(shared_limit, kind)
    if layer < h.n_dense:
        return feed_forward(builder, x, block, h.n_ff[layer], dense_kind, limit=shared_limit)
    y = experts(builder, h, x, block, h.n_ff_expert[layer], limited(limit, kind), shares, limit=limit)
    if not n_ff_shared:
        return y
    return builder.add(y, feed_forward(builder, x, block, n_ff_shared, dense_kind, "_shexp", shared_limit))


def read_limits(metadata: Metadata, key: str, h: Hyperparameters) -> tuple[float, ...]:
    """Of what the gates of each layer let through; a 0 is none."""
    return metadata.reals(key, h.n_blocks) if metadata.has(key) else (0.0,) * h.n_blocks


def limited(limit: float, kind: Activation = "silu") -> Activation:
    """SwiGLU with a limit, or if there is none what gates are otherwise."""
    return "limited_silu" if limit > LEAST_LIMIT else kind


def shared_expert(builder: GraphBuilder, x: Value, block: str, n_ff: int, kind: Activation = "silu") -> Value:
    """The expert, or several as one, that every token goes to."""
    return feed_forward(builder, x, block, n_ff, kind, "_shexp")


def read_experts_scale(metadata: Metadata) -> float:
    """What the weights of experts are multiplied by. A 0 means that they are not."""
    return metadata.real("expert_weights_scale", 0.0, low=-1e6, high=1e6) or 1.0


def read_gating(metadata: Metadata, default: Gating) -> Gating:
    """How the router's logits become probabilities. A 0 means that the file does not say."""
    number = metadata.integer("expert_gating_func", 0, low=0, high=max(GATINGS))
    return GATINGS.get(number, default)


def blocks(
    builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int, block: Block
) -> Value:
    """Token ids to logits of a model that has blocks of one kind between its embedding and its head."""
    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        x = block(builder, metadata, h, context, x, layer)
    return head(builder, x, h)


def head(
    builder: GraphBuilder,
    x: Value,
    h: Hyperparameters,
    *,
    bias: bool = True,
    norm: str = "output_norm",
    norm_bias: bool = False,
) -> Value:
    """Logits of the rows that are wanted. Without an output matrix of its own, a model reuses its embedding.

    Of a model that makes embeddings, the rows themselves.
    """
    x = builder.rms_norm(builder.select_rows(x), norm, h.rms_eps, bias=norm_bias)
    return x if h.embeds else output(builder, x, h, bias=bias)


def layer_norm_head(builder: GraphBuilder, x: Value, h: Hyperparameters) -> Value:
    """The same with a layer norm."""
    return output(builder, builder.layer_norm(builder.select_rows(x), "output_norm", h.norm_eps), h)


def output(builder: GraphBuilder, x: Value, h: Hyperparameters, *, bias: bool = True) -> Value:
    """Logits of rows that are normed already. A bias counts with an embedding that is reused, too."""
    name = "output" if builder.has("output.weight") else "token_embd"
    weight = builder.weight(f"{name}.weight", h.n_vocab, h.n_embd)
    return builder.linear_with(x, weight, builder.optional_constant("output.bias", h.n_vocab) if bias else None)


def learned_positions(builder: GraphBuilder, h: Hyperparameters, context: int) -> Value:
    """A row for each position: there are as many as the model was trained for."""
    n = h.context_length
    if context > n:
        raise h.metadata.error("context_length", f"is {n}: there are no positions for {context} tokens")
    return builder.embed_positions("position_embd", n, h.n_embd)


def alibi_slopes(n_heads: int, max_bias: float) -> Constant:
    """By how much each head's scores fall with the distance (ALiBi: arXiv:2108.12409).

    A geometric series over the heads, up to the largest power of 2 of them; the others come between, at half the step.
    """
    whole = 1 << (n_heads.bit_length() - 1)
    powers = [max_bias * (i + 1) / whole for i in range(whole)]
    powers += [max_bias / 2 * (2 * i + 1) / whole for i in range(n_heads - whole)]
    return np.exp2(-np.array(powers)).astype(np.float32)


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


def recurrent_layers(metadata: Metadata, h: Hyperparameters, period: int) -> tuple[bool, ...]:
    """Which layers keep a state in the place of attention: as the file says, or all but the last of each period."""
    flags = metadata.flags("attention.recurrent_layers", h.n_layer)
    period = metadata.integer("full_attention_interval", period, high=MAX_LAYERS)
    return flags or tuple((layer + 1) % period > 0 for layer in range(h.n_layer))


def required_flags(metadata: Metadata, key: str, n_layer: int) -> tuple[bool, ...]:
    """A flag for each layer, which the file has to give."""
    flags = metadata.flags(key, n_layer)
    if flags is None:
        raise metadata.error(key, f"is not a flag for each of {n_layer} layers")
    return flags


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
