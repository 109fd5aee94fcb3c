"""DeepSeekMoE (arXiv:2401.06066): many small experts, a few that all tokens share, and dense layers at the start.
DeepSeek-OCR (arXiv:2510.18234), for text: the same, whose heads turn in halves."""

from dataclasses import replace

from qrun.models.deepseek2 import read_scaling
from qrun.models.graph import GraphBuilder, Rotation, Value
from qrun.models.hyperparameters import MAX_EXPERTS, Hyperparameters, Metadata
from qrun.models.rope import PLAIN, RopeScaling
from qrun.models.transformer import Shares, attention, dense_or_experts, head, read_experts_scale


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot, interleaved=True)
    return layers(builder, metadata, h, rotation, Shares(normalize=False, scale=read_experts_scale(metadata)))


def build_ocr(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits. Nothing stretches rope, though scores grow as if something did."""
    scaling, growth = read_scaling(metadata, h)
    rotation = replace(PLAIN, base=scaling.base).rotation(h.n_rot)
    return layers(builder, metadata, h, rotation, Shares.read(metadata, "softmax"), growth)


def layers(
    builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, rotation: Rotation, shares: Shares,
    growth: float = 1.0,
) -> Value:
    """All layers. growth: what scores are multiplied by."""
    scale = growth * h.head_dim_k**-0.5
    n_shared = metadata.integer("expert_shared_count", high=MAX_EXPERTS)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation, scale=scale))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        x = builder.add(x, dense_or_experts(builder, h, y, layer, shares, h.n_ff_expert[layer] * n_shared))
    return head(builder, x, h)
