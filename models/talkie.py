"""Talkie 1930: norms without weights, also of each head's query and key after they have turned, where queries have a
factor for each head; and the embedding, added again behind every layer."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import feed_forward, project_qkv


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)

    x = embedded = builder.rms_norm_with(builder.embed("token_embd", h.n_vocab, h.n_embd), None, h.rms_eps)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        cache = h.cache_layer(layer)
        y = builder.rms_norm_with(x, None, h.rms_eps)
        q, k, v = project_qkv(builder, y, block, cache)
        factors = builder.constant(f"{block}.attn_q_norm.weight", cache.n_heads, 1).repeat(cache.head_dim_k, axis=1)
        q = builder.rms_norm_with(builder.rope(q, cache.head_dim_k, rotation), factors, h.rms_eps, cache.n_heads)
        k = builder.rms_norm_with(builder.rope(k, cache.head_dim_k, rotation), None, h.rms_eps, cache.n_kv_heads)
        y = builder.attention(q, k, v, cache, cache.head_dim_k**-0.5)
        x = builder.add(x, builder.linear(y, f"{block}.attn_output", h.n_embd))

        y = builder.rms_norm_with(x, None, h.rms_eps)
        x = builder.add(x, feed_forward(builder, y, block, h.n_ff[layer], "silu"))
        x = builder.add(x, builder.scale(embedded, float(builder.constant(f"{block}.layer_output_scale.weight", 1)[0])))

    x = builder.rms_norm_with(builder.select_rows(x), None, h.rms_eps)
    return builder.scale(builder.linear(x, "output", h.n_vocab), metadata.real("logit_scale"))
