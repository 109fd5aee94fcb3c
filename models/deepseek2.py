"""DeepSeek V2, V3 and R1 (arXiv:2405.04434, 2412.19437), Kimi K2, GLM-4.7-Flash, and Mistral 4: latent attention, and
small experts, chosen by biases and within groups, beside one that all tokens share. MiniCPM 3 (arXiv:2404.06395) has
such attention too. DeepSeek V3.2 (arXiv:2512.02556) and GLM-5 attend to the best positions of a long context alone.
"""

from dataclasses import replace
from math import log

from qrun.models import latent_attention
from qrun.models.graph import GraphBuilder, Temperature, Value
from qrun.models.hyperparameters import MAX_CONTEXT, MAX_EXPERTS, Hyperparameters, Metadata
from qrun.models.latent_attention import Latent
from qrun.models.lightning_index import LightningIndex, layers_with_own
from qrun.models.rope import RopeScaling, rope_factors
from qrun.models.transformer import Shares, blocks, dense_or_experts, feed_forward, head

# GLM-4.7-Flash came before files said how its router's logits become probabilities.
LAYERS_OF_GLM, VOCABULARY_OF_GLM = (47, 48), 154880
# GLM-5.2, of this context at least, came before files said which layers have an indexer.
CONTEXT_OF_GLM_5_2 = 1 << 20


def build(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits."""
    return blocks(builder, metadata, h, context, build_block)


def build_block(
    builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int, x: Value, layer: int
) -> Value:
    """One block, of the model or of its draft layers."""
    is_glm = h.n_layer in LAYERS_OF_GLM and h.n_vocab == VOCABULARY_OF_GLM
    shares = Shares.read(metadata, "sigmoid" if is_glm else "softmax")
    return block_with(builder, metadata, h, x, layer, Latent.read(metadata, h), shares)


def build_sparse(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of DeepSeek V3.2 and GLM-5."""
    sizes, shares = Latent.absorbed_only(metadata, h), Shares.read(metadata, "sigmoid")
    turn = read_scaling(metadata, h)[0].rotation(h.n_rot, interleaved=metadata.architecture == "glm-dsa")
    indexers = LightningIndex.read(metadata, h, context, turn, with_own=layers_with_indexer(metadata, h))
    x = builder.embed("token_embd", h.n_vocab, h.n_embd)
    for layer in range(h.n_layer):
        x = block_with(builder, metadata, h, x, layer, sizes, shares, indexers)
    return head(builder, x, h)


def layers_with_indexer(metadata: Metadata, h: Hyperparameters) -> tuple[bool, ...]:
    """Which layers have an indexer of their own: in DeepSeek V3.2 and the first GLM-5 all."""
    everywhere = (True,) * h.n_layer
    if metadata.architecture != "glm-dsa":
        return everywhere
    of_glm_5_2 = tuple(layer < 3 or layer % 4 == 2 for layer in range(h.n_layer))
    return layers_with_own(metadata, h, of_glm_5_2 if h.context_length >= CONTEXT_OF_GLM_5_2 else everywhere)


def block_with(
    builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, x: Value, layer: int, sizes: Latent, shares: Shares,
    indexers: LightningIndex | None = None,
) -> Value:  # fmt: skip
    """One block, with attention of these sizes and these shares of experts. indexers: where it does not see all."""
    scaling, scale = read_scaling(metadata, h)
    rotation = scaling.rotation(h.n_rot, interleaved=True)
    temperature = read_temperature(metadata)
    n_shared = metadata.integer("expert_shared_count", low=0, high=MAX_EXPERTS)

    block = f"blk.{layer}"
    y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
    choose = None if indexers is None else indexers.of_layer(builder, y, layer)
    y = latent_attention.attend(
        builder, h, y, layer, sizes, rotation, scale=scale, temperature=temperature, choose=choose
    )
    x = builder.add(x, builder.linear(y, f"{block}.attn_output", h.n_embd))

    y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
    return builder.add(x, dense_or_experts(builder, h, y, layer, shares, h.n_ff_expert[layer] * n_shared))


def build_minicpm3(builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int) -> Value:
    """Token ids to logits of MiniCPM 3, which scales as MiniCPM does."""
    scaling = RopeScaling.read(metadata, h)
    factors = rope_factors(builder, h.n_rot, context, scaling.original_context)
    rotation = scaling.rotation(h.n_rot, factors)
    residual_scale = 1.4 / h.n_layer**0.5
    sizes = Latent.plain(metadata, h)

    x = builder.embed("token_embd", h.n_vocab, h.n_embd, scale=12.0)
    for layer in range(h.n_layer):
        block = f"blk.{layer}"
        y = builder.rms_norm(x, f"{block}.attn_norm", h.rms_eps)
        y = latent_attention.attend(builder, h, y, layer, sizes, rotation)
        y = builder.linear(y, f"{block}.attn_output", h.n_embd)
        x = builder.add(x, builder.scale(y, residual_scale))

        y = builder.rms_norm(x, f"{block}.ffn_norm", h.rms_eps)
        y = feed_forward(builder, y, block, h.n_ff[layer], "silu")
        x = builder.add(x, builder.scale(y, residual_scale))
    return builder.scale(head(builder, x, h), 256.0 / h.n_embd)


def read_scaling(metadata: Metadata, h: Hyperparameters) -> tuple[RopeScaling, float]:
    """Rope, and what YaRN multiplies the products of queries and keys by."""
    scaling = RopeScaling.read(metadata, h)
    # Files have a tenth of it; those of GLM-5 have none.
    damping = 10.0 * metadata.real("rope.scaling.yarn_log_multiplier", 0.0, high=1e2)
    damping = 0.0 if metadata.architecture == "glm-dsa" else damping
    growth = 0.1 * log(scaling.factor)
    if damping:
        scaling = replace(scaling, damping=1.0 if metadata.architecture == "deepseek2" else damping)
    magnitude = scaling.rotation(h.n_rot).magnitude
    if not scaling.stretches_by_pair:
        magnitude *= 1.0 + growth
    return scaling, (magnitude * (1.0 + damping * growth)) ** 2


def read_temperature(metadata: Metadata) -> Temperature | None:
    """How queries grow with their position, or None where they do not: no architecture with an indexer knows it."""
    if metadata.architecture not in ("deepseek2", "mistral4"):
        return None
    scale = metadata.real("attention.temperature_scale", 0.0, high=1e3)
    return Temperature(scale, metadata.integer("attention.temperature_length", high=MAX_CONTEXT)) if scale else None
