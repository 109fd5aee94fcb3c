"""Hunyuan (arXiv:2411.02265; Hunyuan-A13B): a norm of each head's query and key after they have turned; dense, or a
mixture of experts with one that all tokens share."""

from dataclasses import replace

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attention, experts, feed_forward, head, shared_expert


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of the dense models, and of HunyuanOCR and HunyuanVL for text."""
    scaling = RopeScaling.read(metadata, h)
    # The base grows with the context that a model was stretched to (NTK-aware scaling).
    alpha = metadata.real("rope.scaling.alpha", 0.0, high=1e6) or 1.0
    power = h.head_dim_k / max(h.head_dim_k - 2, 1)
    rotation = replace(scaling, base=scaling.base * alpha**power).rotation(h.n_rot)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation, qk_norm="turned"))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        x = builder.add(x, feed_forward(builder, y, block, h.n_ff[layer], "silu"))
    return head(builder, x, h)


def build_experts(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of the mixture of experts."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    n_ff_shared = metadata.integer("expert_shared_feed_forward_length", 0, low=0)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation, qk_norm="turned"))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        shared = shared_expert(builder, y, block, n_ff_shared or h.n_ff[layer])
        x = builder.add(x, builder.add(experts(builder, h, y, block, h.n_ff[layer]), shared))
    return head(builder, x, h)
