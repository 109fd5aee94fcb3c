"""GroveMoE (arXiv:2508.07785): experts come in groups, and each group has a smaller one of its own, which takes what
the experts give."""

from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import attention, experts, head


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    together = metadata.integer("experts_per_group", high=max(h.n_expert, 1))
    if h.n_expert % together:
        raise metadata.error("experts_per_group", f"is {together}, which does not divide {h.n_expert} experts")
    group_scale = metadata.real("expert_group_scale", low=-1e6, high=1e6)
    n_ff_group = metadata.integer("expert_chunk_feed_forward_length", 0, low=0) or h.head_dim_k

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation, qk_norm="heads"))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        n_ff = h.n_ff_expert[layer] or h.n_ff[layer] // max(h.n_used, 1)
        z = experts(builder, h, y, block, n_ff)
        of_groups = experts(
            builder, h, z, block, n_ff_group, router_x=y, together=together, suffix="_chexps"
        )
        x = builder.add(x, builder.add(z, builder.scale(of_groups, group_scale)))
    return head(builder, x, h)
