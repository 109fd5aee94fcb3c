"""Mellum 2: Qwen3's mixture of experts. Three layers of four see a window, and only the fourth is stretched to a longer
context."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attention, experts, head, read_window, sliding_layers


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
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        x = builder.add(x, attention(builder, h, y, block, cache, turn, qk_norm="heads"))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        n_ff = h.n_ff_expert[layer] or h.n_ff[layer] // max(h.n_used, 1)
        x = builder.add(x, experts(builder, h, y, block, n_ff))
    return head(builder, x, h)
