"""Gemma 4: Gemma 3 with larger heads on the layers that see everything, values that are normed keys where a layer has
no matrix for them, and no scale on the products of queries and keys. In the small models every layer also takes an
embedding of the token that is its own, and the last layers attend to keys and values of earlier ones. In one model a
mixture of experts lies beside the dense network."""

from dataclasses import replace
from math import sqrt

import numpy as np

from qrun.models.graph import CacheLayer, GraphBuilder, Rotation, Value
from qrun.models.hyperparameters import MAX_CONTEXT, MAX_HEAD_DIM, MAX_WIDTH, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, read_base
from qrun.models.transformer import experts, feed_forward, head, project_qkv, required_flags, softcapped


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    sliding = required_flags(metadata, "attention.sliding_window_pattern", h.n_layer)
    caches = read_caches(metadata, h, sliding)
    rotations = read_rotations(builder, metadata, h, sliding)
    # From this layer on, layers have no keys and values of their own.
    n_own = h.n_layer - metadata.integer("attention.shared_kv_layers", 0, low=0, high=h.n_layer - 1)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd, scale=sqrt(h.n_embd))
    inputs = layer_inputs(builder, metadata, h, x)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        shared = None if layer < n_own else n_own - 2 if sliding[layer] else n_own - 1
        y = attention(builder, h, y, block, caches[layer], rotations[sliding[layer]], shared)
        x = builder.add(x, builder.rms_norm(y, f"{block}.post_attention_norm", h.rms_eps))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        y = feed_forward(builder, y, block, h.n_ff[layer], "gelu")
        if builder.has(f"{block}.ffn_gate_inp.weight"):
            y = builder.rms_norm(y, f"{block}.post_ffw_norm_1", h.rms_eps)
            y = builder.add(y, mixture(builder, h, x, block, h.n_ff_expert[layer]))
        x = builder.add(x, builder.rms_norm(y, f"{block}.post_ffw_norm", h.rms_eps))

        if inputs is not None:
            width = inputs.width // h.n_layer
            gate = builder.linear(x, f"{block}.inp_gate", width)
            y = builder.activate(gate, builder.slice(inputs, layer * width, width), "gelu")
            y = builder.linear(y, f"{block}.proj", h.n_embd)
            x = builder.add(x, builder.rms_norm(y, f"{block}.post_norm", h.rms_eps))
        scale = builder.optional_constant(f"{block}.layer_output_scale.weight", 1)
        if scale is not None:
            x = builder.scale(x, float(scale[0]))
    return softcapped(builder, head(builder, x, h), metadata, default=0.0)


def attention(
    builder: GraphBuilder, h: Hyperparameters, x: Value, block: str, cache: CacheLayer, rotation: Rotation,
    shared: int | None,
) -> Value:  # fmt: skip
    """Self-attention of one block, to its own keys and values, or to those that layer `shared` has in the cache."""
    q_width, k_width = cache.n_heads * cache.head_dim_k, cache.n_kv_heads * cache.head_dim_k
    if shared is not None:
        if shared < 0 or builder.cache_layers[shared] != cache:
            raise builder.error(f"{block} shares keys and values with layer {shared}, whose heads are of another kind")
        q = builder.linear(x, f"{block}.attn_q", q_width)
    elif builder.has(f"{block}.attn_qkv.weight") or builder.has(f"{block}.attn_v.weight"):
        q, k, v = project_qkv(builder, x, block, cache)
    else:
        q, k = builder.linear(x, f"{block}.attn_q", q_width), builder.linear(x, f"{block}.attn_k", k_width)
        v = k
    q = builder.rms_norm(q, f"{block}.attn_q_norm", h.rms_eps, cache.n_heads)
    q = builder.rope(q, cache.head_dim_k, rotation)
    if shared is not None:
        y = builder.shared_attention(q, shared, scale=1.0)
    else:
        k = builder.rms_norm(k, f"{block}.attn_k_norm", h.rms_eps, cache.n_kv_heads)
        k = builder.rope(k, cache.head_dim_k, rotation)
        v = builder.rms_norm_with(v, None, h.rms_eps, cache.n_kv_heads)
        y = builder.attention(q, k, v, cache, scale=1.0)
    return builder.linear(y, f"{block}.attn_output", h.n_embd)


def mixture(builder: GraphBuilder, h: Hyperparameters, x: Value, block: str, n_ff: int) -> Value:
    """The experts beside the dense network. They and their router take the same rows through norms of their own."""
    y = builder.rms_norm(x, f"{block}.pre_ffw_norm_2", h.rms_eps)
    scale = builder.constant(f"{block}.ffn_gate_inp.scale", h.n_embd) * np.float32(h.n_embd**-0.5)
    router_x = builder.rms_norm_with(x, scale, h.rms_eps)
    y = experts(builder, h, y, block, n_ff, "gelu", router_x=router_x)
    return builder.rms_norm(y, f"{block}.post_ffw_norm_2", h.rms_eps)


def read_caches(metadata: Metadata, h: Hyperparameters, sliding: tuple[bool, ...]) -> list[CacheLayer]:
    """The heads of each layer: those that see a window have another size."""
    window = metadata.integer("attention.sliding_window", high=MAX_CONTEXT)
    local_dim = metadata.integer("attention.key_length_swa", h.head_dim_k, high=MAX_HEAD_DIM)
    local_dim_v = metadata.integer("attention.value_length_swa", h.head_dim_v, high=MAX_HEAD_DIM)
    for key, k, v in (("value_length", h.head_dim_k, h.head_dim_v), ("value_length_swa", local_dim, local_dim_v)):
        if k != v:
            raise metadata.error(f"attention.{key}", f"is {v}, expected {k} as of keys")
    full = [h.cache_layer(layer) for layer in range(h.n_layer)]
    local = [replace(cache, head_dim_k=local_dim, head_dim_v=local_dim, window=window) for cache in full]
    return [local[layer] if sliding[layer] else full[layer] for layer in range(h.n_layer)]


def read_rotations(
    builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, sliding: tuple[bool, ...]
) -> tuple[Rotation, Rotation]:
    """How heads turn, on layers that see everything by the model's own factors, and on those that see a window."""
    scaling = RopeScaling.read(metadata, h)
    has_full = not all(sliding)
    factors = builder.constant("rope_freqs.weight", h.head_dim_k // 2)[: h.n_rot // 2] if has_full else None
    local_dim = metadata.integer("attention.key_length_swa", h.head_dim_k, high=MAX_HEAD_DIM)
    n_rot = metadata.integer("rope.dimension_count_swa", min(h.n_rot, local_dim), low=2, high=local_dim)
    if n_rot % 2:
        raise metadata.error("rope.dimension_count_swa", f"is {n_rot}, expected an even number")
    local = replace(scaling, base=read_base(metadata, "rope.freq_base_swa", 10000.0), factor=1.0)
    return scaling.rotation(h.n_rot, factors), local.rotation(n_rot)


def layer_inputs(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, x: Value) -> Value | None:
    """What each layer takes of the token beside the layer before: side by side, or None in models that have none."""
    width = metadata.integer("embedding_length_per_layer_input", 0, low=0, high=MAX_WIDTH // h.n_layer)
    if not width:
        return None
    embedded = builder.embed("per_layer_token_embd", h.n_vocab, width * h.n_layer, scale=sqrt(width))
    y = builder.scale(builder.linear(x, "per_layer_model_proj", width * h.n_layer), h.n_embd**-0.5)
    y = builder.rms_norm(y, "per_layer_proj_norm", h.rms_eps, h.n_layer)
    return builder.scale(builder.add(y, embedded), sqrt(0.5))
