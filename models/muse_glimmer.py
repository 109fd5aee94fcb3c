"""Muse Glimmer (Meta): norms before and after each part, and of the embedding; a gate on what attention gives; three
layers of four that see a window, and a fourth without positions."""

from dataclasses import replace

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import MAX_CONTEXT, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, read_base
from qrun.models.transformer import attend, feed_forward, head, sliding_layers, softcapped

POST_NORM_EPS = 1e-8


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling = RopeScaling.read(metadata, h)
    base = read_base(metadata, "rope.freq_base_swa", scaling.base)
    rotation = replace(scaling, base=base, factor=1.0).rotation(h.n_rot, interleaved=True)
    window = metadata.integer("attention.sliding_window", high=MAX_CONTEXT)
    sliding = sliding_layers(metadata, h.n_layer, period=4)

    x = builder.rms_norm_with(builder.embed("token_embd", h.n_vocab, h.n_embd), None, h.rms_eps)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        cache = h.cache_layer(layer, window if sliding[layer] else None)
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        gate = builder.linear(y, f"{block}.attn_gate", cache.n_heads * cache.head_dim_v)
        y = attend(builder, h, y, block, cache, rotation if sliding[layer] else None, qk_norm="heads")
        y = builder.linear(builder.gate(gate, y, "sigmoid"), f"{block}.attn_output", h.n_embd)
        x = builder.add(x, builder.rms_norm(y, f"{block}.post_attention_norm", POST_NORM_EPS))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        y = feed_forward(builder, y, block, h.n_ff[layer], "silu")
        x = builder.add(x, builder.rms_norm(y, f"{block}.post_ffw_norm", POST_NORM_EPS))
    return softcapped(builder, builder.scale(head(builder, x, h), metadata.real("logit_scale")), metadata, default=0.0)
