"""MiniMax M3: gpt-oss's SwiGLU in all networks, experts chosen by biases beside one that all tokens share, and
attention to the best blocks of a long context alone."""

from qrun.models.deepseek2 import read_budget
from qrun.models.graph import GraphBuilder, Value
from qrun.models.hyperparameters import MAX_CONTEXT, MAX_EXPERTS, Hyperparameters, Metadata
from qrun.models.rope import RopeScaling
from qrun.models.transformer import Shares, attention, dense_or_experts, head


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits, as far as all blocks are seen."""
    size = metadata.integer("attention.indexer.block_size", high=MAX_CONTEXT)
    builder.limit_context(min(read_budget(metadata) * size, MAX_CONTEXT))
    rotation = RopeScaling.read(metadata, h).rotation(h.n_rot)
    shares = Shares.read(metadata, "sigmoid")
    n_shared = metadata.integer("expert_shared_count", high=MAX_EXPERTS)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        x = builder.add(x, attention(builder, h, y, block, h.cache_layer(layer), rotation, qk_norm="heads"))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        n_ff_shared = h.n_ff_expert[layer] * n_shared
        x = builder.add(x, dense_or_experts(builder, h, y, layer, shares, n_ff_shared, kind="swiglu_oai"))
    return head(builder, x, h)
