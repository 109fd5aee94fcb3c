"""Hy3 (Tencent): a norm of each head's query and key, and experts chosen by biases beside one that all tokens share;
layers without a router are dense."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import Shares, attention, blocks, experts, feed_forward, shared_expert


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    return blocks(builder, metadata, h, context, build_block)


def build_block(
    builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int, x: Value, layer: int
) -> Value:
    """One block, of the model or of its draft layers."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    shares = Shares.read(metadata, "sigmoid")
    n_ff_shared = metadata.integer("expert_shared_feed_forward_length", 0, low=0)
    block = f"blk.{layer}"
    y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
    x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation, qk_norm="heads"))

    y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
    if not builder.has(f"{block}.ffn_gate_inp.weight"):
        return builder.add(x, feed_forward(builder, y, block, h.n_ff[layer], "silu"))
    n_ff = h.n_ff_expert[layer] or h.n_ff[layer] // max(h.n_used, 1)
    shared = shared_expert(builder, y, block, n_ff_shared or n_ff)
    return builder.add(x, builder.add(experts(builder, h, y, block, n_ff, shares=shares), shared))
