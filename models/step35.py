"""Step 3.5 and 3.7 Flash (StepFun): a gate for each head on what attention gives; three layers of four that see a
window, with other heads and a rope of their own, where half of what turns elsewhere turns on the others; experts,
chosen by biases, beside one that all tokens share, and limits on what gates let through."""

from dataclasses import replace

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import MAX_CONTEXT, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, read_base, read_n_rot, rope_factors
from qrun.models.transformer import (
    QKNorm,
    Shares,
    attend,
    experts,
    feed_forward,
    head,
    limited,
    read_limits,
    required_flags,
)


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling = RopeScaling.read(metadata, h)
    if h.n_rot % 4:
        raise metadata.error("rope.dimension_count", f"is {h.n_rot}, expected a multiple of 4")
    local_n_rot = read_n_rot(metadata, "rope.dimension_count_swa", h)
    factors = rope_factors(builder, max(h.n_rot // 2, local_n_rot), context, scaling.original_context)
    rotation = scaling.rotation(h.n_rot // 2, None if factors is None else factors[: h.n_rot // 4])
    local_base = read_base(metadata, "rope.freq_base_swa", 10000.0)
    local_rotation = replace(scaling, base=local_base, factor=1.0).rotation(local_n_rot)
    window = metadata.integer("attention.sliding_window", high=MAX_CONTEXT)
    sliding = required_flags(metadata, "attention.sliding_window_pattern", h.n_layer)
    limits, dense_limits = (read_limits(metadata, key, h) for key in ("swiglu_clamp_exp", "swiglu_clamp_shexp"))
    shares = Shares.read(metadata, "sigmoid")
    n_ff_shared = metadata.integer("expert_shared_feed_forward_length", 0, low=0)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        cache = h.cache_layer(layer, window if sliding[layer] else None)
        qk_norm: QKNorm | None = "heads" if builder.has(f"{block}.attn_q_norm.weight") else None
        turn = local_rotation if sliding[layer] else rotation
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        z = attend(builder, h, y, block, cache, turn, qk_norm=qk_norm)
        if builder.has(f"{block}.attn_gate.weight"):
            z = builder.gate(builder.linear(y, f"{block}.attn_gate", cache.n_heads), z, "sigmoid")
        x = builder.add(x, builder.linear(z, f"{block}.attn_output", h.n_embd))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        kind, dense_kind = limited(limits[layer]), limited(dense_limits[layer])
        if not builder.has(f"{block}.ffn_gate_inp.weight"):
            x = builder.add(x, feed_forward(builder, y, block, h.n_ff[layer], dense_kind, limit=dense_limits[layer]))
            continue
        z = experts(builder, h, y, block, h.n_ff_expert[layer], kind, shares, limit=limits[layer])
        shared = feed_forward(builder, y, block, n_ff_shared, dense_kind, "_shexp", dense_limits[layer])
        x = builder.add(x, builder.add(z, shared))
    return head(builder, x, h)
