"""Hy4 (Tencent): residual streams with hyper-connections, latent attention with a sink for each head and a gate for
each value, and experts with a clamped SwiGLU beside one that all tokens share. Most attend to the best positions of a
long context alone."""

from qrun.models import latent_attention
from qrun.models.graph import Activation, GraphBuilder, Value
from qrun.models.hyper_connections import Streams
from qrun.models.hyperparameters import MAX_CONTEXT, MAX_EXPERTS, Hyperparameters, Metadata
from qrun.models.latent_attention import Latent
from qrun.models.lightning_index import LightningIndex, layers_with_own
from qrun.models.rope import RopeScaling
from qrun.models.transformer import LEAST_LIMIT, Shares, experts, feed_forward, read_limits, shared_expert


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot, interleaved=True)
    sizes, streams = Latent.absorbed_only(metadata, h), Streams.read(metadata)
    indexers = None
    if metadata.integer("attention.indexer.top_k", 0, low=0, high=MAX_CONTEXT):
        own = layers_with_own(metadata, h, (False,) * h.n_layer)
        indexers = LightningIndex.read(
            metadata, h, context, rotation, turned_last=True, eps=h.rms_eps, with_own=own
        )

    x = builder.repeat(builder.embed("token_embd", h.n_vocab, h.n_embd), streams.count)
    for layer in range(h.n_layer):
        block, n_heads = f"blk.{layer}", h.n_heads[layer]
        read, back = streams.both_weights(builder, h, x, f"{block}.hc_attn")
        y = builder.rms_norm(builder.mix(x, read, 1), f"{block}.attn_norm", h.rms_eps)
        gate = builder.linear(y, f"{block}.attn_gate", n_heads * sizes.dim_v)
        sinks = builder.constant(f"{block}.attn_sinks.weight", n_heads)
        choose = None if indexers is None else indexers.of_layer(builder, y, layer)
        y = latent_attention.attend(builder, h, y, layer, sizes, rotation, sinks=sinks, choose=choose)
        y = builder.gate(gate, y, "sigmoid")
        y = builder.linear(y, f"{block}.attn_output", h.n_embd)
        x = builder.mix(y, back, streams.count, add=x)

        read, back = streams.both_weights(builder, h, x, f"{block}.hc_ffn")
        y = builder.rms_norm(builder.mix(x, read, 1), f"{block}.ffn_norm", h.rms_eps)
        x = builder.mix(dense_or_experts(builder, h, y, layer), back, streams.count, add=x)
    x = builder.select_rows(x)
    x = builder.mix(x, streams.read_weights(builder, h, x, "output_hc"), 1)
    x = builder.rms_norm(x, "output_norm", h.rms_eps)
    return builder.linear(x, "output", h.n_vocab)


def dense_or_experts(builder: GraphBuilder, h: Hyperparameters, x: Value, layer: int) -> Value:
    """The feed-forward part of a block. Only the experts that are chosen have a limit."""
    block = f"blk.{layer}"
    if layer < h.n_dense:
        return feed_forward(builder, x, block, h.n_ff[layer], "silu")
    limit = read_limits(h.metadata, "swiglu_clamp_exp", h)[layer]
    kind: Activation = "clamped_silu" if limit > LEAST_LIMIT else "silu"
    n_ff = h.n_ff_expert[layer]
    y = experts(builder, h, x, block, n_ff, kind, Shares.read(h.metadata, "sigmoid"), limit=limit)
    n_ff_shared = n_ff * h.metadata.integer("expert_shared_count", high=MAX_EXPERTS)
    return builder.add(y, shared_expert(builder, x, block, n_ff_shared))
