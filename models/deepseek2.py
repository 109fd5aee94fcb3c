"""DeepSeek V2, V3 and R1 (arXiv:2405.04434, 2412.19437), Kimi K2, GLM-4.7-Flash, and Mistral 4: keys and values come
from one short row that all heads share (multi-head latent attention), and small experts, chosen by biases and within
groups, lie beside one that all tokens share. MiniCPM 3 (arXiv:2404.06395) has such attention too.

Newer files hold the matrices that make keys and values of a short row apart for each head, so that a head's query can
be turned into one for the short rows instead (the absorbed form): then these rows are all that the cache needs.
"""

from dataclasses import replace
from math import log

import numpy as np

from qrun.models.graph import CacheLayer, GraphBuilder, Rotation, Temperature, Value
from qrun.models.hyperparameters import MAX_CONTEXT, MAX_EXPERTS, MAX_HEAD_DIM, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, rope_factors
from qrun.models.transformer import Shares, dense_or_experts, feed_forward, head

# GLM-4.7-Flash came before files said how its router's logits become probabilities.
LAYERS_OF_GLM, VOCABULARY_OF_GLM = (47, 48), 154880


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling, scale = read_scaling(metadata, h)
    rotation = scaling.rotation(h.n_rot, interleaved=True)
    temperature = read_temperature(metadata)
    is_glm = h.n_layer in LAYERS_OF_GLM and h.n_vocab == VOCABULARY_OF_GLM
    shares = Shares.read(metadata, "sigmoid" if is_glm else "softmax")
    n_shared = metadata.integer("expert_shared_count", low=0, high=MAX_EXPERTS)
    absorbed = metadata.integer("attention.key_length_mla", 0, low=0, high=MAX_HEAD_DIM) > 0

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        y = attention(builder, metadata, h, y, layer, rotation, scale, temperature, absorbed=absorbed)
        x = builder.add(x, y)

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        x = builder.add(x, dense_or_experts(builder, h, y, layer, shares, h.n_ff_expert[layer] * n_shared))
    return head(builder, x, h)


def build_minicpm3(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of MiniCPM 3, which scales as MiniCPM does."""
    scaling = RopeScaling.read(metadata, h)
    factors = rope_factors(builder, h.n_rot, context, scaling.original_context)
    rotation = scaling.rotation(h.n_rot, factors)
    residual_scale = 1.4 / h.n_layer**0.5

    x = builder.embed("token_embd", h.n_vocab, h.n_embd, scale=12.0)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        y = attention(builder, metadata, h, y, layer, rotation, 1.0, absorbed=False)
        x = builder.add(x, builder.scale(y, residual_scale))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        y = feed_forward(builder, y, block, h.n_ff[layer], "silu")
        x = builder.add(x, builder.scale(y, residual_scale))
    return builder.scale(head(builder, x, h), 256.0 / h.n_embd)


def attention(
    builder: GraphBuilder,
    metadata: Metadata,
    h: Hyperparameters,
    x: Value,
    layer: int,
    rotation: Rotation,
    scale: float,
    temperature: Temperature | None = None,
    *,
    absorbed: bool,
) -> Value:
    """Latent attention of one block. scale: beside 1 / sqrt(head_dim). absorbed: are the matrices apart?"""
    block, n_heads, n_rot = f"blk.{layer}", h.n_heads[layer], h.n_rot
    dim_k, dim_v = h.head_dim_k, h.head_dim_v
    if absorbed:  # what the file calls the size of a head is that of a short row
        dim_k = metadata.integer("attention.key_length_mla", high=MAX_HEAD_DIM)
        dim_v = metadata.integer("attention.value_length_mla", high=MAX_HEAD_DIM)
    rank = metadata.integer("attention.kv_lora_rank", high=MAX_HEAD_DIM)
    plain = dim_k - n_rot  # dimensions of a head that do not turn
    if plain < 1:
        raise metadata.error("rope.dimension_count", f"is {n_rot}, expected less than {dim_k}")

    if builder.has(f"{block}.attn_q.weight"):
        q = builder.linear(x, f"{block}.attn_q", n_heads * dim_k)
    else:
        q = builder.linear(x, f"{block}.attn_q_a", metadata.integer("attention.q_lora_rank"))
        q = builder.rms_norm(q, f"{block}.attn_q_a_norm", h.rms_eps)
        q = builder.linear(q, f"{block}.attn_q_b", n_heads * dim_k)
    q = builder.rope(q, dim_k, rotation, start=plain)
    both = builder.linear(x, f"{block}.attn_kv_a_mqa", rank + n_rot)
    short = builder.rms_norm(builder.slice(both, 0, rank), f"{block}.attn_kv_a_norm", h.rms_eps)
    turned = builder.rope(builder.slice(both, rank, n_rot), n_rot, rotation)

    if absorbed:
        cache = CacheLayer(n_heads, 1, rank + n_rot, rank, None)
        asked = builder.head_linear(q, f"{block}.attn_k_b", n_heads, rank, plain)
        q = builder.join(asked, range(rank), n_heads, q, range(plain, dim_k), n_heads)
        k, v = builder.join(short, range(rank), 1, turned, range(n_rot)), short
    else:
        cache = CacheLayer(n_heads, n_heads, dim_k, dim_v, None)
        kv = builder.linear(short, f"{block}.attn_kv_b", n_heads * (plain + dim_v))
        k = builder.join(kv, range(plain), n_heads, turned, range(n_rot))
        v = builder.join(kv, range(plain, plain + dim_v), n_heads)
    if temperature is not None:  # heads that turn by nothing, and grow
        still = Rotation(np.zeros(cache.head_dim_k // 2, np.float32), 1.0, False, temperature)
        q = builder.rope(q, cache.head_dim_k, still, query=True)
    y = builder.attention(q, k, v, cache, scale * dim_k**-0.5)
    if absorbed:
        y = builder.head_linear(y, f"{block}.attn_v_b", n_heads, dim_v, rank)
    return builder.linear(y, f"{block}.attn_output", h.n_embd)


def read_scaling(metadata: Metadata, h: Hyperparameters) -> tuple[RopeScaling, float]:
    """Rope, and what YaRN multiplies the products of queries and keys by."""
    scaling = RopeScaling.read(metadata, h)
    # Files have a tenth of it.
    damping = 10.0 * metadata.real("rope.scaling.yarn_log_multiplier", 0.0, high=1e2)
    growth = 0.1 * log(scaling.factor)
    if damping:
        scaling = replace(scaling, damping=damping if metadata.architecture == "mistral4" else 1.0)
    magnitude = scaling.rotation(h.n_rot).magnitude
    if not scaling.stretches_by_pair:
        magnitude *= 1.0 + growth
    return scaling, (magnitude * (1.0 + damping * growth)) ** 2


def read_temperature(metadata: Metadata) -> Temperature | None:
    """How queries grow with their position, or None where they do not."""
    scale = metadata.real("attention.temperature_scale", 0.0, high=1e3)
    return Temperature(scale, metadata.integer("attention.temperature_length", high=MAX_CONTEXT)) if scale else None
