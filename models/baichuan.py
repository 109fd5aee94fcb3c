"""Baichuan and Baichuan 2 (arXiv:2309.10305): Llama. In the models of 13 billion weights scores fall with the distance,
in place of rope."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import ALIBI, attention, feed_forward, head

LAYERS_OF_7B = 32
LAYERS_OF_13B = 40


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    turning = RopeScaling.read(metadata, h).rotation(h.n_rot, interleaved=True)
    # The reference engine knows the two published sizes, and gives any other no positions at all.
    rotation = turning if h.n_layer == LAYERS_OF_7B else None
    alibi = ALIBI if h.n_layer == LAYERS_OF_13B else 0.0

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation, alibi=alibi))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        x = builder.add(x, feed_forward(builder, y, block, h.n_ff[layer], "silu"))
    return head(builder, x, h)
