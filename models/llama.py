"""Llama (Touvron et al., arXiv:2302.13971 and 2307.09288; arXiv:2407.21783), and what shares its layout: Mistral,
Mixtral, SmolLM2 and many others."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, rope_factors
from qrun.models.transformer import attention, experts, feed_forward, head, windows


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling = RopeScaling.read(metadata, h)
    factors = rope_factors(builder, h.n_rot, context, scaling.original_context)
    # Files of this architecture hold query and key rows permuted, so that the pairs of a head lie side by side.
    rotation = scaling.rotation(h.n_rot, factors, interleaved=True)
    window = windows(metadata, h.n_layer)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer, window[layer]), rotation))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        if h.n_expert:
            y = experts(builder, h, y, block, h.n_ff[layer])
        else:
            y = feed_forward(builder, y, block, h.n_ff[layer], "silu")
        x = builder.add(x, y)
    return head(builder, x, h)
