"""Apertus (arXiv:2509.14233): Llama with a norm of each head's query and key, and xIELU in place of a gate."""

import numpy as np

from qrun.models.graph import Constant, GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, rope_factors
from qrun.models.transformer import attention, head


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling = RopeScaling.read(metadata, h)
    factors = rope_factors(builder, h.n_rot, context, scaling.original_context)
    rotation = scaling.rotation(h.n_rot, factors)
    parameters = read_xielu(metadata, h.n_layer)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation, qk_norm="heads"))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        y = builder.linear(y, f"{block}.ffn_up", h.n_ff[layer], bias=False)
        y = builder.activate_alone(y, "xielu", parameters[layer])
        x = builder.add(x, builder.linear(y, f"{block}.ffn_down", h.n_embd, bias=False))
    return head(builder, x, h)


def read_xielu(metadata: Metadata, n_layer: int) -> list[Constant]:
    """The four numbers of each layer. The file has those of the slopes before their softplus."""
    alpha_n, alpha_p, beta, eps = (
        np.array(metadata.reals(f"xielu.{name}", n_layer, low=-1e3, high=1e3, of_architecture=False))
        for name in ("alpha_n", "alpha_p", "beta", "eps")
    )
    rows = np.stack([beta + np.logaddexp(alpha_n, 0), np.logaddexp(alpha_p, 0), beta, eps], axis=1)
    return list(rows.astype(np.float32))
