"""Ling 3.0 (inclusionAI): Kimi delta attention whose decays have a bound, and latent attention with a gate for each
head; experts, chosen by biases, beside one that all tokens share, and limits on what gates let through."""

from qrun.models import latent_attention
from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import MAX_EXPERTS, Hyperparameters, Metadata
from qrun.models.kimi_linear import delta_attention
from qrun.models.latent_attention import Latent
from qrun.models.rope import RopeScaling, has_sections
from qrun.models.transformer import Shares, dense_or_experts, head, read_limits


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    if not metadata.flag("kda.safe_gate", True):
        raise metadata.error("kda.safe_gate", "is False: decays without a bound are not supported")
    lower_bound = metadata.real("kda.gate_lower_bound", low=-1e3, high=0.0)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        y = builder.rms_norm(x, f"blk.{layer}.attn_norm", h.rms_eps)
        if h.n_kv_heads[layer]:
            y = gated_attention(builder, metadata, h, y, layer)
        else:
            y = delta_attention(builder, metadata, h, y, layer, lower_bound)
        x = network(builder, metadata, h, builder.add(x, y), layer)
    return head(builder, x, h)


def build_draft(
    builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int, x: Value, layer: int
) -> Value:
    """A draft layer, which has latent attention."""
    y = builder.rms_norm(x, f"blk.{layer}.attn_norm", h.rms_eps)
    x = builder.add(x, gated_attention(builder, metadata, h, y, layer))
    return network(builder, metadata, h, x, layer)


def gated_attention(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, x: Value, layer: int) -> Value:
    """Latent attention with a gate for each head."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot, interleaved=not has_sections(metadata))
    y = latent_attention.attend(builder, h, x, layer, Latent.absorbed_only(metadata, h), rotation)
    gate = builder.linear(x, f"blk.{layer}.attn_gate", h.n_heads[layer])
    return builder.linear(builder.gate(gate, y, "sigmoid"), f"blk.{layer}.attn_output", h.n_embd)


def network(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, x: Value, layer: int) -> Value:
    """What comes behind the attention of a block."""
    limit, shared_limit = (read_limits(metadata, key, h)[layer] for key in ("swiglu_clamp_exp", "swiglu_clamp_shexp"))
    n_shared = metadata.integer("expert_shared_count", low=0, high=MAX_EXPERTS) or 1  # there is one in any case
    n_ff_shared = metadata.integer("expert_shared_feed_forward_length", 0, low=0)
    n_ff = n_ff_shared or h.n_ff_expert[layer] * n_shared
    y = builder.rms_norm(x, f"blk.{layer}.ffn_norm", h.rms_eps)
    shares = Shares.read(metadata, "sigmoid")
    return builder.add(x, dense_or_experts(
        builder, h, y, layer, shares, n_ff, limit=limit, shared_limit=shared_limit
    ))
