"""GPT-NeoX (arXiv:2204.06745), Pythia, RedPajama: attention and a feed-forward network without a gate, each with a norm
of its own, side by side or one after the other."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attention, layer_norm_head, ungated_feed_forward


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    parallel = metadata.flag("use_parallel_residual", True)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.layer_norm(x, f"{block}.attn_norm", h.norm_eps)
        attended = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation))

        y = builder.layer_norm(x if parallel else attended, f"{block}.ffn_norm", h.norm_eps)
        x = builder.add(attended, ungated_feed_forward(builder, y, block, h.n_ff[layer], "gelu"))
    return layer_norm_head(builder, x, h)
