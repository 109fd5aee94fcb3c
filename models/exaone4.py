"""EXAONE 4 (arXiv:2507.11407): norms after each part instead of before, and of each head's query and key. In the large
model three layers of four see a window, and the fourth has no positions."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, rope_factors
from qrun.models.transformer import attention, feed_forward, head, read_window, sliding_layers

LAYERS_OF_32B = 64


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling = RopeScaling.read(metadata, h)
    factors = rope_factors(builder, h.n_rot, context, scaling.original_context)
    rotation = scaling.rotation(h.n_rot, factors)
    window = read_window(metadata, 4096) if h.n_layer == LAYERS_OF_32B else 0
    sliding = sliding_layers(metadata, h.n_layer, period=4) if window else (False,) * h.n_layer

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        cache = h.cache_layer(layer, window if sliding[layer] else None)
        turn = rotation if sliding[layer] or not window else None
        y = attention(builder, h, x, block, cache, turn, qk_norm="heads")
        x = builder.add(x, builder.rms_norm(y, f"{block}.post_attention_norm", h.rms_eps))

        y = feed_forward(builder, x, block, h.n_ff[layer], "silu")
        x = builder.add(x, builder.rms_norm(y, f"{block}.post_ffw_norm", h.rms_eps))
    return head(builder, x, h)
