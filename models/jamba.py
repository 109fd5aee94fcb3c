"""Jamba (arXiv:2403.19887): Mamba mixers, between them attention whose heads do not turn, and behind either a
feed-forward network, which may be a mixture of experts."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.mamba import Mamba, mamba
from qrun.models.transformer import Shares, attention, experts, feed_forward, head, read_experts_scale


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    sizes = Mamba.read(metadata)
    shares = Shares(normalize=False, scale=read_experts_scale(metadata))

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        if h.n_kv_heads[layer]:
            y = attention(builder, h, y, block, h.cache_layer(layer), None)
        else:
            y = mamba(builder, h, y, block, sizes)
        x = builder.add(x, y)

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        if builder.has(f"{block}.ffn_gate_inp.weight"):
            y = experts(builder, h, y, block, h.n_ff[layer], shares=shares)
        else:
            y = feed_forward(builder, y, block, h.n_ff[layer], "silu")
        x = builder.add(x, y)
    return head(builder, x, h)
