"""Command-R, Aya (Cohere): attention and feed-forward network side by side, from one layer norm. In Command-R+ each
head's query and key has a norm of its own. Command-R7B and Command-A (arXiv:2504.00698): three layers of four see a
window, and only they turn."""

from qrun.models.graph import GraphBuilder, Rotation, Value
from qrun.models.hyperparameters import MAX_CONTEXT, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.stablelm import norm_heads
from qrun.models.transformer import feed_forward, layer_norm_head, project_qkv, sliding_layers

LAYERS_OF_PLUS = 64


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of Command-R and Command-R+."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot, interleaved=True)
    norms = h.n_layer >= LAYERS_OF_PLUS
    return layers(builder, metadata, h, [rotation] * h.n_layer, [None] * h.n_layer, norms=norms)


def build_windows(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of the models with windows."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot, interleaved=True)
    window = metadata.integer("attention.sliding_window", high=MAX_CONTEXT)
    sliding = sliding_layers(metadata, h.n_layer, period=4)
    rotations = [rotation if slides else None for slides in sliding]
    return layers(builder, metadata, h, rotations, [window if slides else None for slides in sliding], norms=False)


def layers(
    builder: GraphBuilder,
    metadata: Metadata,
    h: Hyperparameters,
    rotations: list[Rotation | None] | list[Rotation],
    windows: list[int | None] | list[None],
    *,
    norms: bool,
) -> Value:
    """All layers."""
    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block, cache, rotation = f"blk.{layer}", h.cache_layer(layer, windows[layer]), rotations[layer]
        y = builder.layer_norm(x, f"{block}.attn_norm", h.norm_eps)
        q, k, v = project_qkv(builder, y, block, cache)
        if norms:
            q = norm_heads(builder, h, q, f"{block}.attn_q_norm", cache.n_heads)
            k = norm_heads(builder, h, k, f"{block}.attn_k_norm", cache.n_kv_heads)
        if rotation is not None:
            q, k = builder.rope(q, cache.head_dim_k, rotation), builder.rope(k, cache.head_dim_k, rotation)
        z = builder.attention(q, k, v, cache, cache.head_dim_k**-0.5)
        attended = builder.linear(z, f"{block}.attn_output", h.n_embd)
        fed = feed_forward(builder, y, block, h.n_ff[layer], "silu")
        x = builder.add(builder.add(fed, x), attended)
    scale = metadata.real("logit_scale", 0.0) or 1.0
    return builder.scale(layer_norm_head(builder, x, h), scale)
