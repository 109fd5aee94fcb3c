"""Kimi Linear (arXiv:2510.26692): three layers of four are Kimi delta attention, a delta net whose keys fade dimension
by dimension, behind convolutions; the others are multi-head latent attention without positions. Experts, chosen by
biases, lie beside one that all tokens share."""

import numpy as np

from qrun.models import latent_attention
from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import MAX_EXPERTS, MAX_STATE, MAX_TAPS, Hyperparameters, Metadata
from qrun.models.latent_attention import Latent
from qrun.models.transformer import Shares, dense_or_experts, head


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    n_shared = metadata.integer("expert_shared_count", high=MAX_EXPERTS)
    shares = Shares.read(metadata, "sigmoid", normalize=True)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        if h.n_kv_heads[layer]:
            sizes = Latent.read(metadata, h) if is_absorbed(builder, block) else Latent.plain(metadata, h)
            y = latent_attention.attend(builder, h, y, layer, sizes, None)
            y = builder.linear(y, f"{block}.attn_output", h.n_embd)
        else:
            y = delta_attention(builder, metadata, h, y, layer)
        x = builder.add(x, y)

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        x = builder.add(x, dense_or_experts(builder, h, y, layer, shares, h.n_ff_expert[layer] * n_shared))
    return head(builder, x, h)


def is_absorbed(builder: GraphBuilder, block: str) -> bool:
    """Are the matrices that make keys and values of a short row apart for each head?"""
    return not builder.has(f"{block}.attn_kv_b.weight")


def delta_attention(
    builder: GraphBuilder,
    metadata: Metadata,
    h: Hyperparameters,
    x: Value,
    layer: int,
    lower_bound: float | None = None,
    *,
    negated: bool = False,
    unit_eps: float | None = None,
) -> Value:
    """Kimi delta attention of one block. lower_bound: of decays, where they are that times a sigmoid.

    negated: are the factors in the sigmoid those of the file times -1? unit_eps: what is added to squared lengths.
    """
    block, n_heads = f"blk.{layer}", h.n_heads[layer]
    dim = metadata.integer("kda.head_dim", high=MAX_STATE)
    taps = metadata.integer("ssm.conv_kernel", high=MAX_TAPS)
    width = n_heads * dim

    # The reference engine leaves biases of these out that a file may have.
    projected = (builder.linear(x, f"{block}.attn_{name}", width, bias=False) for name in "qkv")
    q, k, v = (
        builder.convolution(part, f"{block}.ssm_conv1d_{name}", taps)
        for name, part in zip("qkv", projected, strict=True)
    )
    # x / sqrt(sum(x * x) + eps), of each head
    unit, eps = np.full(dim, dim**-0.5, np.float32), (h.rms_eps if unit_eps is None else unit_eps) / dim
    q, k = (builder.rms_norm_with(part, unit, eps, n_heads) for part in (q, k))

    fading = np.repeat(builder.loose_constant(f"{block}.ssm_a", n_heads), dim)
    time = narrowed(builder, x, f"{block}.ssm_f", width)
    time = builder.affine(time, None, builder.constant(f"{block}.ssm_dt.bias", width))
    if lower_bound is None:
        decay = builder.affine(builder.activate_alone(time, "softplus"), fading, None)
    else:
        time = builder.affine(time, -fading if negated else fading, None)
        decay = builder.scale(builder.activate_alone(time, "sigmoid"), lower_bound)
    beta = builder.activate_alone(builder.linear(x, f"{block}.ssm_beta", n_heads), "sigmoid")
    y = builder.linear_attention(q, k, v, decay, beta, n_heads=n_heads, n_key_heads=n_heads, scale=dim**-0.5)
    y = builder.rms_norm(y, f"{block}.ssm_norm", h.rms_eps, n_heads)
    gate = narrowed(builder, x, f"{block}.ssm_g", width)
    return builder.linear(builder.gate(gate, y, "sigmoid"), f"{block}.attn_output", h.n_embd)


def narrowed(builder: GraphBuilder, x: Value, name: str, width: int) -> Value:
    """A matrix, which the file may have as the product of two, through a narrow row."""
    if builder.has(f"{name}.weight"):
        return builder.linear(x, name, width)
    if not builder.has(f"{name}_b.weight"):
        return builder.linear(x, f"{name}_a", width)
    narrow = builder.linear(x, f"{name}_a", builder.n_rows(f"{name}_a.weight"))
    return builder.linear(narrow, f"{name}_b", width)
