"""LFM2 and LFM2.5 (Liquid AI, arXiv:2511.23404): most layers are short convolutions between two gates, the others
attention; dense, or with experts that are chosen by biases."""

from dataclasses import replace

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import MAX_TAPS, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import Shares, attention, dense_or_experts, head, read_gating, read_window


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of a dense model."""
    return layers(builder, metadata, replace(h, n_dense=h.n_layer), read_window(metadata))


def build_experts(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of a mixture of experts."""
    return layers(builder, metadata, h, 0)


def layers(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, window: int) -> Value:
    """All of the model. window: of its attention, or 0."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    taps = metadata.integer("shortconv.l_cache", low=2, high=MAX_TAPS)
    shares = Shares(gating=read_gating(metadata, "sigmoid"))

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        if h.n_kv_heads[layer]:
            cache = h.cache_layer(layer, window or None)
            y = attention(builder, h, y, block, cache, rotation, qk_norm="heads")
        else:
            y = short_convolution(builder, h, y, f"{block}.shortconv", taps)
        x = builder.add(x, y)

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        x = builder.add(x, dense_or_experts(builder, h, y, layer, shares, 0))
    return head(builder, x, h, norm="token_embd_norm")


def short_convolution(builder: GraphBuilder, h: Hyperparameters, x: Value, name: str, taps: int) -> Value:
    """A gate, a convolution over a few tokens, and another gate."""
    width = h.n_embd
    both = builder.linear(x, f"{name}.in_proj", 3 * width)
    before, after, x = (builder.slice(both, i * width, width) for i in range(3))
    y = builder.convolution(builder.gate(before, x, "identity"), f"{name}.conv", taps, silu=False)
    return builder.linear(builder.gate(after, y, "identity"), f"{name}.out_proj", width)
