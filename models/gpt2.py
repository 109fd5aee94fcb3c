"""GPT-2, and what has its blocks: layer norms with biases before each part, and GELU without a gate. They differ in how
they know positions: GPT-2 and StarCoder (arXiv:2305.06161) learned a row for each, StarCoder 2 (arXiv:2402.19173) and
CodeShell turn, as the backbone of Pocket TTS does, and in BLOOM (arXiv:2211.05100) scores fall with the distance."""

from qrun.models.graph import GraphBuilder, Rotation, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import ALIBI, attention, layer_norm_head, learned_positions, ungated_feed_forward


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of those with learned positions."""
    positions = learned_positions(builder, h, context)
    x = builder.add(builder.embed("token_embd", h.n_vocab, h.n_embd), positions)
    return layers(builder, h, x)


def build_turning(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of those with rope."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    return layers(builder, h, builder.embed("token_embd", h.n_vocab, h.n_embd), rotation)


def build_pockettts(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of Pocket TTS's backbone, whose neighbours turn together."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot, interleaved=True)
    return layers(builder, h, builder.embed("token_embd", h.n_vocab, h.n_embd), rotation)


def build_bloom(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of BLOOM, which norms its embedding."""
    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    x = builder.layer_norm(x, "token_embd_norm", h.norm_eps)
    return layers(builder, h, x, alibi=ALIBI)


def layers(
    builder: GraphBuilder, h: Hyperparameters, x: Value, rotation: Rotation | None = None,
    alibi: float = 0.0,
) -> Value:  # fmt: skip
    """All layers."""
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.layer_norm(x, f"{block}.attn_norm", h.norm_eps)
        x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation, alibi=alibi))

        y = builder.layer_norm(x, f"{block}.ffn_norm", h.norm_eps)
        x = builder.add(x, ungated_feed_forward(builder, y, block, h.n_ff[layer], "gelu"))
    return layer_norm_head(builder, x, h)
