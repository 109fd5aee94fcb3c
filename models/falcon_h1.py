"""Falcon-H1 (arXiv:2507.22448): attention and a Mamba-2 mixer side by side. Files have its multipliers folded into
their weights."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.mamba import Mamba2, mamba2
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attention, feed_forward, head


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    sizes = Mamba2.read(metadata)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        attended = attention(builder, h, y, block, h.cache_layer(layer), rotation, bias=False)
        x = builder.add(x, builder.add(attended, mamba2(builder, h, y, block, sizes)))

        # Files name this norm without the usual ending.
        name = f"{block}.ffn_norm" + (".weight" if builder.has(f"{block}.ffn_norm.weight") else "")
        y = builder.rms_norm_with(x, builder.constant(name, h.n_embd), h.rms_eps)
        x = builder.add(x, feed_forward(builder, y, block, h.n_ff[layer], "silu"))
    return head(builder, x, h)
