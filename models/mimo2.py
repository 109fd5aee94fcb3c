"""MiMo-V2 (Xiaomi): layers that see a window, with other heads, a rope of their own and sinks; keys longer than values;
experts chosen by biases, and dense layers where there is no router."""

from dataclasses import replace

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import MAX_CONTEXT, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, read_base
from qrun.models.transformer import Shares, blocks, experts, feed_forward, project_qkv, required_flags


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    return blocks(builder, metadata, h, context, build_block)


def build_block(
    builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int, x: Value, layer: int
) -> Value:
    """One block, of the model or of its draft layers."""
    scaling = RopeScaling.read(metadata, h)
    window = metadata.integer("attention.sliding_window", high=MAX_CONTEXT)
    if required_flags(metadata, "attention.sliding_window_pattern", layer + 1)[layer]:
        local_base = read_base(metadata, "rope.freq_base_swa", 10000.0)
        scaling = replace(scaling, base=local_base, factor=1.0)
        cache = h.cache_layer(layer, window)
    else:
        cache = h.cache_layer(layer)
    rotation = scaling.rotation(h.n_rot)
    value_scale = metadata.real("attention.value_scale", 0.0) or 1.0

    block = f"blk.{layer}"
    sinks = builder.optional_constant(f"{block}.attn_sinks.weight", cache.n_heads)
    y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
    # The reference engine adds no biases here, even if a file has some.
    q, k, v = project_qkv(builder, y, block, cache, biased=False)
    q, k = (builder.rope(part, cache.head_dim_k, rotation) for part in (q, k))
    y = builder.attention(q, k, v, cache, cache.head_dim_k**-0.5, sinks=sinks)
    y = builder.linear(y, f"{block}.attn_output", h.n_embd, bias=False)
    x = builder.add(x, builder.scale(y, value_scale))

    y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
    if builder.has(f"{block}.ffn_gate_inp.weight"):
        y = experts(builder, h, y, block, h.n_ff_expert[layer], shares=Shares(gating="sigmoid"))
    else:
        y = feed_forward(builder, y, block, h.n_ff[layer], "silu")
    return builder.add(x, y)
