"""DeepSeekMoE (arXiv:2401.06066): many small experts, a few that all tokens share, and dense layers at the start."""

from qrun.models.graph import Gating, GraphBuilder, Rotation, Value
from qrun.models.hyperparameters import MAX_EXPERTS, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attention, experts, experts_scale, feed_forward, head, read_gating, shared_expert


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of DeepSeek-MoE."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot, interleaved=True)
    return layers(builder, metadata, h, rotation, normalize=False, gating="softmax")


def build_ocr(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of DeepSeek-OCR, for text."""
    rotation = RopeScaling.read(metadata, h).plain().rotation(h.head_dim_k)
    normalize = metadata.flag("expert_weights_norm", False)
    return layers(builder, metadata, h, rotation, normalize, read_gating(metadata, "softmax"))


def layers(
    builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, rotation: Rotation, normalize: bool, gating: Gating
) -> Value:
    """All layers."""
    n_shared = metadata.integer("expert_shared_count", high=MAX_EXPERTS)
    scale = experts_scale(metadata)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block, n_ff_expert = f"blk.{layer}", h.n_ff_expert[layer]
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        if layer < h.n_dense:
            x = builder.add(x, feed_forward(builder, y, block, h.n_ff[layer], "silu"))
            continue
        chosen = experts(builder, h, y, block, n_ff_expert, normalize=normalize, scale=scale, gating=gating)
        x = builder.add(x, builder.add(chosen, shared_expert(builder, y, block, n_ff_expert * n_shared)))
    return head(builder, x, h)
