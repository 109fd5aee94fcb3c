"""BitNet b1.58 (arXiv:2402.17764, 2504.12285): Llama whose weights are -1, 0 or 1 times a scale, with norms before the
output matrices of attention and of the feed-forward network too."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attend


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block, n_ff = f"blk.{layer}", h.n_ff[layer]
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        y = attend(builder, h, y, block, h.cache_layer(layer), rotation)
        y = builder.rms_norm(y, f"{block}.attn_sub_norm", h.rms_eps)
        x = builder.add(x, builder.linear(y, f"{block}.attn_output", h.n_embd, bias=False))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        gate, up = (builder.linear(y, f"{block}.ffn_{name}", n_ff, bias=False) for name in ("gate", "up"))
        y = builder.rms_norm(builder.activate(gate, up, "silu"), f"{block}.ffn_sub_norm", h.rms_eps)
        x = builder.add(x, builder.linear(y, f"{block}.ffn_down", h.n_embd, bias=False))
    x = builder.rms_norm(builder.select_rows(x), "output_norm", h.rms_eps)
    return builder.linear(x, "token_embd", h.n_vocab)
