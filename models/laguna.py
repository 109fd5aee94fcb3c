"""Laguna (Poolside): a gate for each head, or each value, on what attention gives; three layers of four that see a
window, and turn fewer dimensions by a rope of their own; experts chosen by biases beside one that all tokens share."""

from dataclasses import replace

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import MAX_EXPERTS, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, read_base, read_n_rot
from qrun.models.transformer import Shares, attend, dense_or_experts, head, read_window, sliding_layers


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling = RopeScaling.read(metadata, h)
    rotation = scaling.rotation(h.n_rot)
    local_base = read_base(metadata, "rope.freq_base_swa", scaling.base)
    local_n_rot = read_n_rot(metadata, "rope.dimension_count_swa", h)
    local_rotation = replace(scaling.plain(), base=local_base, type="none").rotation(local_n_rot)
    window = read_window(metadata)
    sliding = sliding_layers(metadata, h.n_layer, period=4, full_first=True) if window else (False,) * h.n_layer
    shares = Shares.read(metadata, "sigmoid")
    n_shared = metadata.integer("expert_shared_count", 1, high=MAX_EXPERTS)
    n_ff_shared = metadata.integer("expert_shared_feed_forward_length", 0, low=0) or h.n_ff_expert[0] * n_shared

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        cache = h.cache_layer(layer, window if sliding[layer] else None)
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        width = cache.n_heads * cache.head_dim_v
        of_heads = builder.n_rows(f"{block}.attn_gate.weight") == cache.n_heads
        gate = builder.linear(y, f"{block}.attn_gate", cache.n_heads if of_heads else width)
        y = attend(builder, h, y, block, cache, local_rotation if sliding[layer] else rotation, qk_norm="heads")
        x = builder.add(x, builder.linear(builder.gate(gate, y, "softplus"), f"{block}.attn_output", h.n_embd))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        x = builder.add(x, dense_or_experts(builder, h, y, layer, shares, n_ff_shared))
    return head(builder, x, h)
