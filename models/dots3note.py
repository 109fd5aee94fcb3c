"""dots3-note (rednote): latent attention of two sizes, of which the smaller one sees a window and the other the best
positions of a long context alone; gates for each head; and experts beside one that all tokens share."""

from dataclasses import replace

from qrun.models import latent_attention
from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import MAX_CONTEXT, MAX_EXPERTS, Hyperparameters, Metadata
from qrun.models.latent_attention import Latent
from qrun.models.lightning_index import LightningIndex
from qrun.models.rope import RopeScaling, read_base
from qrun.models.transformer import Shares, dense_or_experts, head, required_flags


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    scaling = RopeScaling.read(metadata, h)
    rotation = scaling.rotation(h.n_rot, interleaved=True)
    local_base = read_base(metadata, "rope.freq_base_swa", 10000.0)
    local_rotation = replace(scaling, base=local_base).rotation(h.n_rot, interleaved=True)
    window = metadata.integer("attention.sliding_window", high=MAX_CONTEXT)
    sliding = required_flags(metadata, "attention.sliding_window_pattern", h.n_layer)
    sizes, local_sizes = (Latent.absorbed_only(metadata, h, suffix) for suffix in ("", "_swa"))
    shares = Shares.read(metadata, "sigmoid")
    n_shared = metadata.integer("expert_shared_count", high=MAX_EXPERTS)
    indexers = LightningIndex.read(metadata, h, context, scaling.rotation(h.n_rot))

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block, local = f"blk.{layer}", sliding[layer]
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        gate = builder.linear(y, f"{block}.attn_gate", h.n_heads[layer])
        choose = None if local or indexers is None else indexers.of_layer(builder, y, layer)
        y = latent_attention.attend(
            builder, h, y, layer, local_sizes if local else sizes, local_rotation if local else rotation,
            window=window if local else None, norm_turned=True, choose=choose,
        )  # fmt: skip
        y = builder.gate(gate, y, "sigmoid")
        x = builder.add(x, builder.linear(y, f"{block}.attn_output", h.n_embd))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        x = builder.add(x, dense_or_experts(builder, h, y, layer, shares, h.n_ff_expert[layer] * n_shared))
    return head(builder, x, h)
