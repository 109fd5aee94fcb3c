"""MPT (MosaicML, 2023): layer norms, scores that fall with the distance (ALiBi), and queries, keys and values that stay
within bounds. Some norm all heads of a query or key, or have scales for what their feed-forward network activates."""

import numpy as np

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.transformer import attention, layer_norm_head, learned_positions, qk_norm_of

MIN_SCALE = 1e-30  # of an activation, which is divided by it


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    clamp = metadata.real("attention.clamp_kqv", 0.0)
    max_bias = metadata.real("attention.max_alibi_bias", 0.0, high=1e3)
    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    if builder.has("position_embd.weight"):
        x = builder.add(x, learned_positions(builder, h, context))
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        qk_norm = qk_norm_of(builder, block, "layer")
        y = builder.layer_norm(x, f"{block}.attn_norm", h.norm_eps)
        y = attention(
            builder, h, y, block, h.cache_layer(layer), None, qk_norm=qk_norm, alibi=max_bias, clamp=clamp
        )
        x = builder.add(x, y)

        y = builder.layer_norm(x, f"{block}.ffn_norm", h.norm_eps)
        y = builder.activate_alone(builder.linear(y, f"{block}.ffn_up", h.n_ff[layer]), "gelu")
        y = unscaled(builder, y, f"{block}.ffn.act.scales")
        x = builder.add(x, builder.linear(y, f"{block}.ffn_down", h.n_embd))
    return layer_norm_head(builder, x, h)


def unscaled(builder: GraphBuilder, x: Value, name: str) -> Value:
    """x, divided by the scales that the file may have."""
    scales = builder.optional_constant(name, x.width)
    if scales is None:
        return x
    if np.abs(scales).min() < MIN_SCALE:
        raise builder.error(f"tensor {name} divides by numbers smaller than {MIN_SCALE}")
    return builder.affine(x, (1.0 / scales.astype(np.float64)).astype(np.float32))
