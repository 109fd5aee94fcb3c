"""OLMo 2 (arXiv:2501.00656) and OLMo 3: norms after each part instead of before, and of all heads of a query or key as
one. In OLMo 3 three layers of four see a window, and only the fourth is stretched to a longer context."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attention, feed_forward, head, read_window, sliding_layers


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling = RopeScaling.read(metadata, h)
    rotation, local_rotation = scaling.rotation(h.n_rot), scaling.plain().rotation(h.n_rot)
    window = read_window(metadata)
    sliding = sliding_layers(metadata, h.n_layer, period=4) if window else (False,) * h.n_layer

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        cache = h.cache_layer(layer, window if sliding[layer] else None)
        turn = local_rotation if sliding[layer] else rotation
        y = attention(builder, h, x, block, cache, turn, qk_norm="rows")
        x = builder.add(x, builder.rms_norm(y, f"{block}.post_attention_norm", h.rms_eps))

        y = feed_forward(builder, x, block, h.n_ff[layer], "silu")
        x = builder.add(x, builder.rms_norm(y, f"{block}.post_ffw_norm", h.rms_eps))
    return head(builder, x, h)
