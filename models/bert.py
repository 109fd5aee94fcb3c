"""BERT (arXiv:1810.04805) and what descends from it: every token sees the whole text, and norms come after each part.

BERT and XLM-RoBERTa learned a row for each position. In Nomic's models (arXiv:2402.01613) and jina-embeddings-v3
(arXiv:2409.10173) heads turn, in jina-embeddings-v2 (arXiv:2310.19923) scores fall with the distance."""

from qrun.models.graph import GraphBuilder, Rotation, Value
from qrun.models.hyperparameters import MAX_LAYERS, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import (
    ALIBI,
    Shares,
    attention,
    experts,
    feed_forward,
    joined_feed_forward,
    learned_positions,
    qk_norm_of,
    read_experts_scale,
    ungated_feed_forward,
)


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to rows of BERT."""
    x = builder.add(embed(builder, h), learned_positions(builder, h, context))
    x = builder.layer_norm(x, "token_embd_norm", h.norm_eps)
    for layer in range(h.n_layer):
        y = attended(builder, h, x, layer)
        x = normed_sum(builder, h, y, ungated_feed_forward(builder, y, f"blk.{layer}", h.n_ff[layer], "gelu"), layer)
    return builder.select_rows(x)


def build_turning(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to rows of those with rope: with a gate (nomic-embed-text), without one, or with experts in every so
    many layers (nomic-embed-text-v2)."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    every = metadata.integer("moe_every_n_layers", 0, low=0, high=MAX_LAYERS)
    shares = Shares(normalize=False, scale=read_experts_scale(metadata))
    x = builder.layer_norm(embed(builder, h), "token_embd_norm", h.norm_eps)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = attended(builder, h, x, layer, rotation)
        if every and layer % every == 1:
            z = experts(builder, h, y, block, h.n_ff[layer], "gelu", shares, gated=False)
        elif metadata.architecture == "nomic-bert":
            z = feed_forward(builder, y, block, h.n_ff[layer], "silu")
        else:
            z = ungated_feed_forward(builder, y, block, h.n_ff[layer], "gelu")
        x = normed_sum(builder, h, y, z, layer)
    return builder.select_rows(x)


def build_jina_v2(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to rows of jina-embeddings-v2 and its rerankers."""
    x = builder.layer_norm(embed(builder, h), "token_embd_norm", h.norm_eps)
    for layer in range(h.n_layer):
        block, n_ff = f"blk.{layer}", h.n_ff[layer]
        y = attended(builder, h, x, layer, alibi=ALIBI)
        if builder.has(f"{block}.ffn_gate.weight"):
            z = feed_forward(builder, y, block, n_ff, "gelu")
        elif builder.n_rows(f"{block}.ffn_up.weight") == n_ff:
            z = ungated_feed_forward(builder, y, block, n_ff, "gelu")
        else:
            z = joined_feed_forward(builder, y, block, n_ff, "gelu")
        x = normed_sum(builder, h, y, z, layer)
    return builder.select_rows(x)


def embed(builder: GraphBuilder, h: Hyperparameters) -> Value:
    """Rows of tokens, with that of the first kind of sentence, if the model knows kinds."""
    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    if not builder.has("token_types.weight"):
        return x
    kinds = builder.rows_constant("token_types.weight", h.n_embd)
    if not len(kinds):
        raise builder.error("tensor token_types.weight has no rows")
    return builder.affine(x, None, kinds[0])


def attended(
    builder: GraphBuilder, h: Hyperparameters, x: Value, layer: int, rotation: Rotation | None = None,
    alibi: float = 0.0,
) -> Value:  # fmt: skip
    """What the layer's first half makes of x."""
    block = f"blk.{layer}"
    qk_norm = qk_norm_of(builder, block, "layer")
    y = attention(builder, h, x, block, h.cache_layer(layer), rotation, qk_norm=qk_norm, alibi=alibi)
    y = builder.layer_norm(builder.add(y, x), f"{block}.attn_output_norm", h.norm_eps)
    if builder.has(f"{block}.attn_norm_2.weight"):
        y = builder.layer_norm(builder.add(y, x), f"{block}.attn_norm_2", h.norm_eps)
    return y


def normed_sum(builder: GraphBuilder, h: Hyperparameters, x: Value, y: Value, layer: int) -> Value:
    """The end of a layer."""
    return builder.layer_norm(builder.add(y, x), f"blk.{layer}.layer_output_norm", h.norm_eps)
