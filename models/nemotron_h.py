"""Nemotron-H and Nemotron Nano 2 (arXiv:2504.03624, 2508.14444), Nemotron 3 Nano and Super: each layer is either a
Mamba-2 mixer, or attention whose heads do not turn, or a feed-forward network with the square of a ReLU, which may be a
mixture of experts."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.mamba import Mamba2, mamba2
from qrun.models.transformer import attention, head, ungated_feed_forward


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    sizes = Mamba2.read(metadata)
    scale = metadata.real("attention.scale", 0.0) or None

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        if h.n_ff[layer]:
            y = ungated_feed_forward(builder, y, block, h.n_ff[layer], "relu_squared")
        elif h.n_kv_heads[layer]:
            y = attention(builder, h, y, block, h.cache_layer(layer), None, scale=scale)
        else:
            y = mamba2(builder, h, y, block, sizes)
        x = builder.add(x, y)
    return head(builder, x, h)
