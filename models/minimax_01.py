"""MiniMax-Text-01 and M1 (arXiv:2501.08313): seven layers of eight are lightning attention, whose heads forget at paces
of their own; what is added to a part is not its input, but the norm of that. Every layer has experts."""

import numpy as np

from qrun.models.graph import Constant, GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attention, experts, head, recurrent_layers


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    residual_scale = metadata.real("residual_scale")
    recurrent = recurrent_layers(metadata, h, period=8)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        if recurrent[layer]:
            z = lightning_attention(builder, h, y, layer)
        else:
            z = attention(builder, h, y, block, h.cache_layer(layer), rotation)
        x = builder.add(z, builder.scale(y, residual_scale))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        z = experts(builder, h, y, block, h.n_ff[layer])
        x = builder.add(z, builder.scale(y, residual_scale))
    return head(builder, x, h)


def lightning_attention(builder: GraphBuilder, h: Hyperparameters, x: Value, layer: int) -> Value:
    """Linear attention of one block (arXiv:2401.04658), normed and gated."""
    block, n_heads, dim = f"blk.{layer}", h.n_heads[layer], h.head_dim_k
    width = n_heads * dim
    qkv = builder.activate_alone(builder.linear(x, f"{block}.attn_qkv", 3 * width), "silu")
    q, k, v = (builder.join(qkv, range(i * dim, (i + 1) * dim), n_heads) for i in range(3))
    decay = head_decays(n_heads, layer, h.n_layer)
    y = builder.linear_attention(q, k, v, decay, None, n_heads=n_heads, n_key_heads=n_heads, scale=1.0)
    y = builder.rms_norm(y, f"{block}.attn_norm_2", h.rms_eps)
    gate = builder.linear(x, f"{block}.attn_gate", width)
    return builder.linear(builder.gate(gate, y, "sigmoid"), f"{block}.attn_output", h.n_embd)


def head_decays(n_heads: int, layer: int, n_layer: int) -> Constant:
    """How fast each head forgets: a geometric series over the heads, slower from layer to layer."""
    start = 2.0 ** -(2.0 ** (3.0 - np.log2(n_heads)))
    of_layer = 1.0 - layer / max(n_layer - 1, 1) + 1e-5
    return (-(start ** np.arange(1, n_heads + 1)) * of_layer).astype(np.float32)
