"""OLMo (arXiv:2402.00838): Llama with layer norms that have no weights."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attention, feed_forward, output


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot, interleaved=True)
    clamp = metadata.real("attention.clamp_kqv", 0.0)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.layer_norm_with(x, None, None, h.norm_eps)
        x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation, clamp=clamp))

        y = builder.layer_norm_with(x, None, None, h.norm_eps)
        x = builder.add(x, feed_forward(builder, y, block, h.n_ff[layer], "silu"))

    x = builder.layer_norm_with(builder.select_rows(x), None, None, h.norm_eps)
    return output(builder, x, h)
