"""Nanbeige 4.2: Llama whose layers run several times, each time with keys and values of their own."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import MAX_LAYERS, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, rope_factors
from qrun.models.transformer import attention, feed_forward, head


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling = RopeScaling.read(metadata, h)
    factors = rope_factors(builder, h.n_rot, context, scaling.original_context)
    rotation = scaling.rotation(h.n_rot, factors, interleaved=True)
    n_loops = metadata.integer("num_loops", 1, high=MAX_LAYERS // h.n_layer)
    norm_between = not metadata.flag("skip_loop_final_norm", False)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for loop in range(n_loops):
        if loop and norm_between:
            x = builder.rms_norm(x, "output_norm", h.rms_eps)
        for layer in range(h.n_layer):
            block = f"blk.{layer}"
            y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
            x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation))

            y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
            x = builder.add(x, feed_forward(builder, y, block, h.n_ff[layer], "silu"))
    return head(builder, x, h)
