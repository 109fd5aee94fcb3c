"""Mistral Small 3.1 and later, Ministral 3 (arXiv:2601.08584), Devstral, Magistral: Llama with YaRN's parameters from
the file, and queries that grow beyond the trained context."""

from dataclasses import replace

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling, read_temperature, rope_factors
from qrun.models.transformer import attention, experts, feed_forward, head


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling = RopeScaling.read(metadata, h).with_yarn_betas(metadata)
    scaling = replace(scaling, damping=metadata.real("rope.scaling.yarn_log_multiplier", 0.0, high=1e3))
    factors = rope_factors(builder, h.n_rot, context, scaling.original_context)
    temperature = read_temperature(metadata, h, scaling.original_context)
    rotation = replace(scaling.rotation(h.n_rot, factors, interleaved=True), temperature=temperature)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        if h.n_expert:
            y = experts(builder, h, y, block, h.n_ff[layer])
        else:
            y = feed_forward(builder, y, block, h.n_ff[layer], "silu")
        x = builder.add(x, y)
    return head(builder, x, h)
