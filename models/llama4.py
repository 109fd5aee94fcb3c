"""Llama 4: three layers of four see their own chunk of 8,192 positions, and norm each head's query and key after they
have turned; the fourth sees everything, without positions, and its queries grow with theirs. Experts, chosen one for
each token, take their input by its weight, beside one that all tokens share."""

from dataclasses import replace

import numpy as np

from qrun.models.graph import CacheLayer, GraphBuilder, Rotation, Temperature, Value
from qrun.models.hyperparameters import MAX_CONTEXT, MAX_LAYERS, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, read_base, rope_factors
from qrun.models.transformer import Shares, experts, feed_forward, head, project_qkv, shared_expert, sliding_layers

CHUNK, NOPE_PERIOD = 8192, 4
EXPERTS_WITHOUT_QK_NORM = 128


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling = RopeScaling.read(metadata, h)
    factors = rope_factors(builder, h.n_rot, context, scaling.original_context)
    rotation = scaling.rotation(h.n_rot, factors, interleaved=True)
    local_base = read_base(metadata, "rope.freq_base_swa", scaling.base)
    local_rotation = replace(scaling, base=local_base).rotation(h.n_rot, factors, interleaved=True)
    metadata.integer("attention.sliding_window", CHUNK, high=MAX_CONTEXT)  # whatever it is, chunks are of one size
    chunked = sliding_layers(metadata, h.n_layer, period=4)
    period = metadata.integer("interleave_moe_layer_step", low=0, high=MAX_LAYERS)
    shares = Shares(normalize=False, gating="sigmoid_of_chosen")

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        cache = h.cache_layer(layer)
        turn = local_rotation if chunked[layer] else rotation
        if chunked[layer]:
            cache = replace(cache, window=CHUNK, chunked=True)
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        x = builder.add(x, attention(builder, h, y, block, cache, turn if (layer + 1) % NOPE_PERIOD else None))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        if not period or (layer + 1) % period:
            x = builder.add(x, feed_forward(builder, y, block, h.n_ff[layer], "silu"))
            continue
        n_ff = h.n_ff_expert[layer]
        chosen = experts(builder, h, y, block, n_ff, shares=shares, weigh_inputs=True)
        x = builder.add(x, builder.add(chosen, shared_expert(builder, y, block, n_ff)))
    return head(builder, x, h)


def attention(
    builder: GraphBuilder, h: Hyperparameters, x: Value, block: str, cache: CacheLayer, rotation: Rotation | None
) -> Value:
    """Self-attention of one block."""
    q, k, v = project_qkv(builder, x, block, cache)
    dim = cache.head_dim_k
    if rotation is None:  # heads that turn by nothing, and grow
        growing = Temperature(0.1, CHUNK, offset=1)
        q = builder.rope(q, dim, Rotation(np.zeros(dim // 2, np.float32), 1.0, False, growing), query=True)
    else:
        q, k = builder.rope(q, dim, rotation), builder.rope(k, dim, rotation)
        if h.n_expert != EXPERTS_WITHOUT_QK_NORM:
            q = builder.rms_norm_with(q, None, h.rms_eps, cache.n_heads)
            k = builder.rms_norm_with(k, None, h.rms_eps, cache.n_kv_heads)
    return builder.linear(builder.attention(q, k, v, cache, dim**-0.5), f"{block}.attn_output", h.n_embd)
