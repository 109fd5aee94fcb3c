"""Step 3.5 and 3.7 Flash (StepFun): a gate for each head on what attention gives; three layers of four that see a
window, with other heads and a rope of their own, where half of what turns elsewhere turns on the others; experts,
chosen by biases, beside one that all tokens share, and limits on what gates let through."""

from dataclasses import replace

from qrun.models.graph import GraphBuilder, Rotation, Value
from qrun.models.hyperparameters import MAX_CONTEXT, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, read_base, read_n_rot, rope_factors
from qrun.models.transformer import (
    Shares,
    attend,
    blocks,
    experts,
    feed_forward,
    limited,
    qk_norm_of,
    read_limits,
    required_flags,
)


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    return blocks(builder, metadata, h, context, build_block)


def build_block(
    builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int, x: Value, layer: int
) -> Value:
    """One block, of the model or of its draft layers."""
    limit, dense_limit = (read_limits(metadata, key, h)[layer] for key in ("swiglu_clamp_exp", "swiglu_clamp_shexp"))
    shares = Shares.read(metadata, "sigmoid")
    n_ff_shared = metadata.integer("expert_shared_feed_forward_length", 0, low=0)

    block = f"blk.{layer}"
    window, rotation = read_turn(builder, metadata, h, context, layer)
    cache = h.cache_layer(layer, window)
    qk_norm = qk_norm_of(builder, block)
    y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
    z = attend(builder, h, y, block, cache, rotation, qk_norm=qk_norm)
    if builder.has(f"{block}.attn_gate.weight"):
        z = builder.gate(builder.linear(y, f"{block}.attn_gate", cache.n_heads), z, "sigmoid")
    x = builder.add(x, builder.linear(z, f"{block}.attn_output", h.n_embd))

    y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
    kind, dense_kind = limited(limit), limited(dense_limit)
    if not builder.has(f"{block}.ffn_gate_inp.weight"):
        return builder.add(x, feed_forward(builder, y, block, h.n_ff[layer], dense_kind, limit=dense_limit))
    z = experts(builder, h, y, block, h.n_ff_expert[layer], kind, shares, limit=limit)
    shared = feed_forward(builder, y, block, n_ff_shared, dense_kind, "_shexp", dense_limit)
    return builder.add(x, builder.add(z, shared))


def read_turn(
    builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int, layer: int
) -> tuple[int | None, Rotation]:
    """The window of a layer, if it has one, and how its heads turn."""
    scaling = RopeScaling.read(metadata, h)
    if h.n_rot % 4:
        raise metadata.error("rope.dimension_count", f"is {h.n_rot}, expected a multiple of 4")
    local_n_rot = read_n_rot(metadata, "rope.dimension_count_swa", h)
    window = metadata.integer("attention.sliding_window", high=MAX_CONTEXT)
    if required_flags(metadata, "attention.sliding_window_pattern", layer + 1)[layer]:
        local_base = read_base(metadata, "rope.freq_base_swa", 10000.0)
        return window, replace(scaling, base=local_base, factor=1.0).rotation(local_n_rot)
    factors = rope_factors(builder, max(h.n_rot // 2, local_n_rot), context, scaling.original_context)
    return None, scaling.rotation(h.n_rot // 2, None if factors is None else factors[: h.n_rot // 4])
