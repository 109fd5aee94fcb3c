"""ERNIE 4.5 (Baidu), dense, and PaddleOCR-VL, which reads text with it: Llama."""

from qrun.models.graph import GraphBuilder, Rotation, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attention, feed_forward, head


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of ERNIE 4.5. The reference engine adds no bias behind attention, even if a file has one."""
    return layers(builder, h, RopeScaling.read(metadata, h).rotation(h.n_rot, interleaved=True), attention_bias=False)


def build_paddleocr(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of PaddleOCR-VL: of text alone, all sections of a head turn by the same positions."""
    return layers(builder, h, RopeScaling.read(metadata, h).rotation(h.n_rot), attention_bias=True)


def layers(builder: GraphBuilder, h: Hyperparameters, rotation: Rotation, attention_bias: bool) -> Value:
    """All layers."""
    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation, bias=attention_bias))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        x = builder.add(x, feed_forward(builder, y, block, h.n_ff[layer], "silu"))
    return head(builder, x, h)
