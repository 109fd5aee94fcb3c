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
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot, interleaved=not has_sections(metadata))
    if not metadata.flag("kda.safe_gate", True):
        raise metadata.error("kda.safe_gate", "is False: decays without a bound are not supported")
    lower_bound = metadata.real("kda.gate_lower_bound", low=-1e3, high=0.0)
    limits, shared_limits = (read_limits(metadata, key, h) for key in ("swiglu_clamp_exp", "swiglu_clamp_shexp"))
    shares, sizes = Shares.read(metadata, "sigmoid"), Latent.absorbed_only(metadata, h)
    n_shared = metadata.integer("expert_shared_count", high=MAX_EXPERTS)
    n_ff_shared = metadata.integer("expert_shared_feed_forward_length", 0, low=0)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        if h.n_kv_heads[layer]:
            gate = builder.linear(y, f"{block}.attn_gate", h.n_heads[layer])
            y = builder.gate(gate, latent_attention.attend(builder, h, y, layer, sizes, rotation), "sigmoid")
            y = builder.linear(y, f"{block}.attn_output", h.n_embd)
        else:
            y = delta_attention(builder, metadata, h, y, layer, lower_bound)
        x = builder.add(x, y)

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        n_ff = n_ff_shared or h.n_ff_expert[layer] * n_shared
        limit, shared_limit = limits[layer], shared_limits[layer]
        y = dense_or_experts(builder, h, y, layer, shares, n_ff, limit=limit, shared_limit=shared_limit)
        x = builder.add(x, y)
    return head(builder, x, h)
