"""Jais (arXiv:2308.16149): layer norms, SwiGLU with biases, scores that fall with the distance, and are divided by the
size of a head."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.transformer import attention, feed_forward, layer_norm_head


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    alibi = metadata.real("attention.max_alibi_bias", 0.0, high=100.0)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.layer_norm(x, f"{block}.attn_norm", h.norm_eps)
        cache = h.cache_layer(layer)
        x = builder.add(x, attention(builder, h, y, block, cache, None, scale=1.0 / cache.head_dim_v, alibi=alibi))

        y = builder.layer_norm(x, f"{block}.ffn_norm", h.norm_eps)
        x = builder.add(x, feed_forward(builder, y, block, h.n_ff[layer], "silu"))
    return layer_norm_head(builder, x, h)
