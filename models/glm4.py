"""GLM-4-0414, GLM-Z1, GLM-4.1V and GLM-OCR: ChatGLM with norms after each part too."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, has_sections
from qrun.models.transformer import attention, head, joined_feed_forward


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    # Of text alone, all sections of a head turn by the same positions: then halves of it turn, else neighbours.
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot, interleaved=not has_sections(metadata))

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        y = attention(builder, h, y, block, h.cache_layer(layer), rotation)
        x = builder.add(x, builder.rms_norm(y, f"{block}.post_attention_norm", h.rms_eps))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        y = joined_feed_forward(builder, y, block, h.n_ff[layer], "silu")
        x = builder.add(x, builder.rms_norm(y, f"{block}.post_ffw_norm", h.rms_eps))
    return head(builder, x, h)
