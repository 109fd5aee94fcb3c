"""Gemma 3 (arXiv:2503.19786): Gemma 2 with a norm of each head's query and key in place of the soft cap, and five
layers of six that see a window, with a rope of their own. In EmbeddingGemma (arXiv:2509.20354), the same, tokens see
what comes behind them too."""

from dataclasses import replace
from math import sqrt

from qrun.models.gemma2 import query_scale
from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, read_base
from qrun.models.transformer import attention, feed_forward, head, read_window, sliding_layers, softcapped

LAYERS_OF_27B = 62


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling = RopeScaling.read(metadata, h)
    rotation = scaling.rotation(h.n_rot)
    # Only the layers that see everything were stretched to the long context.
    local_base = read_base(metadata, "rope.freq_base_swa", 10000.0)
    local_rotation = replace(scaling, base=local_base, factor=1.0).rotation(h.n_rot)
    window = read_window(metadata)
    sliding = sliding_layers(metadata, h.n_layer, period=6) if window else (False,) * h.n_layer
    scale = query_scale(h, is_27b=h.n_layer == LAYERS_OF_27B and not h.embeds)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd, scale=sqrt(h.n_embd))
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        cache = h.cache_layer(layer, window if sliding[layer] else None)
        turn = local_rotation if sliding[layer] else rotation
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        y = attention(builder, h, y, block, cache, turn, scale=scale, qk_norm="heads")
        x = builder.add(x, builder.rms_norm(y, f"{block}.post_attention_norm", h.rms_eps))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        y = feed_forward(builder, y, block, h.n_ff[layer], "gelu")
        x = builder.add(x, builder.rms_norm(y, f"{block}.post_ffw_norm", h.rms_eps))
    x = head(builder, x, h)
    return x if h.embeds else softcapped(builder, x, metadata, default=0.0)
