"""Arctic (Snowflake): a small dense network, and beside it a mixture of experts that takes the layer's input."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attention, experts, feed_forward, head


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot, interleaved=True)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        attended = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation))

        y = builder.rms_norm(attended, f"{block}.ffn_norm", h.rms_eps)
        dense = builder.add(attended, feed_forward(builder, y, block, h.n_embd, "silu"))

        y = builder.rms_norm(x, f"{block}.ffn_norm_exps", h.rms_eps)
        x = builder.add(dense, experts(builder, h, y, block, h.n_ff[layer]))
    return head(builder, x, h)
