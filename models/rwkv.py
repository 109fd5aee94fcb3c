"""RWKV 6 and 7 (Peng et al.: arXiv:2404.05892, 2503.14456), and Qwen2 made into either (QRWKV6, ARWKV): no attention,
but heads that each keep a matrix from keys to values, which fades by what the tokens say.

Parts of a block read mixtures of a token's row and the one before it.
"""


import numpy as np

from qrun.formats.dataclass import dataclass
from qrun.models.graph import WKV_MULTIPLE, Constant, GraphBuilder, Value
from qrun.models.hyperparameters import MAX_LAYERS, MAX_STATE, MAX_WIDTH, Hyperparameters, Metadata
from qrun.models.transformer import feed_forward, head, layer_norm_head

GROUP_EPS = 64e-5
UNIT_EPS = 1e-24
SLOWEST = -0.606531
"""The logarithm of what is left of a memory in RWKV 7 where it fades most: -exp(-1/2)."""
PARTS_OF_7, PARTS_OF_6 = 6, 5
"""How many mixtures the time mix of a block reads: for 7 those of the receptance, decay, key, value, learning rate and,
maybe, gate; for 6 those of the decay, key, value, receptance and gate."""


@dataclass(frozen=True)
class Heads:
    """How many there are, and of how many dimensions."""

    count: int
    dim: int

    @classmethod
    def read(cls, metadata: Metadata, h: Hyperparameters) -> "Heads":
        """From the file."""
        dim = metadata.integer("wkv.head_size", high=MAX_STATE)
        if dim % WKV_MULTIPLE or h.n_embd % dim:
            raise metadata.error("wkv.head_size", f"is {dim}, expected a multiple of {WKV_MULTIPLE} in {h.n_embd}")
        return cls(h.n_embd // dim, dim)


def build_7(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of RWKV 7."""
    heads = Heads.read(metadata, h)
    x = builder.layer_norm(builder.embed("token_embd", h.n_vocab, h.n_embd), "token_embd_norm", h.norm_eps)
    first: Value | None = None
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.layer_norm(x, f"{block}.attn_norm", h.norm_eps)
        y, first = time_mix_7(builder, metadata, h, y, block, heads, first)
        x = builder.add(x, y)

        y = builder.layer_norm(x, f"{block}.attn_norm_2", h.norm_eps)
        change = builder.shift(y, -1.0)
        y = channel_mix(builder, h, mixed(builder, y, change, row(builder, f"{block}.channel_mix_lerp_k", h)), layer)
        x = builder.add(x, y)
    return layer_norm_head(builder, x, h)


def build_7_qwen2(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of ARWKV, whose feed-forward networks are those of Qwen2."""
    heads = Heads.read(metadata, h)
    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    first: Value | None = None
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y, first = time_mix_7(
            builder, metadata, h, builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps), block, heads, first
        )
        x = builder.add(x, y)
        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        x = builder.add(x, feed_forward(builder, y, block, h.n_ff[layer], "silu"))
    return head(builder, x, h, bias=False)


def build_6(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of RWKV 6."""
    heads = Heads.read(metadata, h)
    halve_every = metadata.integer("rescale_every_n_layers", 0, low=0, high=MAX_LAYERS)
    x = builder.layer_norm(builder.embed("token_embd", h.n_vocab, h.n_embd), "token_embd_norm", h.norm_eps)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.layer_norm(x, f"{block}.attn_norm", h.norm_eps)
        x = builder.add(x, time_mix_6(builder, metadata, h, y, layer, heads))

        y = builder.layer_norm(x, f"{block}.attn_norm_2", h.norm_eps)
        change = builder.shift(y, -1.0)
        gate = mixed(builder, y, change, row(builder, f"{block}.channel_mix_lerp_r", h))
        gate = builder.linear(gate, f"{block}.channel_mix_receptance", h.n_embd, bias=False)
        y = channel_mix(builder, h, mixed(builder, y, change, row(builder, f"{block}.channel_mix_lerp_k", h)), layer)
        x = builder.add(x, builder.gate(gate, y, "sigmoid"))
        if halve_every and (layer + 1) % halve_every == 0:  # as the file's matrices have it
            x = builder.scale(x, 0.5)
    return layer_norm_head(builder, x, h)


def build_6_qwen2(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of QRWKV6, whose feed-forward networks are those of Qwen2."""
    heads = Heads.read(metadata, h)
    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        x = builder.add(x, time_mix_6(builder, metadata, h, y, layer, heads, with_bonus=False))
        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        x = builder.add(x, feed_forward(builder, y, block, h.n_ff[layer], "silu"))
    return head(builder, x, h, bias=False, norm_bias=True)


def time_mix_7(
    builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, x: Value, block: str, heads: Heads,
    first: Value | None,
) -> tuple[Value, Value]:  # fmt: skip
    """The time mix of a block, and the values of the first one. first: these, of the blocks before."""
    name = f"{block}.time_mix"
    gated = builder.has(f"{name}_g1.weight") and builder.has(f"{name}_g2.weight")
    n_parts = PARTS_OF_7 if builder.count(f"{name}_lerp_fused.weight") == PARTS_OF_7 * h.n_embd else PARTS_OF_7 - 1
    if gated and n_parts < PARTS_OF_7:
        raise builder.error(f"tensor {name}_lerp_fused.weight has nothing for the gate")
    lerp = builder.loose_constant(f"{name}_lerp_fused.weight", n_parts, h.n_embd)
    change = builder.shift(x, -1.0)
    of_r, of_w, of_k, of_v, of_a = (mixed(builder, x, change, part) for part in lerp[:5])
    r, k, v = (
        builder.linear(part, f"{name}_{which}", h.n_embd, bias=False)
        for part, which in ((of_r, "receptance"), (of_k, "key"), (of_v, "value"))
    )
    rank = metadata.integer("attention.decay_lora_rank")
    w = builder.softcap(builder.linear(of_w, f"{name}_w1", rank, bias=False), 1.0)  # tanh
    w = builder.linear(w, f"{name}_w2", h.n_embd, bias=False)
    w = builder.activate_alone(builder.affine(w, None, row(builder, f"{name}_w0", h)), "sigmoid")
    kept = builder.activate_alone(builder.scale(w, SLOWEST), "exp")
    if first is None:
        first = v
    else:
        rank = metadata.integer("attention.value_residual_mix_lora_rank")
        share = narrowed(builder, h, of_v, f"{name}_v", rank)
        v = builder.add(v, builder.gate(share, builder.add(first, builder.scale(v, -1.0)), "sigmoid"))
    rate = narrowed(builder, h, of_a, f"{name}_a", metadata.integer("attention.iclr_lora_rank"))
    rate = builder.activate_alone(rate, "sigmoid")

    unit = np.full(heads.dim, heads.dim**-0.5, np.float32)
    removed = builder.affine(k, row(builder, f"{name}_k_k", h))
    removed = builder.rms_norm_with(removed, unit, UNIT_EPS / heads.dim, heads.count)
    faster = builder.affine(rate, None, np.full(h.n_embd, -1.0, np.float32))
    k = builder.add(k, builder.gate(faster, builder.affine(k, row(builder, f"{name}_k_a", h)), "identity"))
    y = builder.wkv(
        r, kept, k, v, heads.count, builder.scale(removed, -1.0), builder.gate(rate, removed, "identity")
    )
    if builder.has(f"{name}_ln.weight"):
        y = group_norm(builder, y, f"{name}_ln", heads)
    bonus = builder.dot(builder.affine(r, heads_row(builder, f"{name}_r_k", heads)), k, heads.count)
    y = builder.add(y, builder.gate(bonus, v, "identity"))
    if gated:
        rank = metadata.integer("attention.gate_lora_rank")
        g = builder.linear(mixed(builder, x, change, lerp[5]), f"{name}_g1", rank, bias=False)
        g = builder.linear(builder.activate_alone(g, "sigmoid"), f"{name}_g2", h.n_embd, bias=False)
        y = builder.gate(g, y, "identity")
    return builder.linear(y, f"{name}_output", h.n_embd, bias=False), first


def time_mix_6(
    builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, x: Value, layer: int, heads: Heads, *,
    with_bonus: bool = True,
) -> Value:  # fmt: skip
    """The time mix of a block. with_bonus: is a token read by a weight of its own before it goes into the memory?

    Otherwise it is read from the memory as those before it are, and there may be fewer heads of keys and values.
    """
    name = f"blk.{layer}.time_mix"
    change = builder.shift(x, -1.0)
    rank = metadata.integer("time_mix_extra_dim", high=MAX_WIDTH // PARTS_OF_6)
    wishes = mixed(builder, x, change, row(builder, f"{name}_lerp_x", h))
    wishes = builder.softcap(builder.linear(wishes, f"{name}_w1", PARTS_OF_6 * rank, bias=False), 1.0)  # tanh
    wishes = builder.head_linear(wishes, f"{name}_w2", PARTS_OF_6, h.n_embd, rank)
    wishes = builder.affine(wishes, None, lerp_6(builder, name, h))
    of_w, of_k, of_v, of_r, of_g = (
        builder.add(x, builder.gate(builder.slice(wishes, i * h.n_embd, h.n_embd), change, "identity"))
        for i in range(PARTS_OF_6)
    )
    n_kv = h.n_embd if with_bonus else kv_heads(metadata, h, layer, heads) * heads.dim
    r, k, v, g = (
        builder.linear(part, f"{name}_{which}", width)
        for part, which, width in (
            (of_r, "receptance", h.n_embd), (of_k, "key", n_kv), (of_v, "value", n_kv), (of_g, "gate", h.n_embd),
        )
    )  # fmt: skip
    k, v = (repeated(builder, part, heads, h.n_embd // n_kv) for part in (k, v))
    rank = metadata.integer("time_decay_extra_dim")
    w = builder.softcap(builder.linear(of_w, f"{name}_decay_w1", rank, bias=False), 1.0)
    w = builder.linear(w, f"{name}_decay_w2", h.n_embd, bias=False)
    w = builder.activate_alone(builder.affine(w, None, row(builder, f"{name}_decay", h)), "exp")
    kept = builder.activate_alone(builder.scale(w, -1.0), "exp")
    if with_bonus:
        # The memory is asked before the token is in it: as it is behind the row before.
        y = builder.wkv(r, builder.shift(kept), builder.shift(k), builder.shift(v), heads.count)
        bonus = builder.dot(builder.affine(r, heads_row(builder, f"{name}_first", heads)), k, heads.count)
        y = group_norm(builder, builder.add(y, builder.gate(bonus, v, "identity")), f"{name}_ln", heads)
        y = builder.gate(g, y, "silu")
    else:
        faded = builder.affine(kept, np.full(h.n_embd, -1.0, np.float32), np.ones(h.n_embd, np.float32))
        k = builder.gate(faded, k, "identity")
        y = builder.gate(g, builder.wkv(builder.scale(r, heads.dim**-0.5), kept, k, v, heads.count), "sigmoid")
    return builder.linear(y, f"{name}_output", h.n_embd, bias=False)


def channel_mix(builder: GraphBuilder, h: Hyperparameters, x: Value, layer: int) -> Value:
    """What comes behind the time mix of a block."""
    name, n_ff = f"blk.{layer}.channel_mix", h.n_ff[layer]
    if not n_ff:
        raise h.metadata.error("feed_forward_length", "is 0")
    y = builder.activate_alone(builder.linear(x, f"{name}_key", n_ff, bias=False), "relu_squared")
    return builder.linear(y, f"{name}_value", h.n_embd, bias=False)


def row(builder: GraphBuilder, name: str, h: Hyperparameters) -> Constant:
    """A vector of the file."""
    return builder.loose_constant(f"{name}.weight", h.n_embd)


def heads_row(builder: GraphBuilder, name: str, heads: Heads) -> Constant:
    """The same of one that files may have head by head."""
    return builder.loose_constant(f"{name}.weight", heads.count, heads.dim).reshape(-1)


def mixed(builder: GraphBuilder, x: Value, change: Value, weight: Constant) -> Value:
    """A row and what it is to the one before it, by weights."""
    return builder.add(x, builder.affine(change, weight))


def lerp_6(builder: GraphBuilder, name: str, h: Hyperparameters) -> Constant:
    """Weights of all mixtures, side by side. Older files have them apart."""
    if builder.has(f"{name}_lerp_fused.weight"):
        return builder.loose_constant(f"{name}_lerp_fused.weight", PARTS_OF_6, h.n_embd).reshape(-1)
    return np.concatenate([row(builder, f"{name}_lerp_{part}", h) for part in "wkvrg"])


def narrowed(builder: GraphBuilder, h: Hyperparameters, x: Value, name: str, rank: int) -> Value:
    """Through a narrow row, plus a vector."""
    y = builder.linear(builder.linear(x, f"{name}1", rank, bias=False), f"{name}2", h.n_embd, bias=False)
    return builder.affine(y, None, row(builder, f"{name}0", h))


def group_norm(builder: GraphBuilder, x: Value, name: str, heads: Heads) -> Value:
    """A layer norm of each head, with weights of its own."""
    weight, bias = (
        builder.loose_constant(f"{name}.{part}", heads.count, heads.dim) for part in ("weight", "bias")
    )
    return builder.layer_norm_with(x, weight, bias, GROUP_EPS, heads.count)


def kv_heads(metadata: Metadata, h: Hyperparameters, layer: int, heads: Heads) -> int:
    """How many heads of keys and values there are."""
    count = h.n_kv_heads[layer] or heads.count
    if heads.count % count:
        raise metadata.error("attention.head_count_kv", f"is {count}, which does not divide {heads.count} heads")
    return count


def repeated(builder: GraphBuilder, x: Value, heads: Heads, times: int) -> Value:
    """Each head so many times, side by side."""
    count, result = heads.count // times, x
    for i in range(1, times):
        result = builder.join(result, range(i * heads.dim), count, x, range(heads.dim), count)
    return result
