"""Qwen1.5-MoE and Qwen2-57B-A14B (arXiv:2407.10671): a mixture of experts beside one that all tokens share, which is
let through by a gate of its own."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import Shares, attention, experts, head, shared_expert


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    n_ff_shared = metadata.integer("expert_shared_feed_forward_length", 0, low=0)
    shares = Shares(normalize=False)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        gate = builder.linear_row(y, f"{block}.ffn_gate_inp_shexp")
        shared = builder.gate(gate, shared_expert(builder, y, block, n_ff_shared or h.n_ff[layer]), "sigmoid")
        n_ff = h.n_ff_expert[layer] or h.n_ff[layer] // max(h.n_used, 1)
        x = builder.add(x, builder.add(experts(builder, h, y, block, n_ff, shares=shares), shared))
    return head(builder, x, h)
