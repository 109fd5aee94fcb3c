"""PLaMo: attention and feed-forward network side by side, both from one norm, both added to the layer's input."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attention, feed_forward, head


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.head_dim_k)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        attended = attention(builder, h, y, block, h.cache_layer(layer), rotation)
        fed = feed_forward(builder, y, block, h.n_ff[layer], "silu")
        x = builder.add(builder.add(fed, attended), x)
    return head(builder, x, h)
