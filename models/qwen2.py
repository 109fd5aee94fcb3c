"""Qwen2 and Qwen2.5 (arXiv:2407.10671, 2412.15115) and openPangu Embedded: Llama with biases on queries, keys and
values. Qwen2-VL and Qwen2.5-VL (arXiv:2409.12191), for text: all sections of a head turn by the same positions."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attention, feed_forward, head, windows


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    return layers(builder, metadata, h, output_bias=True)


def build_vl(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits. The reference engine adds no bias to them, even if a file has one."""
    return layers(builder, metadata, h, output_bias=False)


def layers(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, output_bias: bool) -> Value:
    """All layers."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    window = windows(metadata, h.n_layer)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer, window[layer]), rotation))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        x = builder.add(x, feed_forward(builder, y, block, h.n_ff[layer], "silu"))
    return head(builder, x, h, bias=output_bias)
