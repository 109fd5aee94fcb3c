"""Trinity (Arcee): Gemma 2's norms and windows, a gate on what attention gives, a fourth layer without positions, and
experts chosen by biases beside one that all tokens share."""

from math import sqrt

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import MAX_EXPERTS, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, read_base
from qrun.models.transformer import Shares, attend, dense_or_experts, head, read_window, sliding_layers

NOPE_PERIOD = 4


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling = RopeScaling.read(metadata, h)
    rotation = scaling.rotation(h.n_rot)
    local_base = read_base(metadata, "rope.freq_base_swa", scaling.base)
    local_rotation = scaling.of_windows(local_base).rotation(h.n_rot)
    window = read_window(metadata)
    sliding = sliding_layers(metadata, h.n_layer, period=4) if window else (False,) * h.n_layer
    shares = Shares.read(metadata, "sigmoid")
    n_shared = metadata.integer("expert_shared_count", 0, low=0, high=MAX_EXPERTS)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd, scale=sqrt(h.n_embd))
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        cache = h.cache_layer(layer, window if sliding[layer] else None)
        turn = local_rotation if sliding[layer] else rotation
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        gate = builder.linear(y, f"{block}.attn_gate", cache.n_heads * cache.head_dim_v)
        y = attend(builder, h, y, block, cache, turn if (layer + 1) % NOPE_PERIOD else None, qk_norm="heads")
        y = builder.linear(builder.gate(gate, y, "sigmoid"), f"{block}.attn_output", h.n_embd)
        x = builder.add(x, builder.rms_norm(y, f"{block}.post_attention_norm", h.rms_eps))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        y = dense_or_experts(builder, h, y, layer, shares, h.n_ff_expert[layer] * n_shared)
        x = builder.add(x, builder.rms_norm(y, f"{block}.post_ffw_norm", h.rms_eps))
    return head(builder, x, h)
