"""Nemotron-4 and Minitron (arXiv:2402.16819, 2407.14679), and Jais 2: layer norms, and the square of a ReLU without a
gate. The file's norm weights have their 1 added."""

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
        x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation))

        y = builder.layer_norm(x, f"{block}.ffn_norm", h.norm_eps)
        x = builder.add(x, ungated_feed_forward(builder, y, block, h.n_ff[layer], "relu_squared"))
    return layer_norm_head(builder, x, h)
