"""T5 (arXiv:1910.10683), Flan-T5, mT5, UMT5 and MADLAD: an encoder reads a text, and a decoder writes the answer.

Scores get a bias for how far behind the query a key is, which is all that layers know of positions, and no scale."""

from dataclasses import replace

import numpy as np

from qrun.models.graph import CacheLayer, Constant, GraphBuilder, Side, Value
from qrun.models.hyperparameters import MAX_LAYERS, Hyperparameters, Metadata
from qrun.models.transformer import feed_forward, output, project_qkv, ungated_feed_forward

FARTHEST = 128
"""From this distance on all have the same bias."""


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids of an answer, from the token with which answers begin on, to logits; with the graph of the encoder."""
    n_layer = metadata.integer("decoder_block_count", 0, low=0, high=MAX_LAYERS) or h.n_layer
    blocks = [min(layer, h.n_layer - 1) for layer in range(n_layer)]  # whose sizes a layer has
    text = [replace(h.cache_layer(block), causal=True, precise=True) for block in blocks]
    encoder = builder.beside()
    rows = encoder.rms_norm(encode(encoder, h, "encoder"), "enc.output_norm", h.rms_eps)
    of_source = [keep(encoder, rows, layer, source_layer(h, blocks[layer], "source")) for layer in range(n_layer)]
    builder.encoder = encoder.finish(metadata.architecture, rows, h.n_embd, h.context_length, context)
    builder.start = max(metadata.integer("decoder_start_token_id", 0, low=-1, high=h.n_vocab - 1), 0)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(n_layer):
        block, cache = f"dec.blk.{layer}", text[layer]
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        q, k, v = project_qkv(builder, y, block, cache)
        y = builder.attention(q, k, v, cache, 1.0, biases=biases(builder, h, "dec", layer, both_ways=False))
        x = builder.add(x, builder.linear(y, f"{block}.attn_o", h.n_embd))

        y = builder.rms_norm(x, f"{block}.cross_attn_norm", h.rms_eps)
        q = builder.linear(y, f"{block}.cross_attn_q", cache.n_heads * cache.head_dim_k)
        y = builder.shared_attention(q, of_source[layer], 1.0)
        x = builder.add(x, builder.linear(y, f"{block}.cross_attn_o", h.n_embd))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        x = builder.add(x, feed(builder, y, block, h.n_ff[blocks[layer]]))
    x = builder.rms_norm(builder.select_rows(x), "dec.output_norm", h.rms_eps)
    logits = output(builder, x, h)
    # Models whose output matrix is their embedding were trained with a factor, which few files tell.
    factor = metadata.real("logit_scale", 0.0)
    return builder.scale(logits, factor) if factor else logits


def build_encoder(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to rows of the encoder alone."""
    return builder.rms_norm(builder.select_rows(encode(builder, h, "text")), "enc.output_norm", h.rms_eps)


def encode(builder: GraphBuilder, h: Hyperparameters, side: Side) -> Value:
    """The layers in which all tokens of a text see each other."""
    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block, cache = f"enc.blk.{layer}", source_layer(h, layer, side)
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        q, k, v = project_qkv(builder, y, block, cache)
        y = builder.attention(q, k, v, cache, 1.0, biases=biases(builder, h, "enc", layer, both_ways=True))
        x = builder.add(x, builder.linear(y, f"{block}.attn_o", h.n_embd))
        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        x = builder.add(x, feed(builder, y, block, h.n_ff[layer]))
    return x


def source_layer(h: Hyperparameters, layer: int, side: Side) -> CacheLayer:
    """Of a text that is read as a whole."""
    return replace(h.cache_layer(layer), causal=False, precise=True, side=side)


def keep(builder: GraphBuilder, rows: Value, layer: int, cache: CacheLayer) -> int:
    """Keys and values of the encoder's rows, for a layer of the decoder."""
    block = f"dec.blk.{layer}"
    k = builder.linear(rows, f"{block}.cross_attn_k", cache.n_kv_heads * cache.head_dim_k)
    v = builder.linear(rows, f"{block}.cross_attn_v", cache.n_kv_heads * cache.head_dim_v)
    return builder.keep(k, v, cache)


def feed(builder: GraphBuilder, x: Value, block: str, n_ff: int) -> Value:
    """GELU behind a gate (T5 1.1 and later), or ReLU without one."""
    if builder.has(f"{block}.ffn_gate.weight"):
        return feed_forward(builder, x, block, n_ff, "gelu")
    return ungated_feed_forward(builder, x, block, n_ff, "relu")


def biases(builder: GraphBuilder, h: Hyperparameters, half: str, layer: int, *, both_ways: bool) -> Constant:
    """For each head and distance; layers without any of their own have those of the first."""
    n_buckets = h.metadata.integer("attention.relative_buckets_count", low=4, high=FARTHEST)
    own = f"{half}.blk.{layer}.attn_rel_b.weight"
    name = own if builder.has(own) else f"{half}.blk.0.attn_rel_b.weight"
    table = builder.constant(name, n_buckets, h.n_heads[min(layer, h.n_layer - 1)])
    distances = np.arange(-FARTHEST, FARTHEST + 1)
    return np.ascontiguousarray(table[buckets(distances, n_buckets, both_ways=both_ways)].T)


def buckets(distances: np.ndarray, n_buckets: int, *, both_ways: bool) -> np.ndarray:
    """Which bias is for a distance: small ones have one each, and then as many farther ones share one as there are
    powers of a base between them. What is ahead has the second half of the buckets, or where nothing is seen ahead that
    of no distance."""
    first = np.zeros_like(distances)
    if both_ways:
        n_buckets //= 2
        first = n_buckets * (distances > 0)
        distances = np.abs(distances)
    else:
        distances = np.maximum(-distances, 0)
    n_exact = n_buckets // 2
    ratios = (np.maximum(distances, 1) / n_exact).astype(np.float32)
    far = n_exact + np.log(ratios).astype(np.float64) * (n_buckets - n_exact) / np.log(FARTHEST / n_exact)
    far = np.minimum(np.floor(far.astype(np.float32)).astype(np.int64), n_buckets - 1)
    return first + np.where(distances < n_exact, distances, far)
