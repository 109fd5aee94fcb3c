"""Grok 1 and 2 (xAI): a mixture of experts with GELU, norms after each part too, and scores under a soft cap. Grok 2
has a dense network beside the experts."""

from dataclasses import replace
from math import sqrt

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attention, experts, feed_forward, head, softcapped


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = read_scaling(metadata, h).rotation(h.n_rot)
    scale = metadata.real("attention.output_scale", 0.08838834764831845)
    softcap = metadata.real("attn_logit_softcapping", 30.0, low=1e-6)
    embedding_scale = metadata.real("embedding_scale", 78.38367176906169) or 1.0

    x = builder.embed("token_embd", h.n_vocab, h.n_embd, scale=embedding_scale)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        y = attention(builder, h, y, block, h.cache_layer(layer), rotation, scale=scale, softcap=softcap)
        x = builder.add(x, builder.rms_norm(y, f"{block}.attn_output_norm", h.rms_eps))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        z = experts(builder, h, y, block, h.n_ff_expert[layer] or h.n_ff[layer], "gelu")
        if builder.has(f"{block}.ffn_up.weight"):
            z = builder.scale(builder.add(z, feed_forward(builder, y, block, h.n_ff[layer], "gelu")), sqrt(0.5))
        norm = "layer_output_norm" if builder.has(f"{block}.layer_output_norm.weight") else "post_ffw_norm"
        x = builder.add(x, builder.rms_norm(z, f"{block}.{norm}", h.rms_eps))

    logits = builder.scale(head(builder, x, h), metadata.real("logit_scale", 0.5773502691896257))
    return softcapped(builder, logits, metadata, default=0.0)


def read_scaling(metadata: Metadata, h: Hyperparameters) -> RopeScaling:
    """Rope with the parameters of YaRN that the file gives."""
    scaling = RopeScaling.read(metadata, h).with_yarn_betas(metadata, beta_fast=8.0)
    keep = metadata.real("rope.scaling.yarn_ext_factor", -1.0, low=-1.0, high=1.0)
    scaling = replace(scaling, keep=None if keep < 0.0 else keep)
    if scaling.stretches_by_pair:
        return scaling
    factor = metadata.real("rope.scaling.yarn_attn_factor", 1.0, high=1e6)
    return replace(scaling, attention_factor=scaling.attention_factor * factor)
