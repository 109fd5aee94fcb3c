"""K-EXAONE: EXAONE 4's windows with norms before each part, and experts beside one that all tokens share."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import MAX_CONTEXT, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, rope_factors
from qrun.models.transformer import Shares, attention, dense_or_experts, head, sliding_layers


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling = RopeScaling.read(metadata, h)
    factors = rope_factors(builder, h.n_rot, context, scaling.original_context)
    rotation = scaling.rotation(h.n_rot, factors)
    window = metadata.integer("attention.sliding_window", high=MAX_CONTEXT)
    sliding = sliding_layers(metadata, h.n_layer, period=4)
    shares = Shares.read(metadata, "sigmoid")
    n_ff_shared = metadata.integer("expert_shared_feed_forward_length", 0, low=0)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        cache = h.cache_layer(layer, window if sliding[layer] else None)
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        turn = rotation if sliding[layer] else None
        x = builder.add(x, attention(builder, h, y, block, cache, turn, qk_norm="heads"))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        x = builder.add(x, dense_or_experts(builder, h, y, layer, shares, n_ff_shared or h.n_ff_expert[layer]))
    return head(builder, x, h)
