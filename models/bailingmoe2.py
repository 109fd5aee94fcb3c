"""Ling and Ring 2.0 (arXiv:2510.22115), and dots.llm1 (arXiv:2506.05767): a norm of each head's query and key, dense
layers first, and then experts, chosen by biases and within groups, beside one that all tokens share."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import MAX_EXPERTS, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import Shares, attention, dense_or_experts, head


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    shares = Shares.read(metadata, "sigmoid")
    n_shared = metadata.integer("expert_shared_count", high=MAX_EXPERTS)
    n_ff_shared = metadata.integer("expert_shared_feed_forward_length", 0, low=0)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation, qk_norm="heads"))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        n_ff = (n_ff_shared or h.n_ff_expert[layer]) * n_shared
        x = builder.add(x, dense_or_experts(builder, h, y, layer, shares, n_ff))
    return head(builder, x, h)
