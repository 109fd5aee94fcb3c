"""Granite 3 and 4 (IBM), dense or a mixture of experts, and MiniCPM (arXiv:2404.06395): Llama with scales on the
embedding, on what each part adds, on the products of queries and keys, and on the logits. Most layers of Granite 4's
hybrids have a Mamba-2 mixer for attention."""

from math import sqrt

from qrun.models.graph import GraphBuilder, Rotation, Value
from qrun.models.hyperparameters import MAX_CONTEXT, Hyperparameters, Metadata
from qrun.models.mamba import Mamba2, mamba2
from qrun.models.rope import RopeScaling, rope_factors
from qrun.models.transformer import attention, experts, feed_forward, head, joined_feed_forward, required_flags


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of Granite."""
    turns = metadata.flag("rope.scaling.finetuned", True)
    return layers(builder, metadata, h, read_rotation(builder, metadata, h, context) if turns else None)


def build_experts(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits under the name that the first mixtures of experts had for themselves."""
    return layers(builder, metadata, h, read_rotation(builder, metadata, h, context))


def build_minicpm(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of MiniCPM, whose older files do not give the scales."""
    return layers(
        builder, metadata, h, read_rotation(builder, metadata, h, context), embedding_scale=12.0,
        residual_scale=1.4 / sqrt(h.n_layer), logit_divisor=256.0 / h.n_embd,
    )  # fmt: skip


def build_windows(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of Granite with windows and sinks; not all layers need turn."""
    window = metadata.integer("attention.sliding_window", high=MAX_CONTEXT)
    sliding = required_flags(metadata, "attention.sliding_window_pattern", h.n_layer)
    turns = metadata.flags("attention.rope_pattern", h.n_layer) or (True,) * h.n_layer
    windows = tuple(window if slides else None for slides in sliding)
    return layers(builder, metadata, h, read_rotation(builder, metadata, h, context), windows, turns)


def build_hybrid(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of Granite 4's hybrids, whose files need not scale logits."""
    turns = metadata.flag("rope.scaling.finetuned", True)
    rotation = read_rotation(builder, metadata, h, context) if turns else None
    return layers(builder, metadata, h, rotation, logit_divisor=1.0)


def layers(
    builder: GraphBuilder,
    metadata: Metadata,
    h: Hyperparameters,
    rotation: Rotation | None,
    windows: tuple[int | None, ...] | None = None,
    turns: tuple[bool, ...] | None = None,
    *,
    embedding_scale: float = 0.0,
    residual_scale: float = 0.0,
    logit_divisor: float | None = None,
) -> Value:
    """All layers. The scales are for files that do not give them; a 0 is none. windows, turns: of each layer. A layer
    without heads is a Mamba-2 mixer."""
    embedding_scale = metadata.real("embedding_scale", embedding_scale) or 1.0
    residual_scale = metadata.real("residual_scale", residual_scale) or 1.0
    logit_divisor = metadata.real("logit_scale", logit_divisor, low=1e-6)
    sizes = Mamba2.read(metadata) if not all(h.n_kv_heads) else None
    scale = metadata.real("attention.scale", 0.0) or None if metadata.architecture != "minicpm" else None
    n_ff_shared = metadata.integer("expert_shared_feed_forward_length", 0, low=0)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd, scale=embedding_scale)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        if sizes is not None and not h.n_kv_heads[layer]:
            y = mamba2(builder, h, y, block, sizes)
        else:
            cache = h.cache_layer(layer, windows[layer] if windows else None)
            turn = rotation if turns is None or turns[layer] else None
            sinks = builder.optional_constant(f"{block}.attn_sinks.weight", cache.n_heads)
            y = attention(builder, h, y, block, cache, turn, scale=scale, sinks=sinks)
        x = builder.add(x, builder.scale(y, residual_scale))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        if not h.n_expert:
            y = feed_forward(builder, y, block, h.n_ff[layer], "silu")
        elif n_ff_shared:
            is_joined = not builder.has(f"{block}.ffn_gate_shexp.weight")
            of_kind = joined_feed_forward if is_joined else feed_forward
            shared = of_kind(builder, y, block, n_ff_shared, "silu", "_shexp")
            y = builder.add(experts(builder, h, y, block, h.n_ff[layer]), shared)
        else:
            y = experts(builder, h, y, block, h.n_ff[layer])
        x = builder.add(x, builder.scale(y, residual_scale))
    return builder.scale(head(builder, x, h), 1.0 / logit_divisor)


def read_rotation(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Rotation:
    """How heads turn."""
    scaling = RopeScaling.read(metadata, h)
    factors = rope_factors(builder, h.n_rot, context, scaling.original_context)
    return scaling.rotation(h.n_rot, factors, interleaved=True)
