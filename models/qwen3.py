"""Qwen3 (arXiv:2505.09388): Qwen2 with a norm of each head's query and key; dense, or a mixture of experts."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attention, experts, feed_forward, head, windows


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    window = windows(metadata, h.n_layer)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        cache = h.cache_layer(layer, window[layer])
        x = builder.add(x, attention(builder, h, y, block, cache, rotation, qk_norm="heads"))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        if h.n_expert:
            # A file that does not say how wide an expert is shares the dense width out among those in use.
            y = experts(builder, h, y, block, h.n_ff_expert[layer] or h.n_ff[layer] // h.n_used)
        else:
            y = feed_forward(builder, y, block, h.n_ff[layer], "silu")
        x = builder.add(x, y)
    return head(builder, x, h)
