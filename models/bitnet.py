"""BitNet b1.58 (arXiv:2402.17764): a norm before the last matrix of each part, and a scale for each matrix."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attend, head


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        y = attend(builder, h, y, block, h.cache_layer(layer), rotation)
        y = builder.rms_norm(y, f"{block}.attn_sub_norm", h.rms_eps)
        x = builder.add(x, builder.linear(y, f"{block}.attn_output", h.n_embd))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        gate = builder.linear(y, f"{block}.ffn_gate", h.n_ff[layer])
        up = builder.linear(y, f"{block}.ffn_up", h.n_ff[layer])
        y = builder.rms_norm(builder.activate(gate, up, "silu"), f"{block}.ffn_sub_norm", h.rms_eps)
        x = builder.add(x, builder.linear(y, f"{block}.ffn_down", h.n_embd))
    return head(builder, x, h)
