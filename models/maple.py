"""Maple (deepgrove): Qwen3's mixture of experts with a clamped SwiGLU. Some layers see a window; the others have no
positions."""


from qrun.models.graph import Activation, GraphBuilder, Value
from qrun.models.hyperparameters import MAX_CONTEXT, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, read_base, read_n_rot
from qrun.models.transformer import LEAST_LIMIT, attention, experts, head, required_flags


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling = RopeScaling.read(metadata, h)
    base = read_base(metadata, "rope.freq_base_swa", scaling.base)
    rotation = scaling.of_windows(base).rotation(read_n_rot(metadata, "rope.dimension_count_swa", h))
    window = metadata.integer("attention.sliding_window", high=MAX_CONTEXT)
    sliding = required_flags(metadata, "attention.sliding_window_pattern", h.n_layer)
    limits = metadata.reals("swiglu_clamp_exp", h.n_blocks)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        cache = h.cache_layer(layer, window if sliding[layer] else None)
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        turn = rotation if sliding[layer] else None
        x = builder.add(x, attention(builder, h, y, block, cache, turn, qk_norm="heads"))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        kind: Activation = "clamped_silu" if limits[layer] > LEAST_LIMIT else "silu"
        x = builder.add(x, experts(builder, h, y, block, h.n_ff_expert[layer], kind, limit=limits[layer]))
    return head(builder, x, h)
