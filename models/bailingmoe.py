"""Ling-lite and Ling-plus (arXiv:2503.05139): a mixture of experts, and one that all tokens share."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import MAX_EXPERTS, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import Shares, attention, experts, head, read_experts_scale, shared_expert


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot, interleaved=True)
    n_shared = metadata.integer("expert_shared_count", high=MAX_EXPERTS)
    shares = Shares(metadata.flag("expert_weights_norm", False), read_experts_scale(metadata))

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        y = attention(builder, h, y, block, h.cache_layer(layer), rotation, scale=h.n_rot**-0.5)
        x = builder.add(x, y)

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        chosen = experts(builder, h, y, block, h.n_ff_expert[layer], shares=shares)
        x = builder.add(x, builder.add(chosen, shared_expert(builder, y, block, h.n_ff_expert[layer] * n_shared)))
    return head(builder, x, h)
