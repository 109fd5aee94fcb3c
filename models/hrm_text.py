"""HRM-Text (arXiv:2506.21734, as a language model): two stacks of layers take turns, a low one several times and then a
high one, and this for several cycles. Each turn has a cache of its own; norms have no weights."""

from dataclasses import replace

from qrun.models.graph import GraphBuilder, Rotation, Value
from qrun.models.hyperparameters import MAX_LAYERS, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attend, feed_forward, output


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    n_stack = metadata.integer("hrm.layers_per_stack", high=MAX_LAYERS)
    n_high = metadata.integer("hrm.h_cycles", high=MAX_LAYERS)
    n_low = metadata.integer("hrm.l_cycles", high=MAX_LAYERS)
    n_layer = n_stack * n_high * (n_low + 1)
    if h.n_layer != n_layer:
        raise metadata.error("block_count", f"is {h.n_layer}, but all turns of the stacks have {n_layer} layers")
    embedding_scale = metadata.real("embedding_scale", 0.0, low=-1e6, high=1e6) or 1.0

    high = builder.embed("token_embd", h.n_vocab, h.n_embd, embedding_scale)
    start = builder.constant("hrm.z_l_init", h.n_embd)
    low: Value | None = None
    for _ in range(n_high):
        for _ in range(n_low):
            both = builder.affine(high, None, start) if low is None else builder.add(high, low)
            low = stack(builder, h, both, range(n_stack), rotation)
        assert low is not None
        high = stack(builder, h, builder.add(high, low), range(n_stack, 2 * n_stack), rotation)
    x = builder.select_rows(high)
    return output(builder, x, h)


def stack(builder: GraphBuilder, h: Hyperparameters, x: Value, blocks: range, rotation: Rotation) -> Value:
    """One turn of a stack."""
    for number in blocks:
        block = f"blk.{number}"
        y = builder.rms_norm_with(x, None, h.rms_eps)
        gate = builder.linear(y, f"{block}.attn_gate", h.n_heads[0] * h.head_dim_v)
        # Each turn makes small differences larger: with half precision, logits would be off by a hundredth.
        y = attend(builder, h, y, block, replace(h.cache_layer(0), precise=True), rotation)
        y = builder.gate(gate, y, "sigmoid")
        x = builder.add(x, builder.linear(y, f"{block}.attn_output", h.n_embd))

        y = builder.rms_norm_with(x, None, h.rms_eps)
        x = builder.add(x, feed_forward(builder, y, block, h.n_ff[0], "silu"))
    return builder.rms_norm_with(x, None, h.rms_eps)
