"""PLaMo 3: norms before and after each part, joined matrices, and seven layers of eight that see a window, with a rope
of their own."""

from dataclasses import replace

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, read_base
from qrun.models.transformer import attention, head, joined_feed_forward, read_window, sliding_layers


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling = RopeScaling.read(metadata, h)
    rotation = scaling.rotation(h.n_rot)
    # Only the layers that see everything were stretched to the long context.
    local_base = read_base(metadata, "rope.freq_base_swa", 10000.0)
    local_rotation = replace(scaling, base=local_base, factor=1.0).rotation(h.n_rot)
    window = read_window(metadata)
    sliding = sliding_layers(metadata, h.n_layer, period=8) if window else (False,) * h.n_layer

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        cache = h.cache_layer(layer, window if sliding[layer] else None)
        turn = local_rotation if sliding[layer] else rotation
        # Files name the norms after each part without the usual ending.
        attention_norm = builder.constant(f"{block}.post_attention_norm", h.n_embd)
        feed_forward_norm = builder.constant(f"{block}.post_ffw_norm", h.n_embd)
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        y = attention(builder, h, y, block, cache, turn, qk_norm="heads")
        x = builder.add(x, builder.rms_norm_with(y, attention_norm, h.rms_eps))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        y = joined_feed_forward(builder, y, block, h.n_ff[layer], "silu")
        x = builder.add(x, builder.rms_norm_with(y, feed_forward_norm, h.rms_eps))
    return head(builder, x, h)
