"""gpt-oss (OpenAI, arXiv:2508.10925): every second layer sees a window, each head has a sink, and experts have biases
and a SwiGLU of their own."""

from dataclasses import replace

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import MAX_CONTEXT, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, read_base
from qrun.models.transformer import Shares, attention, experts, head, sliding_layers


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling = RopeScaling.read(metadata, h)
    rotation = scaling.rotation(h.n_rot)
    local_base = read_base(metadata, "rope.freq_base_swa", scaling.base)
    local_rotation = replace(scaling, base=local_base).rotation(h.n_rot)
    window = metadata.integer("attention.sliding_window", high=MAX_CONTEXT)
    sliding = sliding_layers(metadata, h.n_layer, period=2)
    shares = Shares(normalize=False, gating="softmax_of_chosen")

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        cache = h.cache_layer(layer, window if sliding[layer] else None)
        turn = local_rotation if sliding[layer] else rotation
        sinks = builder.constant(f"{block}.attn_sinks.weight", cache.n_heads)
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        y = attention(builder, h, y, block, cache, turn, scale=h.n_rot**-0.5, sinks=sinks)
        x = builder.add(x, y)

        y = builder.rms_norm(x, f"{block}.post_attention_norm", h.rms_eps)
        x = builder.add(x, experts(builder, h, y, block, h.n_ff_expert[layer], "swiglu_oai", shares))
    return head(builder, x, h)
