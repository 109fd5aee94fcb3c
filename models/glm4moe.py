"""GLM-4.5 to 4.7 (arXiv:2508.06471): many small experts chosen by biases, one that all tokens share, dense layers
first."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import MAX_EXPERTS, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import Shares, attention, blocks, dense_or_experts, qk_norm_of


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    return blocks(builder, metadata, h, context, build_block)


def build_block(
    builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int, x: Value, layer: int
) -> Value:
    """One block, of the model or of its draft layers."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    shares = Shares.read(metadata, "sigmoid")
    n_shared = metadata.integer("expert_shared_count", high=MAX_EXPERTS)
    block = f"blk.{layer}"
    # Of the models, only the larger ones norm each head's query and key.
    qk_norm = qk_norm_of(builder, block)
    y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
    x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation, qk_norm=qk_norm))

    y = builder.rms_norm(x, f"{block}.post_attention_norm", h.rms_eps)
    return builder.add(x, dense_or_experts(builder, h, y, layer, shares, h.n_ff_expert[layer] * n_shared))
