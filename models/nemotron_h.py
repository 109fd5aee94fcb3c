"""Nemotron-H and Nemotron Nano 2 (arXiv:2504.03624, 2508.14444), Nemotron 3 Nano and Super: each layer is either a
Mamba-2 mixer, or attention whose heads do not turn, or a feed-forward network with the square of a ReLU and no gate. In
a mixture of such experts, they may work on a narrower row; beside them is one that all tokens share."""

from dataclasses import replace

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata, read_used
from qrun.models.mamba import Mamba2, mamba2
from qrun.models.transformer import Shares, attention, experts, head, read_experts_scale, ungated_feed_forward


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    sizes = Mamba2.read(metadata)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        if h.n_ff[layer]:
            network = latent_experts if h.n_expert else dense
            y = network(builder, h, y, layer)
        elif h.n_kv_heads[layer]:
            y = attention(builder, h, y, block, h.cache_layer(layer), None)
        else:
            y = mamba2(builder, h, y, block, sizes)
        x = builder.add(x, y)
    return head(builder, x, h)


def dense(builder: GraphBuilder, h: Hyperparameters, x: Value, layer: int) -> Value:
    """A layer's plain network."""
    return ungated_feed_forward(builder, x, f"blk.{layer}", h.n_ff[layer], "relu_squared")


def latent_experts(builder: GraphBuilder, h: Hyperparameters, x: Value, layer: int) -> Value:
    """A layer's mixture of experts. How many a row uses, and how wide they are, may vary from layer to layer."""
    block, metadata = f"blk.{layer}", h.metadata
    h = replace(h, n_used=read_used(metadata, h.n_expert, h.n_blocks)[layer])
    shares = Shares(metadata.flag("expert_weights_norm", False), read_experts_scale(metadata), "sigmoid")
    latent = metadata.integer("moe_latent_size", 0, low=0)

    narrow = builder.linear(x, f"{block}.ffn_latent_down", latent) if latent else x
    n_ff = h.n_ff_expert[layer] or h.n_ff[layer] // h.n_used
    y = experts(builder, h, narrow, block, n_ff, "relu_squared", shares, gated=False, router_x=x if latent else None)
    y = builder.linear(y, f"{block}.ffn_latent_up", h.n_embd) if latent else y
    n_ff_shared = metadata.integer("expert_shared_feed_forward_length", h.n_ff[layer], low=0) or h.n_ff[layer]
    return builder.add(y, ungated_feed_forward(builder, x, block, n_ff_shared, "relu_squared", "_shexp"))
