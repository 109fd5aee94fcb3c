"""Qwen3 (arXiv:2505.09388): Qwen2 with a norm of each head's query and key; dense, or a mixture of experts."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attention, feed_forward, head, windows


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    # A file that does not say how wide an expert is shares the dense width out among those in use.
    n_ff_expert = metadata.integer("expert_feed_forward_length", h.n_ff[0] // h.n_used) if h.n_expert else 0
    window = windows(metadata, h.n_layer)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        cache = h.cache_layer(layer, window[layer])
        x = builder.add(x, attention(builder, h, y, block, cache, rotation, qk_norms=True))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        if h.n_expert:
            y = builder.moe(y, block, n_expert=h.n_expert, n_used=h.n_used, n_ff=n_ff_expert, kind="silu")
        else:
            y = feed_forward(builder, y, block, h.n_ff[layer], "silu")
        x = builder.add(x, y)
    return head(builder, x, h)
