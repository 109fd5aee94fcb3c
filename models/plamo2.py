"""PLaMo 2 (arXiv:2509.04897): Mamba-2 mixers whose time steps, B and C come from the convolution's result through
norms, between them attention, and norms before and after each part."""

from qrun.models.graph import CacheLayer, GraphBuilder, Rotation, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.mamba import Mamba2, scan_heads
from qrun.models.rope import RopeScaling
from qrun.models.transformer import head, joined_feed_forward, project_qkv


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    sizes = Mamba2.read(metadata, n_groups=1)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        if h.n_kv_heads[layer]:
            y = attention(builder, h, y, block, h.cache_layer(layer), rotation)
        else:
            y = mixer(builder, h, y, block, sizes)
        x = builder.add(x, bare_norm(builder, h, y, f"{block}.post_attention_norm"))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        y = joined_feed_forward(builder, y, block, h.n_ff[layer], "silu")
        x = builder.add(x, bare_norm(builder, h, y, f"{block}.post_ffw_norm"))
    return head(builder, x, h)


def bare_norm(builder: GraphBuilder, h: Hyperparameters, x: Value, name: str) -> Value:
    """A norm whose weight files name without the usual ending."""
    return builder.rms_norm_with(x, builder.constant(name, x.width), h.rms_eps)


def attention(
    builder: GraphBuilder, h: Hyperparameters, x: Value, block: str, cache: CacheLayer, rotation: Rotation
) -> Value:
    """Attention with a norm of its own for each head of queries and keys."""
    n_heads, n_kv_heads, dim = cache.n_heads, cache.n_kv_heads, cache.head_dim_k
    q, k, v = project_qkv(builder, x, block, cache)
    q = builder.rms_norm_with(q, builder.constant(f"{block}.attn_q_norm.weight", n_heads, dim), h.rms_eps, n_heads)
    k = builder.rms_norm_with(
        k, builder.constant(f"{block}.attn_k_norm.weight", n_kv_heads, dim), h.rms_eps, n_kv_heads
    )
    q, k = builder.rope(q, dim, rotation, query=True), builder.rope(k, dim, rotation)
    y = builder.attention(q, k, v, cache, cache.head_dim_v**-0.5)
    return builder.linear(y, f"{block}.attn_output", h.n_embd)


def mixer(builder: GraphBuilder, h: Hyperparameters, x: Value, block: str, sizes: Mamba2) -> Value:
    """The mixer of one block; its matrix makes for each head a gate and then its channels."""
    n_heads, dim, state = sizes.n_heads, sizes.dim, sizes.state
    both = builder.linear(x, f"{block}.ssm_in", 2 * sizes.width)
    z = builder.join(both, range(dim), n_heads)
    x = builder.convolution(builder.join(both, range(dim, 2 * dim), n_heads), f"{block}.ssm_conv1d", sizes.taps)

    rank = max(64, h.n_embd // 16)
    parts = builder.linear(x, f"{block}.ssm_x", 2 * state + rank)
    b = bare_norm(builder, h, builder.slice(parts, 0, state), f"{block}.ssm_b_norm")
    c = bare_norm(builder, h, builder.slice(parts, state, state), f"{block}.ssm_c_norm")
    time = bare_norm(builder, h, builder.slice(parts, 2 * state, rank), f"{block}.ssm_dt_norm")
    time = builder.linear(time, f"{block}.ssm_dt", n_heads)
    fading, kept = (builder.constant(f"{block}.{name}", n_heads) for name in ("ssm_a", "ssm_d"))
    y = builder.gate(z, scan_heads(builder, x, time, b, c, fading, kept, sizes), "silu")
    return builder.linear(y, f"{block}.ssm_out", h.n_embd)
