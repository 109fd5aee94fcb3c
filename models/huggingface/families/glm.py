"""GLM and ChatGLM."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qrun.models.huggingface.changes import Order, by_order
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import GATING, Facts
from qrun.models.huggingface.layout import (
    DRAFT,
    EXPERT_WEIGHTS,
    FEED_FORWARD,
    NORMS,
    QK_NORMS,
    Architecture,
    Change,
    Part,
    Sizes,
    attention,
    counts,
    either,
    experts,
    gated,
    linear,
    norm,
    optional,
    tensor,
)

# GLM 4: gates and inputs of the feed-forward layer are one matrix, and four norms.


def _rotation(heads: str) -> Change:
    """Of models that see, rope turns numbers side by side in checkpoints, and halves of a head in GGUF files."""

    def order(sizes: Sizes) -> Order:
        rows = np.arange(sizes[heads] * sizes["head"]).reshape(sizes[heads], sizes["head"])
        part = sizes.config.rope().real("partial_rotary_factor", sizes.config.real("partial_rotary_factor", 0.5))
        n = int(sizes["head"] * part)
        return np.concatenate([rows[:, :n:2], rows[:, 1:n:2], rows[:, n:]], axis=1).reshape(-1)

    return by_order(order)


_GLM4_LAYER: tuple[Part, ...] = (
    norm("input_layernorm", "attn_norm"),
    norm("post_self_attn_layernorm", "post_attention_norm"),
    norm("post_attention_layernorm", "ffn_norm"),
    norm("post_mlp_layernorm", "post_ffw_norm"),
    *linear("mlp.gate_up_proj", "ffn_up", "twice_ff", "embd"),
    *linear("mlp.down_proj", "ffn_down", "embd", "ff"),
)
_SEEING_ATTENTION = (
    *linear("self_attn.q_proj", "attn_q", "q", "embd", change=_rotation("heads")),
    *linear("self_attn.k_proj", "attn_k", "kv", "embd", change=_rotation("kv_heads")),
    *linear("self_attn.v_proj", "attn_v", "kv", "embd"),
    *linear("self_attn.o_proj", "attn_output", "embd", "q"),
)


def _seeing(config: Config) -> Architecture | None:
    """Models that see have places in two dimensions, and say so."""
    sections = config.rope().get("mrope_section")
    return replace(_GLM4, layer=(*_GLM4_LAYER, *_SEEING_ATTENTION)) if sections is not None else None


_GLM4 = Architecture(
    "glm4", (*_GLM4_LAYER, *attention()), variant=_seeing, rotated="part",
    defaults={"partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-07},
    extra_layers="num_nextn_predict_layers", draft=DRAFT,
)  # fmt: skip
_GLM4_MOE = Architecture(
    "glm4moe",
    (
        norm("input_layernorm", "attn_norm"),
        norm("post_attention_layernorm", "post_attention_norm"),
        *attention(),
        *optional(*QK_NORMS),
        either(
            (
                *experts(),
                tensor("mlp.gate.e_score_correction_bias", "exp_probs_b.bias", "experts"),
                *gated("mlp.shared_experts", end="_shexp", width="*"),
            ),
            FEED_FORWARD,
        ),
    ),
    rotated="part", defaults={"partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "num_experts_per_tok": 8},
    extra_layers="num_nextn_predict_layers", draft=DRAFT,
    entries=lambda facts: facts.count("expert_gating_func", GATING["sigmoid"]),
    keys=(
        *EXPERT_WEIGHTS,
        *counts(
            expert_feed_forward_length="moe_intermediate_size", expert_shared_count="n_shared_experts",
            leading_dense_block_count="first_k_dense_replace",
        ),
    ),
)  # fmt: skip

# ChatGLM, and GLM 4 before it had four norms


def _chatglm_entries(facts: Facts) -> None:
    config = facts.config
    facts.real("attention.layer_norm_rms_epsilon", config.real("layernorm_epsilon", 1e-5, high=1.0))
    facts.real("rope.freq_base", 10000.0 * config.real("rope_ratio", 1.0, high=1e9))


_CHATGLM = Architecture(
    "chatglm",
    (
        *NORMS,
        *linear("self_attention.query_key_value", "attn_qkv", "qkv", "embd"),
        *linear("self_attention.dense", "attn_output", "embd", "q"),
        *linear("mlp.dense_h_to_4h", "ffn_up", "twice_ff", "embd"),
        *linear("mlp.dense_4h_to_h", "ffn_down", "embd", "ff"),
    ),
    layers="encoder.layers", embedding="embedding.word_embeddings", head="output_layer",
    outer=(norm("encoder.final_layernorm", "output_norm"),),
    defaults={"partial_rotary_factor": 0.5}, rotated="part", entries=_chatglm_entries,
    fixed={"multi_query_attention": True},
)  # fmt: skip
_GLM = Architecture(
    "chatglm",
    (*NORMS, *attention(), *linear("mlp.gate_up_proj", "ffn_up", "twice_ff", "embd"),
     *linear("mlp.down_proj", "ffn_down", "embd", "ff")),
    defaults={"partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-07}, rotated="part",
)  # fmt: skip

CLASSES = {
    "Glm4ForCausalLM": _GLM4,
    "Glm4vForConditionalGeneration": _GLM4,
    "GlmOcrForConditionalGeneration": _GLM4,
    "Glm4MoeForCausalLM": _GLM4_MOE,
    "Glm4vMoeForConditionalGeneration": _GLM4_MOE,
    "SolarOpenForCausalLM": replace(_GLM4_MOE, defaults=dict(_GLM4_MOE.defaults) | {"partial_rotary_factor": 1.0}),
    "GlmForCausalLM": _GLM,
    "ChatGLMModel": _CHATGLM,
    "ChatGLMForConditionalGeneration": _CHATGLM,
}
