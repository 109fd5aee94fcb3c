"""Multi-head latent attention (DeepSeek V2: arXiv:2405.04434): keys and values come from one short row that all heads
share, and keys have a part besides that turns.

Newer files hold the matrices that make keys and values of a short row apart for each head, so that a head's query can
be turned into one for the short rows instead (the absorbed form): then these rows are all that the cache needs.
"""

from collections.abc import Callable

import numpy as np

from qrun.formats.dataclass import dataclass
from qrun.models.graph import CacheLayer, Chosen, Constant, GraphBuilder, Rotation, Temperature, Value
from qrun.models.hyperparameters import MAX_HEAD_DIM, Hyperparameters, Metadata


@dataclass(frozen=True)
class Latent:
    """Sizes: of the short row (`rank`), and of a head's keys, of which `n_rot` dimensions turn, and values."""

    rank: int
    dim_k: int
    dim_v: int
    n_rot: int
    absorbed: bool

    @classmethod
    def read(cls, metadata: Metadata, h: Hyperparameters, suffix: str = "") -> "Latent":
        """From a file that may hold the matrices apart. suffix: of the keys that have those of some layers."""
        # What the file then calls the size of a head is that of a short row.
        dim_k = metadata.integer(f"attention.key_length_mla{suffix}", 0, low=0, high=MAX_HEAD_DIM)
        if not dim_k:
            return cls.plain(metadata, h)
        dim_v = metadata.integer(f"attention.value_length_mla{suffix}", high=MAX_HEAD_DIM)
        rank = metadata.integer(f"attention.kv_lora_rank{suffix}", high=MAX_HEAD_DIM)
        if dim_k <= h.n_rot:
            raise metadata.error(f"attention.key_length_mla{suffix}", f"is {dim_k}, expected more than {h.n_rot}")
        return cls(rank, dim_k, dim_v, h.n_rot, absorbed=True)

    @classmethod
    def absorbed_only(cls, metadata: Metadata, h: Hyperparameters, suffix: str = "") -> "Latent":
        """From a file that has to hold the matrices apart."""
        metadata.integer(f"attention.key_length_mla{suffix}", high=MAX_HEAD_DIM)
        return cls.read(metadata, h, suffix)

    @classmethod
    def plain(cls, metadata: Metadata, h: Hyperparameters) -> "Latent":
        """From a file that has one matrix for all heads."""
        if h.head_dim_k <= h.n_rot:
            raise metadata.error("rope.dimension_count", f"is {h.n_rot}, expected less than {h.head_dim_k}")
        rank = metadata.integer("attention.kv_lora_rank", high=MAX_HEAD_DIM)
        return cls(rank, h.head_dim_k, h.head_dim_v, h.n_rot, absorbed=False)


def attend(
    builder: GraphBuilder,
    h: Hyperparameters,
    x: Value,
    layer: int,
    sizes: Latent,
    rotation: Rotation | None,
    *,
    scale: float = 1.0,
    temperature: Temperature | None = None,
    window: int | None = None,
    sinks: Constant | None = None,
    norm_turned: bool = False,
    precise: bool = False,
    choose: Callable[[Value], Chosen] | None = None,
) -> Value:
    """Latent attention of one block, up to its output matrix: all heads' values.

    rotation: None turns nothing. scale: beside 1 / sqrt(dim_k). norm_turned: are keys normed before they turn?
    precise: as in `CacheLayer`. choose: from the short row of queries to what rows see in a long context.
    """
    block, n_heads, rank, n_rot = f"blk.{layer}", h.n_heads[layer], sizes.rank, sizes.n_rot
    dim_k, dim_v, plain = sizes.dim_k, sizes.dim_v, sizes.dim_k - sizes.n_rot

    chosen = None
    if choose is None and builder.has(f"{block}.attn_q.weight"):
        q = builder.linear(x, f"{block}.attn_q", n_heads * dim_k)
    else:
        q = builder.linear(x, f"{block}.attn_q_a", h.metadata.integer("attention.q_lora_rank"))
        q = builder.rms_norm(q, f"{block}.attn_q_a_norm", h.rms_eps)
        chosen = None if choose is None else choose(q)
        q = builder.linear(q, f"{block}.attn_q_b", n_heads * dim_k)
    both = builder.linear(x, f"{block}.attn_kv_a_mqa", rank + n_rot)
    short = builder.rms_norm(builder.slice(both, 0, rank), f"{block}.attn_kv_a_norm", h.rms_eps)
    if n_rot == 0:
        return attend_still(
            builder, h, q, short, layer, sizes, scale=scale, window=window, sinks=sinks, precise=precise, chosen=chosen
        )
    turned = builder.slice(both, rank, n_rot)
    if norm_turned:
        turned = builder.rms_norm(turned, f"{block}.attn_k_norm", h.rms_eps)
    if rotation is not None:
        q = builder.rope(q, dim_k, rotation, start=plain)
        turned = builder.rope(turned, n_rot, rotation)

    if sizes.absorbed:
        cache = CacheLayer(n_heads, 1, rank + n_rot, rank, window, values_in_keys=True, precise=precise)
        asked = builder.head_linear(q, f"{block}.attn_k_b", n_heads, rank, plain)
        q = builder.join(asked, range(rank), n_heads, q, range(plain, dim_k), n_heads)
        k, v = builder.join(short, range(rank), 1, turned, range(n_rot)), None
    else:
        cache = CacheLayer(n_heads, n_heads, dim_k, dim_v, window, precise=precise)
        kv = builder.linear(short, f"{block}.attn_kv_b", n_heads * (plain + dim_v))
        k = builder.join(kv, range(plain), n_heads, turned, range(n_rot))
        v = builder.join(kv, range(plain, plain + dim_v), n_heads)
    if temperature is not None:  # heads that turn by nothing, and grow
        still = Rotation(np.zeros(cache.head_dim_k // 2, np.float32), 1.0, False, temperature)
        q = builder.rope(q, cache.head_dim_k, still, query=True)
    y = builder.attention(q, k, v, cache, scale * dim_k**-0.5, sinks=sinks, chosen=chosen)
    return builder.head_linear(y, f"{block}.attn_v_b", n_heads, dim_v, rank) if sizes.absorbed else y


def attend_still(
    builder: GraphBuilder,
    h: Hyperparameters,
    q: Value,
    short: Value,
    layer: int,
    sizes: Latent,
    *,
    scale: float,
    window: int | None,
    sinks: Constant | None,
    precise: bool,
    chosen: Chosen | None,
) -> Value:
    """The same of queries and short rows of a model without a part that turns."""
    block, n_heads, rank = f"blk.{layer}", h.n_heads[layer], sizes.rank
    if not sizes.absorbed:
        raise h.metadata.error("attention.key_length_mla", "is missing")
    cache = CacheLayer(n_heads, 1, rank, rank, window, values_in_keys=True, precise=precise)
    asked = builder.head_linear(q, f"{block}.attn_k_b", n_heads, rank, sizes.dim_k)
    y = builder.attention(asked, short, None, cache, scale * sizes.dim_k**-0.5, sinks=sinks, chosen=chosen)
    return builder.head_linear(y, f"{block}.attn_v_b", n_heads, sizes.dim_v, rank)
