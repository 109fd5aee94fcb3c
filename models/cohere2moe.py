"""North Mini Code (Cohere): Command-R7B with experts beside one that all tokens share. The first layer of four sees
everything, without positions, but dense layers turn."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import MAX_CONTEXT, MAX_EXPERTS, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import (
    Shares,
    attention,
    experts,
    feed_forward,
    head,
    layer_norm_head,
    shared_expert,
    sliding_layers,
)


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot, interleaved=True)
    window = metadata.integer("attention.sliding_window", high=MAX_CONTEXT)
    sliding = sliding_layers(metadata, h.n_layer, period=4, full_first=True)
    shares = Shares.read(metadata, "sigmoid")
    n_shared = metadata.integer("expert_shared_count", 0, low=0, high=MAX_EXPERTS)
    n_ff_shared = metadata.integer("expert_shared_feed_forward_length", 0, low=0)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        cache = h.cache_layer(layer, window if sliding[layer] else None)
        turn = rotation if sliding[layer] or layer < h.n_dense else None
        y = norm(builder, metadata, h, x, f"{block}.attn_norm")
        attended = attention(builder, h, y, block, cache, turn)
        if layer < h.n_dense:
            z = feed_forward(builder, y, block, h.n_ff[layer], "silu")
        else:
            n_ff = h.n_ff_expert[layer] or h.n_ff[layer]
            z = experts(builder, h, y, block, n_ff, shares=shares)
            if n_shared:
                z = builder.add(z, shared_expert(builder, y, block, n_ff_shared or n_ff * n_shared))
                z = builder.scale(z, 0.5)
        x = builder.add(builder.add(z, x), attended)

    return logits(builder, metadata, h, x)


def has_rms(metadata: Metadata) -> bool:
    """Are its norms root mean square norms, and not layer norms?"""
    return metadata.real("attention.layer_norm_rms_epsilon", 0.0, high=1.0) > 0.0


def norm(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, x: Value, name: str) -> Value:
    """Of the kind that the file gives a number for."""
    return builder.rms_norm(x, name, h.rms_eps) if has_rms(metadata) else builder.layer_norm(x, name, h.norm_eps)


def logits(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, x: Value) -> Value:
    """The head, with that norm and the file's scale."""
    y = head(builder, x, h) if has_rms(metadata) else layer_norm_head(builder, x, h)
    return builder.scale(y, metadata.real("logit_scale", 0.0) or 1.0)
