"""Mamba (arXiv:2312.00752), Falcon-Mamba, and Mamba-2 (arXiv:2405.21060): nothing but layers whose state fades by how
much of a token they take in. Other models have such mixers beside attention."""


import numpy as np

from qrun.formats.dataclass import dataclass
from qrun.models.graph import Constant, GraphBuilder, Value
from qrun.models.hyperparameters import MAX_HEADS, MAX_STATE, MAX_TAPS, Hyperparameters, Metadata
from qrun.models.transformer import head


@dataclass(frozen=True)
class Mamba:
    """The sizes of a Mamba mixer: channels, numbers in the state of each, of the projection that the time steps come
    from, and taps of the convolution. With normed, time steps, B and C get a norm that has no weight."""

    width: int
    state: int
    rank: int
    taps: int
    normed: bool

    @classmethod
    def read(cls, metadata: Metadata) -> "Mamba":
        """From the file's metadata."""
        return cls(
            width=metadata.integer("ssm.inner_size"),
            state=metadata.integer("ssm.state_size", high=MAX_STATE),
            rank=metadata.integer("ssm.time_step_rank"),
            taps=metadata.integer("ssm.conv_kernel", high=MAX_TAPS),
            normed=metadata.architecture == "mamba" and metadata.flag("ssm.dt_b_c_rms", False),
        )


@dataclass(frozen=True)
class Mamba2:
    """The sizes of a Mamba-2 mixer: heads, groups of heads that share B and C, channels of a head, numbers in the state
    of each channel, and taps of the convolution."""

    n_heads: int
    n_groups: int
    dim: int
    state: int
    taps: int

    @property
    def width(self) -> int:
        """Channels of all heads."""
        return self.n_heads * self.dim

    @classmethod
    def read(cls, metadata: Metadata, n_groups: int | None = None) -> "Mamba2":
        """From the file's metadata. n_groups: of an architecture that does not read them from there."""
        n_heads = metadata.integer("ssm.time_step_rank", high=MAX_HEADS)
        n_groups = n_groups or metadata.integer("ssm.group_count", high=MAX_HEADS)
        if n_heads % n_groups:
            raise metadata.error("ssm.group_count", f"is {n_groups}, which does not divide {n_heads} heads")
        width = metadata.integer("ssm.inner_size")
        if width % n_heads:
            raise metadata.error("ssm.inner_size", f"is {width}, which is not a multiple of {n_heads} heads")
        if width // n_heads > MAX_STATE:
            raise metadata.error("ssm.inner_size", f"is {width}: heads of more than {MAX_STATE} are not supported")
        return cls(
            n_heads=n_heads,
            n_groups=n_groups,
            dim=width // n_heads,
            state=metadata.integer("ssm.state_size", high=MAX_STATE),
            taps=metadata.integer("ssm.conv_kernel", high=MAX_TAPS),
        )


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of Mamba."""
    sizes = Mamba.read(metadata)
    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        y = builder.rms_norm(x, f"blk.{layer}.attn_norm", h.rms_eps)
        x = builder.add(x, mamba(builder, h, y, f"blk.{layer}", sizes))
    return head(builder, x, h)


def build_2(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of Mamba-2."""
    sizes = Mamba2.read(metadata)
    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        y = builder.rms_norm(x, f"blk.{layer}.attn_norm", h.rms_eps)
        x = builder.add(x, mamba2(builder, h, y, f"blk.{layer}", sizes))
    return head(builder, x, h)


def mamba(builder: GraphBuilder, h: Hyperparameters, x: Value, block: str, sizes: Mamba) -> Value:
    """The Mamba mixer of one block. Time steps, B and C have norms where the file has their weights."""
    both = builder.linear(x, f"{block}.ssm_in", 2 * sizes.width)
    z = builder.slice(both, sizes.width, sizes.width)
    x = builder.convolution(builder.slice(both, 0, sizes.width), f"{block}.ssm_conv1d", sizes.taps)

    parts = builder.linear(x, f"{block}.ssm_x", sizes.rank + 2 * sizes.state)
    time = builder.slice(parts, 0, sizes.rank)
    b = builder.slice(parts, sizes.rank, sizes.state)
    c = builder.slice(parts, sizes.rank + sizes.state, sizes.state)
    if sizes.normed or builder.has(f"{block}.ssm_dt_norm.weight"):
        weighted = not sizes.normed
        time, b, c = (
            builder.rms_norm(part, f"{block}.{name}", h.rms_eps) if weighted
            else builder.rms_norm_with(part, None, h.rms_eps)
            for part, name in ((time, "ssm_dt_norm"), (b, "ssm_b_norm"), (c, "ssm_c_norm"))
        )  # fmt: skip
    time = builder.activate_alone(builder.linear(time, f"{block}.ssm_dt", sizes.width), "softplus")
    fading = builder.constant(f"{block}.ssm_a", sizes.width, sizes.state)
    y = builder.selective_scan(x, time, b, c, fading, builder.constant(f"{block}.ssm_d", sizes.width))
    return builder.linear(builder.gate(z, y, "silu"), f"{block}.ssm_out", h.n_embd)


def mamba2(builder: GraphBuilder, h: Hyperparameters, x: Value, block: str, sizes: Mamba2) -> Value:
    """The Mamba-2 mixer of one block. The norm of its groups may be missing."""
    width, shared = sizes.width, sizes.n_groups * sizes.state
    mixed = builder.linear(x, f"{block}.ssm_in", 2 * width + 2 * shared + sizes.n_heads)
    z = builder.slice(mixed, 0, width)
    time = builder.slice(mixed, 2 * width + 2 * shared, sizes.n_heads)
    x = builder.convolution(builder.slice(mixed, width, width + 2 * shared), f"{block}.ssm_conv1d", sizes.taps)
    x, b, c = (builder.slice(x, 0, width), builder.slice(x, width, shared), builder.slice(x, width + shared, shared))

    time = builder.affine(time, None, builder.constant(f"{block}.ssm_dt.bias", sizes.n_heads))
    fading = builder.constant(f"{block}.ssm_a", sizes.n_heads, 1).reshape(-1)
    kept = builder.constant(f"{block}.ssm_d", sizes.n_heads, 1).reshape(-1)
    y = builder.gate(z, scan_heads(builder, x, time, b, c, fading, kept, sizes), "silu")
    if builder.has(f"{block}.ssm_norm.weight"):
        weight = builder.constant(f"{block}.ssm_norm.weight", sizes.n_groups, width // sizes.n_groups)
        y = builder.rms_norm_with(y, weight, h.rms_eps, sizes.n_groups)
    return builder.linear(y, f"{block}.ssm_out", h.n_embd)


def scan_heads(
    builder: GraphBuilder, x: Value, time: Value, b: Value, c: Value, fading: Constant, kept: Constant, sizes: Mamba2
) -> Value:
    """What the heads of a Mamba-2 mixer make of their channels, which is linear attention: the values are x times the
    time step, which goes through softplus, B are the keys and C the queries. Of x itself, each head keeps some."""
    decay = builder.affine(builder.activate_alone(time, "softplus"), fading, None)
    y = builder.linear_attention(
        c, b, builder.gate(time, x, "softplus"), decay, None, n_heads=sizes.n_heads, n_key_heads=sizes.n_groups,
        scale=1.0,
    )  # fmt: skip
    return builder.add(y, builder.affine(x, np.repeat(kept, sizes.dim), None))
