"""DeepSeek V4 (DeepSeek-AI, 2026): latent attention to a window of single positions, and to older ones through entries
that stand for 4 or 128 positions each; hyper-connections; and experts of the first layers that follow from the token.

From a long past, layers of the first kind choose entries by an index, whose keys are made as the entries are.
"""

from dataclasses import replace

from qrun.models.graph import Activation, CacheLayer, Chosen, GraphBuilder, Rotation, Value
from qrun.models.hyper_connections import BalancedStreams, Streams
from qrun.models.hyperparameters import MAX_EXPERTS, MAX_HEADS, Hyperparameters, Metadata
from qrun.models.lightning_index import LightningIndex
from qrun.models.rope import PLAIN, RopeScaling, read_base
from qrun.models.transformer import LEAST_LIMIT, Shares, experts, feed_forward, read_limits, read_window

CHOOSING, COARSE = 4, 128
"""How many positions an entry stands for. Entries of the first kind overlap, and are chosen from."""


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    if not builder.has(f"blk.{h.n_layer}.nextn.eh_proj.weight"):  # what follows are no draft layers
        h = replace(Hyperparameters.read(metadata, drafts=True), n_layer=h.n_blocks)
    ratios = read_ratios(metadata, h)
    indexers = None
    if CHOOSING in ratios:
        turn = rotation(metadata, h, coarse=True)
        indexers = LightningIndex.read(metadata, h, context, turn, turned_last=True, every=CHOOSING, of_entries=True)
    shares = Shares.read(metadata, "sqrt_softplus")
    if shares.gating != "sqrt_softplus":
        raise metadata.error("expert_gating_func", f"makes a {shares.gating}, which is not supported")
    limits = read_limits(metadata, "swiglu_clamp_exp", h)
    shared_limits = read_limits(metadata, "swiglu_clamp_shexp", h) if metadata.has("swiglu_clamp_shexp") else limits
    n_ff_shared = metadata.integer("expert_shared_count", high=MAX_EXPERTS)
    n_hashed = metadata.integer("hash_layer_count", 0, low=0, high=h.n_layer)
    streams = BalancedStreams.read(metadata)
    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    x = builder.repeat(x, streams.count)
    for layer in range(h.n_layer):
        block, n_ff = f"blk.{layer}", h.n_ff_expert[layer]
        y, back = streams.enter(builder, h, x, f"{block}.hc_attn")
        y = builder.rms_norm(y, f"{block}.attn_norm", h.rms_eps)
        y = attend(builder, metadata, h, y, layer, ratios[layer], indexers if ratios[layer] == CHOOSING else None)
        x = streams.leave(builder, x, y, back)
        y, back = streams.enter(builder, h, x, f"{block}.hc_ffn")
        y = builder.rms_norm(y, f"{block}.ffn_norm", h.rms_eps)
        table = f"{block}.ffn_gate_tid2eid.weight"
        by_token = builder.indices(table, h.n_vocab, h.n_used, below=h.n_expert) if layer < n_hashed else None
        limit, shared_limit = limits[layer], shared_limits[layer]
        z = experts(builder, h, y, block, n_ff, clamped(limit), shares, limit=limit, by_token=by_token)
        y = feed_forward(builder, y, block, n_ff * n_ff_shared, clamped(shared_limit), "_shexp", shared_limit)
        x = streams.leave(builder, x, builder.add(z, y), back)
    x = builder.select_rows(x)
    weights = Streams(streams.count, streams.eps, 1.0).read_weights(builder, h, x, "output_hc")
    x = builder.rms_norm(builder.mix(x, weights, 1), "output_norm", h.rms_eps)
    return builder.linear(x, "output", h.n_vocab)


def attend(
    builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, x: Value, layer: int, ratio: int,
    indexers: LightningIndex | None,
) -> Value:  # fmt: skip
    """Attention of one block to single positions in the window and, with a ratio, to entries of so many of them: with
    indexers to chosen ones."""
    block, n_heads, dim, still = f"blk.{layer}", h.n_heads[layer], h.head_dim_k, h.head_dim_k - h.n_rot
    window = read_window(metadata)
    if h.n_kv_heads[layer] != 1 or h.head_dim_v != dim or not still or not window:
        raise metadata.error("attention", "needs one key and value head, of which a part turns, and a window")
    n_groups = metadata.integer("attention.output_group_count", high=MAX_HEADS)
    rank = metadata.integer("attention.output_lora_rank")
    if n_heads % n_groups:
        raise metadata.error("attention.output_group_count", f"is {n_groups}, which does not divide {n_heads} heads")
    turn = rotation(metadata, h, coarse=ratio > 0)

    q = builder.linear(x, f"{block}.attn_q_a", metadata.integer("attention.q_lora_rank"))
    q = builder.rms_norm(q, f"{block}.attn_q_a_norm", h.rms_eps)
    chosen = None if indexers is None else choose(builder, h, x, q, layer, indexers)
    q = builder.rms_norm_with(builder.linear(q, f"{block}.attn_q_b", n_heads * dim), None, h.rms_eps, n_heads)
    k = builder.rms_norm(builder.linear(x, f"{block}.attn_kv", dim), f"{block}.attn_kv_a_norm", h.rms_eps)
    q, k = builder.rope(q, dim, turn, start=still), builder.rope(k, dim, turn, start=still)
    entries = None
    if ratio:
        entries = compress(builder, h, x, f"{block}.attn_compressor", ratio, dim)
        entries = builder.rope(entries, dim, turn, start=still, behind=ratio - 1)  # as where they begin
    # There is little to keep: all digits of it cost nothing.
    cache = CacheLayer(n_heads, 1, dim, dim, window, values_in_keys=True, precise=True)
    sinks = builder.constant(f"{block}.attn_sinks.weight", n_heads)
    y = builder.attention(q, k, None, cache, dim**-0.5, sinks=sinks, entries=entries, every=ratio, chosen=chosen)
    y = builder.rope(y, dim, replace(turn, frequencies=-turn.frequencies), start=still)  # values were keys, turned
    y = builder.head_linear(y, f"{block}.attn_output_a", n_groups, rank, n_heads // n_groups * dim)
    return builder.linear(y, f"{block}.attn_output_b", h.n_embd)


def compress(builder: GraphBuilder, h: Hyperparameters, x: Value, name: str, ratio: int, dim: int) -> Value:
    """Rows that stand for `ratio` positions each, before they turn."""
    overlap = ratio == CHOOSING
    width = 2 * dim if overlap else dim
    values, scores = (builder.linear(x, f"{name}_{part}", width) for part in ("kv", "gate"))
    entries = builder.pool(values, scores, f"{name}_ape", ratio, overlap=overlap)
    return builder.rms_norm(entries, f"{name}_norm", h.rms_eps)


def choose(
    builder: GraphBuilder, h: Hyperparameters, x: Value, q: Value, layer: int, indexers: LightningIndex
) -> Chosen:
    """The entries that rows of a layer attend to. q: the short row of its queries."""
    keys = compress(builder, h, x, f"blk.{layer}.indexer_compressor", CHOOSING, indexers.index.dim)
    return indexers.choose_by(builder, x, q, indexers.turn(builder, keys, behind=CHOOSING - 1), layer)


def rotation(metadata: Metadata, h: Hyperparameters, *, coarse: bool) -> Rotation:
    """How heads turn on layers with entries, and on those without. Neither makes them longer."""
    scaling = RopeScaling.read(metadata, h)
    if coarse:
        scaling = replace(scaling, base=read_base(metadata, "attention.compress_rope_freq_base", scaling.base))
    else:
        scaling = replace(PLAIN, base=scaling.base)
    return replace(scaling.rotation(h.n_rot, interleaved=True), magnitude=1.0)


def read_ratios(metadata: Metadata, h: Hyperparameters) -> tuple[int, ...]:
    """How many positions an entry of each layer stands for; 0 where there are none."""
    ratios = metadata.integers("attention.compress_ratios", h.n_blocks, high=COARSE)[: h.n_layer]
    if wrong := set(ratios) - {0, CHOOSING, COARSE}:
        raise metadata.error("attention.compress_ratios", f"has {min(wrong)}, expected 0, {CHOOSING} or {COARSE}")
    return ratios


def clamped(limit: float) -> Activation:
    """What gates do, with a limit or without."""
    return "clamped_silu" if limit > LEAST_LIMIT else "silu"
