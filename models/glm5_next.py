"""GLM-5.3-Flash (Z.ai, 2026): residual streams with hyper-connections whose matrices are balanced, Kimi delta
attention, and latent attention without positions; experts, chosen by biases, beside one that all tokens share, and
clamped SwiGLU. Latent attention sees the best pools of neighbouring positions of a long context alone."""

from qrun.models import latent_attention
from qrun.models.graph import Activation, GraphBuilder, Value
from qrun.models.hyper_connections import BalancedStreams
from qrun.models.hyperparameters import MAX_CONTEXT, MAX_EXPERTS, Hyperparameters, Metadata
from qrun.models.kimi_linear import delta_attention
from qrun.models.latent_attention import Latent
from qrun.models.lightning_index import LightningIndex, layers_with_own
from qrun.models.transformer import LEAST_LIMIT, Shares, experts, feed_forward, read_limits

UNIT_EPS = 1e-6


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    tail = "attention.indexer.kpool_select_tail"
    if not metadata.flag(tail, True):
        raise metadata.error(tail, "is False: not to see the last tokens is not supported")
    indexers = None
    if context > metadata.integer("attention.indexer.top_k", high=MAX_CONTEXT):
        every = metadata.integer("attention.indexer.kpool", low=2, high=MAX_CONTEXT)
        own = layers_with_own(metadata, h, (True,) * h.n_layer)
        eps = metadata.real("attention.layer_norm_epsilon", 1e-6, high=1.0)
        indexers = LightningIndex.read(metadata, h, context, None, eps=eps, with_own=own, every=every)
    streams = BalancedStreams.read(metadata)
    x = builder.repeat(builder.embed("token_embd", h.n_vocab, h.n_embd), streams.count)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y, back = streams.enter(builder, h, x, f"{block}.hc_attn")
        y = attend(builder, metadata, h, builder.rms_norm(y, f"{block}.attn_norm", h.rms_eps), layer, indexers)
        x = streams.leave(builder, x, y, back)

        y, back = streams.enter(builder, h, x, f"{block}.hc_ffn")
        y = network(builder, metadata, h, builder.rms_norm(y, f"{block}.ffn_norm", h.rms_eps), layer)
        x = streams.leave(builder, x, y, back)
    x = streams.mean(builder, builder.select_rows(x))
    return builder.linear(builder.rms_norm(x, "output_norm", h.rms_eps), "output", h.n_vocab)


def attend(
    builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, x: Value, layer: int,
    indexers: LightningIndex | None,
) -> Value:  # fmt: skip
    """Attention of one block, of either kind."""
    if not h.n_kv_heads[layer]:
        key = "kda.gate_lower_bound"
        lower_bound = metadata.real(key, low=-1e3, high=0.0) if metadata.has(key) else None
        return delta_attention(builder, metadata, h, x, layer, lower_bound, negated=True, unit_eps=UNIT_EPS)
    choose = None if indexers is None else indexers.of_layer(builder, x, layer)
    y = latent_attention.attend(builder, h, x, layer, Latent.absorbed_only(metadata, h), None, choose=choose)
    return builder.linear(y, f"blk.{layer}.attn_output", h.n_embd)


def network(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, x: Value, layer: int) -> Value:
    """What comes behind the attention of a block."""
    block, key = f"blk.{layer}", "swiglu_clamp_exp"
    limit = read_limits(metadata, key, h)[layer]
    shared_key = "swiglu_clamp_shexp"
    shared_limit = read_limits(metadata, shared_key if metadata.has(shared_key) else key, h)[layer]
    if layer < h.n_dense:
        return feed_forward(builder, x, block, h.n_ff[layer], clamped(shared_limit), limit=shared_limit)
    n_ff = h.n_ff_expert[layer]
    shares = Shares.read(metadata, "sigmoid")
    y = experts(builder, h, x, block, n_ff, clamped(limit), shares, limit=limit)
    n_shared = metadata.integer("expert_shared_count", high=MAX_EXPERTS)
    return builder.add(
        y, feed_forward(builder, x, block, n_ff * n_shared, clamped(shared_limit), "_shexp", shared_limit)
    )


def clamped(limit: float) -> Activation:
    """SwiGLU with a limit, or if there is none without."""
    return "clamped_silu" if limit > LEAST_LIMIT else "silu"
