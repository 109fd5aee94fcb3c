"""Gemma 2 (arXiv:2408.00118): Gemma with norms after each part too, soft caps, and a window on every other layer."""

from math import sqrt

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import MAX_CONTEXT, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, read_base
from qrun.models.transformer import attention, feed_forward, head, sliding_layers, softcapped

LAYERS_OF_27B = 46


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling = RopeScaling.read(metadata, h)
    rotation = scaling.rotation(h.n_rot)
    local_rotation = scaling.of_windows(read_base(metadata, "rope.freq_base_swa", scaling.base)).rotation(h.n_rot)
    window = metadata.integer("attention.sliding_window", 4096, high=MAX_CONTEXT)
    sliding = sliding_layers(metadata, h.n_layer, period=2)
    attention_cap = metadata.real("attn_logit_softcapping", 50.0) or None
    scale = query_scale(h, is_27b=h.n_layer == LAYERS_OF_27B)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd, scale=sqrt(h.n_embd))
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        cache = h.cache_layer(layer, window if sliding[layer] else None)
        turn = local_rotation if sliding[layer] else rotation
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        y = attention(builder, h, y, block, cache, turn, scale=scale, softcap=attention_cap)
        x = builder.add(x, builder.rms_norm(y, f"{block}.post_attention_norm", h.rms_eps))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        y = feed_forward(builder, y, block, h.n_ff[layer], "gelu")
        x = builder.add(x, builder.rms_norm(y, f"{block}.post_ffw_norm", h.rms_eps))
    return softcapped(builder, head(builder, x, h), metadata, default=30.0)


def query_scale(h: Hyperparameters, *, is_27b: bool) -> float:
    """1 / sqrt(head_dim), but the largest models divide by the share of the embedding that a head has."""
    return (h.n_embd // h.n_heads[0] if is_27b else h.head_dim_k) ** -0.5
