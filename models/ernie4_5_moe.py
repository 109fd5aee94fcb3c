"""ERNIE 4.5 as a mixture of experts (Baidu): experts, chosen by biases, in every few layers after the first."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import MAX_LAYERS, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attention, experts, feed_forward, head, shared_expert


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot, interleaved=True)
    period = metadata.integer("interleave_moe_layer_step", high=MAX_LAYERS)
    n_ff_shared = metadata.integer("expert_shared_feed_forward_length", 0, low=0)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        # The reference engine adds no bias behind attention, even if a file has one.
        x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation, bias=False))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        if layer < h.n_dense or (layer + 1) % period:
            x = builder.add(x, feed_forward(builder, y, block, h.n_ff[layer], "silu"))
            continue
        x = builder.add(x, experts(builder, h, y, block, h.n_ff_expert[layer]))
        if n_ff_shared:
            x = builder.add(x, shared_expert(builder, y, block, n_ff_shared))
    return head(builder, x, h)
