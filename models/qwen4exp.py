"""Qwen3.8-Flash-Next (2026), of the architecture of Qwen 4: residual streams with gates, the attention, the delta nets
and the experts of Qwen3.5, and in one layer rows of a large table that the last few tokens point to. Attention sees the
best blocks of positions of a long context alone."""

from qrun.models.graph import Chosen, GraphBuilder, Hashes, Index, Rotation, Value
from qrun.models.hyper_connections import GatedStreams
from qrun.models.hyperparameters import MAX_CONTEXT, MAX_TAPS, Hyperparameters, Metadata
from qrun.models.qwen35 import DeltaNet, delta_net, gated_attention, gated_experts
from qrun.models.rope import RopeScaling
from qrun.models.sparse_index import read_index
from qrun.models.transformer import output, recurrent_layers

MAX_LENGTH, MAX_HASHES = 8, 64
"""Of the tokens that a row of the table is for, and how many rows there are for those of each token."""


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    ratios = metadata.per_layer("attention.compress_ratios", h.n_blocks, 0, low=0, high=MAX_CONTEXT)
    index = read_blocks(metadata, h, set(ratios) - {0}, context)
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    net, streams, network = DeltaNet.read(metadata), GatedStreams.read(metadata), gated_experts(metadata)
    recurrent = recurrent_layers(metadata, h, period=4)
    with_table = layer_with_table(metadata, h)
    rows = None if with_table is None else embed_last_tokens(builder, metadata, h)

    x = builder.repeat(builder.embed("token_embd", h.n_vocab, h.n_embd), streams.count)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        if rows is not None and layer == with_table:
            x = add_rows(builder, metadata, h, x, rows, block, streams)
        y, normed = streams.enter(builder, h, x, f"{block}.hc_attn")
        if recurrent[layer]:
            y = delta_net(builder, h, y, block, net, apart=True, gate="sigmoid")
        else:
            chosen = None
            if index is not None and ratios[layer]:
                chosen = choose(builder, h, y, block, index, rotation)
            y = gated_attention(builder, h, y, layer, rotation, chosen)
        x = streams.leave(builder, x, y, normed, f"{block}.hc_attn")

        y, normed = streams.enter(builder, h, x, f"{block}.hc_ffn")
        x = streams.leave(builder, x, network(builder, h, y, layer), normed, f"{block}.hc_ffn")
    y, _ = streams.enter(builder, h, builder.select_rows(x), "output_hc")
    return output(builder, y, h, bias=False)


def read_blocks(metadata: Metadata, h: Hyperparameters, ratios: set[int], context: int) -> Index | None:
    """What chooses blocks of positions on layers with a ratio, which is how many a block has; None if all are seen."""
    if not ratios:
        return None
    index = read_index(metadata, context, h.n_rot, every=min(ratios))
    if index is not None and (len(ratios) > 1 or index.every == 1):
        raise metadata.error("attention.compress_ratios", f"are {sorted(ratios)}, expected one that is more than 1")
    return index


def choose(
    builder: GraphBuilder, h: Hyperparameters, x: Value, block: str, index: Index, rotation: Rotation
) -> Chosen:
    """What rows of a layer attend to. The key of a block is the mean of its positions' keys, turned as the first."""
    q = builder.linear(x, f"{block}.indexer.q_proj", index.n_heads * index.dim)
    q = builder.rms_norm(q, f"{block}.indexer.q_norm", h.rms_eps, index.n_heads)
    k = builder.linear(x, f"{block}.indexer.k_proj", index.dim)
    k = builder.pool(k, builder.scale(k, 0.0), None, index.every, overlap=False)
    k = builder.rms_norm(k, f"{block}.indexer.k_norm", h.rms_eps)
    q = builder.rope(q, index.dim, rotation)
    k = builder.rope(k, index.dim, rotation, behind=index.every - 1)
    return builder.choose(q, k, None, index)


def layer_with_table(metadata: Metadata, h: Hyperparameters) -> int | None:
    """The layer that rows of the table are for, or None where there is no table."""
    if not metadata.has("ple.layers"):
        return None
    layers = metadata.integers("ple.layers", 0, high=h.n_blocks - 1)
    if len(layers) > 1:
        raise metadata.error("ple.layers", f"are {len(layers)}: more than one is not supported")
    return layers[0] if layers else None


def embed_last_tokens(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters) -> Value:
    """The rows of the table that the last tokens point to."""
    length = metadata.integer("ple.ngram_size", low=2, high=MAX_LENGTH)
    per_length = metadata.integer("ple.heads_per_ngram", high=MAX_HASHES)
    count = (length - 1) * per_length
    if count > MAX_HASHES:
        raise metadata.error("ple.heads_per_ngram", f"is {per_length}: more than {MAX_HASHES} rows are not supported")
    dim = metadata.integer("embedding_length_per_layer_input")
    if count * dim != h.n_embd:
        raise metadata.error("embedding_length_per_layer_input", f"is {dim}, and {count} rows are not {h.n_embd} wide")
    name = "per_layer_token_embd"
    n_rows = builder.n_rows(f"{name}.weight")
    sizes = metadata.integers("ple.head_vocab_sizes", count, low=1, high=max(n_rows, 1))[:count]
    offsets = metadata.integers("ple.head_offsets", count, high=n_rows)[:count]
    if any(offset + size > n_rows for offset, size in zip(offsets, sizes, strict=True)):
        raise metadata.error("ple.head_offsets", f"go beyond the {n_rows} rows of {name}")
    multipliers = metadata.integers("ple.layer_multipliers", length, high=(1 << 64) - 1)[:length]
    end = metadata.integer("ple.eos_token_id", low=0, high=h.n_vocab - 1)
    return builder.embed_hashes(name, n_rows, dim, Hashes(multipliers, per_length, sizes, offsets, end))


def add_rows(
    builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, x: Value, rows: Value, block: str,
    streams: GatedStreams,
) -> Value:  # fmt: skip
    """The streams and what rows of the table make: values, by how well their keys fit to each stream; and these once
    more, behind a convolution."""
    key = streams.norm(builder, h, builder.linear(rows, f"{block}.ple_key", x.width), f"{block}.ple_norm_key")
    value = builder.linear(rows, f"{block}.ple_value", h.n_embd)
    query = streams.norm(builder, h, x, f"{block}.ple_norm_query")
    fit = builder.scale(builder.dot(key, query, streams.count), h.n_embd**-0.5)
    gate = builder.activate_alone(fit, "signed_root")
    gated = builder.gate(gate, builder.repeat(value, streams.count), "sigmoid")

    taps = metadata.integer("ple.conv_kernel", high=MAX_TAPS)
    apart = metadata.integer("ple.ngram_size", low=2, high=MAX_LENGTH)
    normed = streams.norm(builder, h, gated, f"{block}.ple_norm_conv")
    convolved = builder.convolution(normed, f"{block}.ple_conv1d", taps, apart=apart)
    return builder.add(x, builder.add(gated, convolved))
