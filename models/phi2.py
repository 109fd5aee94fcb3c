"""Phi-1, Phi-1.5 and Phi-2 (arXiv:2306.11644, 2309.05463): attention and a feed-forward network without a gate side by
side, both from one norm; biases everywhere."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attention, layer_norm_head, ungated_feed_forward


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.layer_norm(x, f"{block}.attn_norm", h.norm_eps)
        attended = attention(builder, h, y, block, h.cache_layer(layer), rotation)
        fed = ungated_feed_forward(builder, y, block, h.n_ff[layer], "gelu")
        x = builder.add(builder.add(attended, fed), x)
    return layer_norm_head(builder, x, h)
