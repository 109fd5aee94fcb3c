"""LLaDA (arXiv:2502.09992): Llama whose tokens see those behind them too, and which fills in what is masked, in any
order. LLaDA-MoE has experts, and norms of each head's query and key."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import Shares, attention, experts, feed_forward, head


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits. The reference engine adds no biases behind attention, even if a file has some."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot, interleaved=True)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation, bias=False))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        x = builder.add(x, feed_forward(builder, y, block, h.n_ff[layer], "silu", bias=False))
    return head(builder, x, h, bias=False)


def build_experts(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of LLaDA-MoE."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    shares = Shares(normalize=False)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        y = attention(builder, h, y, block, h.cache_layer(layer), rotation, qk_norm="heads", bias=False)
        x = builder.add(x, y)

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        n_ff = h.n_ff_expert[layer] or h.n_ff[layer] // h.n_used
        x = builder.add(x, experts(builder, h, y, block, n_ff, shares=shares))
    return head(builder, x, h, bias=False)
