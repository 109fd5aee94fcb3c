"""DeciLM and Nemotron 51B to 253B (arXiv:2411.19146): Llama of which a search has left out what could be spared. A
layer may have fewer heads, a single matrix in place of attention, or no attention, and a narrower feed-forward
network."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, rope_factors
from qrun.models.transformer import attention, feed_forward, head


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling = RopeScaling.read(metadata, h)
    factors = rope_factors(builder, h.n_rot, context, scaling.original_context)
    rotation = scaling.rotation(h.n_rot, factors, interleaved=True)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        if not h.n_ff[layer]:
            continue  # the reference engine leaves a layer without a feed-forward network out altogether
        if h.n_kv_heads[layer]:
            y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
            x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation))
        elif h.n_heads[layer]:
            y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
            x = builder.add(x, builder.linear(y, f"{block}.attn_output", h.n_embd, bias=False))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        x = builder.add(x, feed_forward(builder, y, block, h.n_ff[layer], "silu"))
    return head(builder, x, h)
