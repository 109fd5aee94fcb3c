"""StableLM 2 and Stable Code (arXiv:2402.17834): Llama with layer norms, and a part of each head that turns. In the
largest model each head's query and key has a norm of its own, and both parts take one norm of the layer's input."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import feed_forward, layer_norm_head, project_qkv


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        cache = h.cache_layer(layer)
        y = builder.layer_norm(x, f"{block}.attn_norm", h.norm_eps)
        q, k, v = project_qkv(builder, y, block, cache)
        q = norm_heads(builder, h, q, f"{block}.attn_q_norm", cache.n_heads)
        k = norm_heads(builder, h, k, f"{block}.attn_k_norm", cache.n_kv_heads)
        q, k = (builder.rope(part, cache.head_dim_k, rotation) for part in (q, k))
        z = builder.attention(q, k, v, cache, cache.head_dim_k**-0.5)
        x = builder.add(x, builder.linear(z, f"{block}.attn_output", h.n_embd))

        if builder.has(f"{block}.ffn_norm.weight"):
            y = builder.layer_norm(x, f"{block}.ffn_norm", h.norm_eps)
        x = builder.add(x, feed_forward(builder, y, block, h.n_ff[layer], "silu"))
    return layer_norm_head(builder, x, h)


def norm_heads(builder: GraphBuilder, h: Hyperparameters, x: Value, name: str, n_heads: int) -> Value:
    """A layer norm of each head with a weight of its own, where the file has one."""
    weight = builder.optional_constant(f"{name}.weight", n_heads, x.width // n_heads)
    return x if weight is None else builder.layer_norm_with(x, weight, None, h.norm_eps, n_heads)
