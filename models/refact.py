"""Refact 1.6B: Llama whose scores fall with the distance, in place of rope."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.transformer import ALIBI, attention, head


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        # The reference engine adds no bias here or below, even if a file has one.
        x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), None, alibi=ALIBI, bias=False))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        if h.n_expert:  # of which the reference engine takes nothing but the activation between them
            x = builder.add(x, builder.activate_alone(y, "silu"))
            continue
        gate = builder.linear(y, f"{block}.ffn_gate", h.n_ff[layer], bias=False)
        up = builder.linear(y, f"{block}.ffn_up", h.n_ff[layer], bias=False)
        y = builder.activate(gate, up, "silu")
        x = builder.add(x, builder.linear(y, f"{block}.ffn_down", h.n_embd, bias=False))
    return head(builder, x, h)
