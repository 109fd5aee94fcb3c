"""MiniMax M3: gpt-oss's SwiGLU in all networks, experts chosen by biases beside one that all tokens share, and
attention to the best blocks of a long context alone."""

from dataclasses import replace

from qrun.models.graph import Chosen, GraphBuilder, Index, Rotation, Value
from qrun.models.hyperparameters import MAX_CONTEXT, MAX_EXPERTS, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.sparse_index import read_index
from qrun.models.transformer import Shares, attention, dense_or_experts, head


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    index = read_blocks(metadata, h, context)
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    shares = Shares.read(metadata, "sigmoid")
    n_shared = metadata.integer("expert_shared_count", high=MAX_EXPERTS)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        chosen = None
        if index is not None and layer >= h.n_dense:
            chosen = choose(builder, h, y, block, index, rotation)
        y = attention(builder, h, y, block, h.cache_layer(layer), rotation, qk_norm="heads", chosen=chosen)
        x = builder.add(x, y)

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        n_ff_shared = h.n_ff_expert[layer] * n_shared
        x = builder.add(x, dense_or_experts(builder, h, y, layer, shares, n_ff_shared, kind="swiglu_oai"))
    return head(builder, x, h)


def read_blocks(metadata: Metadata, h: Hyperparameters, context: int) -> Index | None:
    """What chooses blocks of positions for each head of keys and values, or None if all are seen."""
    size = metadata.integer("attention.indexer.block_size", high=MAX_CONTEXT)
    index = read_index(metadata, context, h.n_rot, block=size)
    if index is None:
        return None
    if set(h.n_kv_heads[h.n_dense :]) - {index.n_heads}:
        raise metadata.error("attention.indexer.head_count", f"is {index.n_heads}, expected one for each head of keys")
    n_local = metadata.integer("attention.indexer.local_blocks", low=0, high=index.budget)
    return replace(index, n_local=n_local, n_groups=index.n_heads, clipped=False)


def choose(
    builder: GraphBuilder, h: Hyperparameters, x: Value, block: str, index: Index, rotation: Rotation
) -> Chosen:
    """What rows of a layer attend to."""
    q, k = (
        builder.linear(x, f"{block}.indexer.{part}_proj", n_heads * index.dim, bias=False)
        for part, n_heads in (("q", index.n_heads), ("k", 1))
    )
    q = builder.rms_norm(q, f"{block}.indexer.q_norm", h.rms_eps, index.n_heads)
    k = builder.rms_norm(k, f"{block}.indexer.k_norm", h.rms_eps)
    q, k = (builder.rope(part, index.dim, rotation) for part in (q, k))
    return builder.choose(q, k, None, index)
