"""Qwen3-Next (2025), and Qwen3.5, 3.6 and 3.8: three layers of four are gated delta nets (arXiv:2412.06464) behind a
convolution over a few tokens; the fourth is attention with a gate on what it gives. Dense, or a mixture of experts
beside one that all tokens share.
"""

import itertools
from collections.abc import Callable

import numpy as np

from qrun.formats.dataclass import dataclass
from qrun.models.graph import Chosen, GateKind, GraphBuilder, Rotation, Value
from qrun.models.hyperparameters import MAX_HEADS, MAX_STATE, MAX_TAPS, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import (
    experts,
    feed_forward,
    head,
    norm_qk,
    recurrent_layers,
    shared_expert,
)

FeedForward = Callable[[GraphBuilder, Hyperparameters, Value, int], Value]


@dataclass(frozen=True)
class DeltaNet:
    """The sizes of a gated delta net: heads of keys and of values, their dimensions, taps of the convolution."""

    n_key_heads: int
    n_heads: int
    dim_k: int
    dim_v: int
    taps: int

    @property
    def key_width(self) -> int:
        """Of all heads of keys."""
        return self.n_key_heads * self.dim_k

    @property
    def width(self) -> int:
        """Of all heads of values."""
        return self.n_heads * self.dim_v

    @classmethod
    def read(cls, metadata: Metadata) -> "DeltaNet":
        """From the keys that Mamba's sizes have."""
        n_key_heads = metadata.integer("ssm.group_count", high=MAX_HEADS)
        n_heads = metadata.integer("ssm.time_step_rank", high=MAX_HEADS)
        if n_heads % n_key_heads:
            raise metadata.error("ssm.group_count", f"is {n_key_heads}, which does not divide {n_heads} heads")
        inner = metadata.integer("ssm.inner_size", high=n_heads * MAX_STATE)
        if inner % n_heads:
            raise metadata.error("ssm.inner_size", f"is {inner}, which {n_heads} heads do not divide")
        dim_k = metadata.integer("ssm.state_size", high=MAX_STATE)
        taps = metadata.integer("ssm.conv_kernel", high=MAX_TAPS)
        return cls(n_key_heads, n_heads, dim_k, inner // n_heads, taps)


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of a dense model."""
    return layers(builder, metadata, h, dense, apart=True)


def build_experts(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of a mixture of experts."""
    return layers(builder, metadata, h, gated_experts(metadata), apart=True)


def build_next(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of Qwen3-Next."""
    return layers(builder, metadata, h, gated_experts(metadata), apart=False)


def build_draft(
    builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int, x: Value, layer: int
) -> Value:
    """A draft layer of a dense model."""
    return draft_block(builder, metadata, h, x, layer, dense)


def build_draft_experts(
    builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int, x: Value, layer: int
) -> Value:
    """A draft layer with a mixture of experts."""
    return draft_block(builder, metadata, h, x, layer, gated_experts(metadata))


def draft_block(
    builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, x: Value, layer: int, network: FeedForward
) -> Value:
    """Draft layers have attention, wherever they stand."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    y = builder.rms_norm(x, f"blk.{layer}.attn_norm", h.rms_eps)
    x = builder.add(x, gated_attention(builder, h, y, layer, rotation))
    y = builder.rms_norm(x, f"blk.{layer}.post_attention_norm", h.rms_eps)
    return builder.add(x, network(builder, h, y, layer))


def layers(
    builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, network: FeedForward, *, apart: bool
) -> Value:
    """All of the model. apart: has the file two matrices for the two gates of a delta net, and value heads in the order
    in which keys repeat? Else one matrix, and value heads that share a key are neighbours."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    net = DeltaNet.read(metadata)
    recurrent = recurrent_layers(metadata, h, period=4)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        if recurrent[layer]:
            y = delta_net(builder, h, y, block, net, apart=apart)
        else:
            y = gated_attention(builder, h, y, layer, rotation)
        x = builder.add(x, y)

        y = builder.rms_norm(x, f"{block}.post_attention_norm", h.rms_eps)
        x = builder.add(x, network(builder, h, y, layer))
    return head(builder, x, h, bias=False)


def gated_attention(
    builder: GraphBuilder, h: Hyperparameters, x: Value, layer: int, rotation: Rotation, chosen: Chosen | None = None
) -> Value:
    """Attention whose matrix of queries makes a gate for each head, too, behind its query."""
    block, cache = f"blk.{layer}", h.cache_layer(layer)
    n_heads, n_kv_heads, dim = cache.n_heads, cache.n_kv_heads, cache.head_dim_k
    if cache.head_dim_v != dim:
        raise h.metadata.error("attention.value_length", f"is {cache.head_dim_v}, expected {dim} as of keys")
    both = builder.linear(x, f"{block}.attn_q", 2 * n_heads * dim)
    k = builder.linear(x, f"{block}.attn_k", n_kv_heads * dim)
    v = builder.linear(x, f"{block}.attn_v", n_kv_heads * cache.head_dim_v)
    q = builder.join(both, range(dim), n_heads)
    gate = builder.join(both, range(dim, 2 * dim), n_heads)
    q, k = norm_qk(builder, h, q, k, block, cache, "heads")
    q, k = builder.rope(q, dim, rotation, query=True), builder.rope(k, dim, rotation)
    y = builder.attention(q, k, v, cache, dim**-0.5, chosen=chosen)
    return builder.linear(builder.gate(gate, y, "sigmoid"), f"{block}.attn_output", h.n_embd)


def delta_net(
    builder: GraphBuilder, h: Hyperparameters, x: Value, block: str, net: DeltaNet, *, apart: bool,
    gate: GateKind = "silu",
) -> Value:
    """A gated delta net of one block. gate: of what it gives."""
    key_width, width = net.key_width, net.width
    qkv, z = projections(builder, x, block, net)
    beta, alpha = gates(builder, x, block, net, apart=apart)
    time = builder.affine(alpha, None, builder.constant(f"{block}.ssm_dt.bias", net.n_heads))
    fading = builder.constant(f"{block}.ssm_a", net.n_heads)
    decay = builder.affine(builder.activate_alone(time, "softplus"), fading, None)

    qkv = builder.convolution(qkv, f"{block}.ssm_conv1d", net.taps)
    # x / sqrt(sum(x * x) + eps), of each head
    unit, eps = np.full(net.dim_k, net.dim_k**-0.5, np.float32), h.rms_eps / net.dim_k
    q = builder.rms_norm_with(builder.slice(qkv, 0, key_width), unit, eps, net.n_key_heads)
    k = builder.rms_norm_with(builder.slice(qkv, key_width, key_width), unit, eps, net.n_key_heads)
    y = builder.linear_attention(
        q, k, builder.slice(qkv, 2 * key_width, width), decay, builder.activate_alone(beta, "sigmoid"),
        n_heads=net.n_heads, n_key_heads=net.n_key_heads, scale=net.dim_k**-0.5, tiled=apart,
    )  # fmt: skip
    y = builder.rms_norm(y, f"{block}.ssm_norm", h.rms_eps, net.n_heads)
    return builder.linear(builder.gate(z, y, gate), f"{block}.ssm_out", h.n_embd)


def projections(builder: GraphBuilder, x: Value, block: str, net: DeltaNet) -> tuple[Value, Value]:
    """What the convolution takes (queries, keys and values), and the gate of the output."""
    key_width, width = net.key_width, net.width
    if builder.has(f"{block}.attn_qkv.weight"):
        qkv = builder.linear(x, f"{block}.attn_qkv", 2 * key_width + width)
        return qkv, builder.linear(x, f"{block}.attn_gate", width)
    # Old files have one matrix, in which all that belongs to a key's head stands together.
    shared = width // net.n_key_heads
    ends = np.cumsum([0, net.dim_k, net.dim_k, shared, shared]).tolist()
    mixed = builder.linear(x, f"{block}.ssm_in", 2 * key_width + 2 * width)
    q, k, v, z = (
        builder.join(mixed, range(start, end), net.n_key_heads) for start, end in itertools.pairwise(ends)
    )
    qk = builder.join(q, range(key_width), 1, k, range(key_width))
    return builder.join(qk, range(2 * key_width), 1, v, range(width)), z


def gates(builder: GraphBuilder, x: Value, block: str, net: DeltaNet, *, apart: bool) -> tuple[Value, Value]:
    """How much of a token each head takes in, and how much it forgets, before their activations."""
    if apart:
        return (
            builder.linear(x, f"{block}.ssm_beta", net.n_heads),
            builder.linear(x, f"{block}.ssm_alpha", net.n_heads),
        )
    both = builder.linear(x, f"{block}.ssm_ba", 2 * net.n_heads)
    shared = net.n_heads // net.n_key_heads
    return (
        builder.join(both, range(shared), net.n_key_heads),
        builder.join(both, range(shared, 2 * shared), net.n_key_heads),
    )


def dense(builder: GraphBuilder, h: Hyperparameters, x: Value, layer: int) -> Value:
    """A plain network."""
    return feed_forward(builder, x, f"blk.{layer}", h.n_ff[layer], "silu")


def gated_experts(metadata: Metadata) -> FeedForward:
    """A mixture of experts, and one for all tokens with a gate of its own."""
    n_ff_shared = metadata.integer("expert_shared_feed_forward_length", 0, low=0)

    def network(builder: GraphBuilder, h: Hyperparameters, x: Value, layer: int) -> Value:
        block = f"blk.{layer}"
        n_ff = h.n_ff_expert[layer] or h.n_ff[layer] // max(h.n_used, 1)
        y = experts(builder, h, x, block, n_ff)
        if not builder.has(f"{block}.ffn_up_shexp.weight"):
            return y
        gate = builder.linear_row(x, f"{block}.ffn_gate_inp_shexp")
        shared = shared_expert(builder, x, block, n_ff_shared or h.n_ff[layer])
        return builder.add(y, builder.gate(gate, shared, "sigmoid"))

    return network
