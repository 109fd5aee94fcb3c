"""ChatGLM (arXiv:2406.12793), up to GLM-4-9B-chat: joined gate and up, and only a part of each head turns."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attention, head, joined_feed_forward


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot, interleaved=True)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        x = builder.add(x, joined_feed_forward(builder, y, block, h.n_ff[layer], "silu"))
    return head(builder, x, h)
