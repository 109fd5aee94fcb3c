"""Spark X2.5 (iFlytek): Llama with GELU, a gate for each head on what attention gives, and layers that see a window."""


from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import MAX_CONTEXT, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, read_base, read_n_rot
from qrun.models.transformer import attend, feed_forward, head, required_flags


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling = RopeScaling.read(metadata, h)
    base = read_base(metadata, "rope.freq_base_swa", scaling.base)
    local_rotation = scaling.of_windows(base).rotation(read_n_rot(metadata, "rope.dimension_count_swa", h))
    rotation = scaling.rotation(h.n_rot)
    window = metadata.integer("attention.sliding_window", high=MAX_CONTEXT)
    sliding = required_flags(metadata, "attention.sliding_window_pattern", h.n_layer)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        cache = h.cache_layer(layer, window if sliding[layer] else None)
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        gate = builder.linear(y, f"{block}.attn_gate", cache.n_heads)
        y = attend(builder, h, y, block, cache, local_rotation if sliding[layer] else rotation)
        x = builder.add(x, builder.linear(builder.gate(gate, y, "sigmoid"), f"{block}.attn_output", h.n_embd))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        x = builder.add(x, feed_forward(builder, y, block, h.n_ff[layer], "gelu"))
    return head(builder, x, h)
