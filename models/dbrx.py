"""DBRX (Databricks): a mixture of experts, layer norms, and queries, keys and values that are clamped."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attention, experts, layer_norm_head


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    clamp = metadata.real("attention.clamp_kqv")

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.layer_norm(x, f"{block}.attn_norm", h.norm_eps)
        x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation, clamp=clamp))

        y = builder.layer_norm(x, f"{block}.attn_output_norm", h.norm_eps)
        x = builder.add(x, experts(builder, h, y, block, h.n_ff[layer]))
    return layer_norm_head(builder, x, h)
