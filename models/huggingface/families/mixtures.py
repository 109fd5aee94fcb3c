"""Mixtures of experts that belong to no other family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from qrun.formats.blocks import dequantize, quantize
from qrun.formats.blocks.layout import F32Array
from qrun.formats.tensors import SourceTensor
from qrun.models.huggingface.changes import (
    by_order,
    computed,
    every,
    ordered,
    rows,
    side_by_side,
    then,
    transposed,
    upright,
)
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import GATING, Facts
from qrun.models.huggingface.families.qwen import draft_layers
from qrun.models.huggingface.layout import (
    DRAFT,
    EXPERT_WEIGHTS,
    FEED_FORWARD,
    HEAD_BIAS,
    LAYER_NORMS,
    NORMS,
    OUTPUT_LAYER_NORM,
    QK_NORMS,
    SILU,
    VOCAB_SIZE,
    Architecture,
    Change,
    Sizes,
    attention,
    counts,
    either,
    experts,
    flags,
    gated,
    linear,
    norm,
    optional,
    reals,
    tensor,
)
from qrun.models.huggingface.tensors import uniform
from qrun.models.hyperparameters import MAX_EXPERTS, MAX_HEADS

SELECTION_BIAS = optional(
    tensor("mlp.gate.e_score_correction_bias", "exp_probs_b.bias", "experts"),
    tensor("mlp.gate.expert_bias", "exp_probs_b.bias", "experts"),
    tensor("mlp.expert_bias", "exp_probs_b.bias", "experts"),
)
SHARED = gated("mlp.shared_experts", end="_shexp", width="*")


def _windows(facts: Facts) -> None:
    config, n_layers = facts.config, facts.sizes["layers"]
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return
    facts.count("attention.sliding_window", config.integer("sliding_window"))
    if (kinds := config.layer_kinds(n_layers)) is not None:
        facts.flags("attention.sliding_window_pattern", [kind == "sliding_attention" for kind in kinds])


# gpt-oss: experts with biases, gates and inputs of which take turns.


_WIDE = upright("twice_expert_ff", "embd")
_GPT_OSS = Architecture(
    "gpt-oss",
    (
        norm("input_layernorm", "attn_norm"),
        norm("post_attention_layernorm", "post_attention_norm"),
        *attention(),
        tensor("self_attn.sinks", "attn_sinks.weight", "heads"),
        *linear("mlp.router", "ffn_gate_inp", "experts", "embd"),
        tensor("mlp.experts.gate_up_proj", "ffn_gate_exps.weight", "experts * *", then(_WIDE, every(0, 2))),
        tensor("mlp.experts.gate_up_proj", "ffn_up_exps.weight", "experts * *", then(_WIDE, every(1, 2))),
        tensor("mlp.experts.gate_up_proj_bias", "ffn_gate_exps.bias", "experts *", every(0, 2)),
        tensor("mlp.experts.gate_up_proj_bias", "ffn_up_exps.bias", "experts *", every(1, 2)),
        tensor("mlp.experts.down_proj", "ffn_down_exps.weight", "experts * *", upright("embd", "expert_ff")),
        tensor("mlp.experts.down_proj_bias", "ffn_down_exps.bias", "experts embd"),
    ),
    sizes=lambda config, sizes: {"experts": config.integer("num_local_experts"), "expert_ff": sizes["ff"]},
    keys=counts(attention__sliding_window="sliding_window", expert_feed_forward_length="intermediate_size"),
    defaults={"rms_norm_eps": 1e-5, "rope_theta": 150000.0, "head_dim": 64, "num_experts_per_tok": 4},
    period=2, fixed={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
)  # fmt: skip

# Ling and its kin


def _split(start: str, count: str, heads: str = "") -> Change:
    cut = rows(start, count)
    return then(cut, by_order(lambda sizes: side_by_side(sizes[count], sizes[heads]))) if heads else cut


def _bailing_entries(facts: Facts) -> None:
    if facts.config.flag("norm_head"):
        raise facts.config.error("norm_head", "is true, which is not supported")
    facts.real("expert_weights_scale", 1.0)


_SHARED_COUNTS = counts(
    leading_dense_block_count="first_k_dense_replace", expert_feed_forward_length="moe_intermediate_size",
    expert_shared_count="num_shared_experts n_shared_experts",
)  # fmt: skip
_BAILING = Architecture(
    "bailingmoe",
    (
        *NORMS,
        tensor("attention.query_key_value.weight", "attn_q.weight", "qkv embd", _split("0", "q", "heads")),
        tensor("attention.query_key_value.weight", "attn_k.weight", "qkv embd", _split("q", "kv", "kv_heads")),
        tensor("attention.query_key_value.weight", "attn_v.weight", "qkv embd", _split("q+kv", "kv")),
        *linear("attention.dense", "attn_output", "embd", "q"),
        either((*experts(), *SHARED), FEED_FORWARD),
    ),
    embedding="word_embeddings", keys=(*VOCAB_SIZE, *_SHARED_COUNTS, *flags(expert_weights_norm="norm_topk_prob")),
    entries=_bailing_entries, rotated="all",
)  # fmt: skip


def _bailing2_entries(facts: Facts) -> None:
    config = facts.config
    shared = config.integer("moe_intermediate_size") * config.integer("num_shared_experts", 1)
    facts.count("expert_shared_feed_forward_length", config.integer("moe_shared_expert_intermediate_size", shared))


_BAILING2 = Architecture(
    "bailingmoe2",
    (
        *NORMS,
        *linear("attention.query_key_value", "attn_qkv", "qkv", "embd"),
        *linear("attention.dense", "attn_output", "embd", "q"),
        norm("attention.query_layernorm", "attn_q_norm", "head"),
        norm("attention.key_layernorm", "attn_k_norm", "head"),
        either((*experts(), *SELECTION_BIAS, *SHARED), FEED_FORWARD),
    ),
    embedding="word_embeddings", keys=(*VOCAB_SIZE, *_SHARED_COUNTS, *EXPERT_WEIGHTS), entries=_bailing2_entries,
    rotated="part", defaults={"partial_rotary_factor": 0.5}, extra_layers="num_nextn_predict_layers",
    draft=(*DRAFT, *optional(norm("final_layernorm", "layer_output_norm"))),
)  # fmt: skip

# Sarvam: heads turn as a whole, and biases that choose experts count from their mean.


def _about_mean(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
    """In the type that the file has."""

    def rounded(values: F32Array) -> F32Array:
        return dequantize(quantize(values, tensor.type), tensor.type, values.shape)

    def change(values: F32Array) -> F32Array:
        mean = rounded(np.array([values.mean(dtype=np.float64)], np.float32))
        return rounded(values - mean)

    return computed("experts", change)(tensor, sizes)


_SARVAM = replace(
    _BAILING2, rotated="all",
    layer=(
        *_BAILING2.layer[:-1],
        either(
            (*experts(), tensor("mlp.gate.expert_bias", "exp_probs_b.bias", "experts", _about_mean), *SHARED),
            FEED_FORWARD,
        ),
    ),
)  # fmt: skip

# DBRX: experts lie in one matrix of each kind.


def _dbrx_settings(values: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = [values.get(key) for key in ("attn_config", "ffn_config")]
    merged = {key: value for section in inner if isinstance(section, dict) for key, value in section.items()}
    return {key: value for key, value in {**values, **merged}.items() if key not in ("attn_config", "ffn_config")}


def _dbrx_entries(facts: Facts) -> None:
    facts.real("attention.layer_norm_epsilon", 1e-5)
    facts.entries.remove(f"{facts.name}.attention.layer_norm_rms_epsilon")
    act = facts.config.section("ffn_act_fn")
    if (name := act.text("name", "silu")) not in SILU:
        raise act.error("name", f"is {name!r}, which is not supported")


def _in_matrices(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
    """Rows of all experts one after another, as a matrix of each."""
    return ordered(tensor, np.arange(tensor.n_rows), (sizes["experts"], sizes["expert_ff"], sizes["embd"]))


def _dbrx_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    count = config.integer("moe_num_experts", high=MAX_EXPERTS)
    return {"experts": count, "expert_ff": sizes["ff"], "all_ff": count * sizes["ff"]}


_DBRX = Architecture(
    "dbrx",
    (
        norm("norm_attn_norm.norm_1", "attn_norm"), norm("norm_attn_norm.norm_2", "attn_output_norm"),
        tensor("norm_attn_norm.attn.Wqkv.weight", "attn_qkv.weight", "qkv embd"),
        tensor("norm_attn_norm.attn.out_proj.weight", "attn_output.weight", "embd q"),
        tensor("ffn.router.layer.weight", "ffn_gate_inp.weight", "experts embd"),
        tensor("ffn.experts.mlp.w1", "ffn_gate_exps.weight", "all_ff embd", _in_matrices),
        tensor("ffn.experts.mlp.v1", "ffn_up_exps.weight", "all_ff embd", _in_matrices),
        tensor("ffn.experts.mlp.w2", "ffn_down_exps.weight", "all_ff embd",
               then(_in_matrices, transposed)),
    ),
    layers="blocks", embedding="wte", outer=(norm("norm_f", "output_norm"),), settings=_dbrx_settings,
    sizes=_dbrx_sizes, entries=_dbrx_entries,
    keys=reals(attention__clamp_kqv="clip_qkv"), routers_in_full=False, fixed={"moe_normalize_expert_weights": 1},
)  # fmt: skip


# Others


def _minimax_entries(facts: Facts) -> None:
    facts.count("rope.dimension_count", facts.config.integer("rotary_dim", facts.sizes["head"]))
    facts.count("expert_feed_forward_length", facts.sizes["ff"])


_MINIMAX_M2 = Architecture(
    "minimax-m2",
    (
        *NORMS, *attention(),
        norm("self_attn.q_norm", "attn_q_norm", "q"),
        norm("self_attn.k_norm", "attn_k_norm", "kv"),
        *experts("block_sparse_moe", "w1 w3 w2"),
        tensor("block_sparse_moe.e_score_correction_bias", "exp_probs_b.bias", "experts"),
    ),
    entries=_minimax_entries,
)  # fmt: skip


def _ernie_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    return {"experts": config.integer("moe_num_experts"), "expert_ff": config.integer("moe_intermediate_size")}


def _ernie_entries(facts: Facts) -> None:
    config = facts.config
    shared = config.integer("moe_num_shared_experts", 0, low=0)
    facts.count("expert_used_count", config.integer("moe_k", 6))
    last = facts.sizes["layers"] - 1
    if (end := config.integer("moe_layer_end_index", last, low=-1)) not in (-1, last):
        raise config.error("moe_layer_end_index", f"is {end}: layers without experts behind others are not supported")
    facts.count("expert_shared_count", shared)
    if shared:
        facts.count("expert_shared_feed_forward_length", facts.sizes["expert_ff"] * shared)


def _without_drafts(name: str, sizes: Sizes) -> str:
    return "" if name.startswith("mtp_") else name


_ERNIE_MOE = Architecture(
    "ernie4_5-moe",
    (
        *NORMS, *attention(),
        either(
            (
                *experts(),
                *optional(tensor("mlp.moe_statics.e_score_correction_bias", "exp_probs_b.bias", "1 experts")),
                *SHARED,
            ),
            FEED_FORWARD,
        ),
    ),
    sizes=_ernie_sizes, entries=_ernie_entries, rename=_without_drafts,
    keys=counts(
        interleave_moe_layer_step="moe_layer_interval", leading_dense_block_count="moe_layer_start_index",
        expert_feed_forward_length="moe_intermediate_size",
    ),
    defaults={"num_experts_per_tok": 1, "moe_layer_interval": 1, "moe_layer_start_index": 0, "rms_norm_eps": 1e-5},
)  # fmt: skip


def _hunyuan_entries(facts: Facts) -> None:
    facts.count("expert_shared_feed_forward_length", facts.sizes["ff"])
    facts.count("expert_feed_forward_length", facts.sizes["expert_ff"])
    facts.count("expert_used_count", uniform(facts.config, "moe_topk"))
    facts.count("expert_shared_count", uniform(facts.config, "num_shared_expert"))


_AFMOE = Architecture(
    "afmoe",
    (
        norm("input_layernorm", "attn_norm"),
        norm("post_attention_layernorm", "post_attention_norm"),
        norm("pre_mlp_layernorm", "ffn_norm"),
        norm("post_mlp_layernorm", "post_ffw_norm"),
        *QK_NORMS, *attention(),
        *linear("self_attn.gate_proj", "attn_gate", "q", "embd"),
        either((*experts(gate="router.gate"), *SELECTION_BIAS, *SHARED), FEED_FORWARD),
    ),
    keys=(
        *VOCAB_SIZE,
        *counts(
            expert_shared_count="num_shared_experts", expert_feed_forward_length="moe_intermediate_size",
            leading_dense_block_count="num_dense_layers", attention__sliding_window="sliding_window",
        ),
        *flags(expert_weights_norm="route_norm"), *reals(expert_weights_scale="route_scale"),
    ),
    rotated="all", defaults={"score_func": "sigmoid", "route_norm": True}, period=4,
    fixed={"global_attn_every_n_layers": 4, "mup_enabled": True},
)  # fmt: skip


# Exaone with experts


def _exaone_entries(facts: Facts) -> None:
    _windows(facts)
    shared = facts.config.integer("num_shared_experts", 1)
    facts.count("expert_shared_count", shared)
    facts.count("expert_shared_feed_forward_length", facts.sizes["expert_ff"] * shared)
    facts.count("nextn_predict_layers", facts.sizes["drafts"])
    facts.text("rope.scaling.type", "none")


_EXAONE_MOE = Architecture(
    "exaone-moe",
    (
        *NORMS, *QK_NORMS, *attention(),
        either(
            (
                *experts(), *SHARED,
                *optional(tensor("mlp.e_score_correction_bias", "exp_probs_b.bias", "experts")), *SELECTION_BIAS,
            ),
            FEED_FORWARD,
        ),
    ),
    entries=_exaone_entries, rename=draft_layers, extra_layers="num_nextn_predict_layers", draft=DRAFT,
    keys=(
        *VOCAB_SIZE, *EXPERT_WEIGHTS,
        *counts(
            expert_feed_forward_length="moe_intermediate_size",
            leading_dense_block_count="first_k_dense_replace first_last_k_dense_replace",
        ),
    ),
    fixed={"sliding_window_pattern": 4},
)  # fmt: skip

# Hunyuan 3


def _hy3_draft(name: str, sizes: Sizes) -> str:
    return name.replace(".final_layernorm.", ".shared_head.norm.")


def _hy3_entries(facts: Facts) -> None:
    config = facts.config
    shared = config.integer("num_shared_experts", 1)
    facts.count("expert_shared_feed_forward_length", facts.sizes["expert_ff"] * shared)
    facts.flag("expert_weights_norm", config.flag("route_norm", True))
    facts.real("expert_weights_scale", config.real("router_scaling_factor", 1.0))
    facts.count("expert_gating_func", GATING["sigmoid"])


_HY3 = Architecture(
    "hy_v3",
    (
        *NORMS, *QK_NORMS, *attention(),
        either(
            (
                *experts(gate="router.gate"), *gated("mlp.shared_mlp", end="_shexp", width="*"),
                *optional(tensor("mlp.expert_bias", "exp_probs_b", "experts")),
            ),
            FEED_FORWARD,
        ),
    ),
    entries=_hy3_entries, rename=_hy3_draft, extra_layers="num_nextn_predict_layers", draft=DRAFT,
    keys=counts(expert_feed_forward_length="moe_intermediate_size"),
)  # fmt: skip

# Laguna: some layers have more heads than others.


def _laguna_entries(facts: Facts) -> None:
    config, sizes = facts.config, facts.sizes
    heads = config.get("num_attention_heads_per_layer") or [sizes["heads"]] * sizes["layers"]
    if not isinstance(heads, list) or not all(type(n) is int and 0 < n <= MAX_HEADS for n in heads):
        raise config.error("num_attention_heads_per_layer", "is not a list of numbers of heads")
    facts.array("attention.head_count", heads)
    if config.get("sliding_window"):
        facts.count("attention.sliding_window", config.integer("sliding_window"))
        kinds, period = config.get("layer_types"), ("full_attention", *["sliding_attention"] * 3)
        if kinds != [period[layer % 4] for layer in range(sizes["layers"])]:
            raise config.error("layer_types", "is not a layer that sees everything before each three with a window")
    kinds = config.get("mlp_layer_types")
    if isinstance(kinds, list):
        dense = next((layer for layer, kind in enumerate(kinds) if kind != "dense"), len(kinds))
        facts.count("leading_dense_block_count", dense)
    facts.flag("expert_weights_norm", True)
    facts.count("expert_gating_func", GATING["sigmoid"])
    rope = config.section("rope_parameters")
    for kind, end in (("full_attention", ""), ("sliding_attention", "_swa")):
        part = rope.section(kind).real("partial_rotary_factor", 1.0, high=1.0)
        if rope.get(kind) is not None:
            facts.count(f"rope.dimension_count{end}", int(sizes["head"] * part))


_LAGUNA = Architecture(
    "laguna",
    (
        *NORMS, *QK_NORMS,
        *linear("self_attn.q_proj", "attn_q", "*", "embd"),
        *linear("self_attn.k_proj", "attn_k", "kv", "embd"),
        *linear("self_attn.v_proj", "attn_v", "kv", "embd"),
        *linear("self_attn.o_proj", "attn_output", "embd", "*"),
        *linear("self_attn.g_proj", "attn_gate", "*", "embd"),
        either(
            (
                *experts(), *gated("mlp.shared_expert", end="_shexp", width="*"),
                tensor("mlp.experts.e_score_correction_bias", "exp_probs_b.bias", "experts"),
            ),
            FEED_FORWARD,
        ),
    ),
    entries=_laguna_entries,
    keys=(
        *VOCAB_SIZE,
        *counts(
            expert_feed_forward_length="moe_intermediate_size",
            expert_shared_feed_forward_length="shared_expert_intermediate_size",
        ),
        *reals(expert_weights_scale="moe_routed_scaling_factor"),
    ),
    fixed={"moe_apply_router_weight_on_input": False, "moe_router_logit_softcapping": 0.0},
)  # fmt: skip

CLASSES = {
    "GptOssForCausalLM": _GPT_OSS,
    "OlmoeForCausalLM": Architecture(
        "olmoe",
        (
            *NORMS, *attention(), norm("self_attn.q_norm", "attn_q_norm", "q"),
            norm("self_attn.k_norm", "attn_k_norm", "kv"), *experts(),
        ),
        defaults={"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8},
        entries=lambda facts: facts.real("attention.layer_norm_rms_epsilon", 1e-5),
    ),
    "PhiMoEForCausalLM": Architecture(
        "phimoe", (*LAYER_NORMS, *attention(), *experts("block_sparse_moe", "w1 w3 w2")),
        outer=(*OUTPUT_LAYER_NORM, HEAD_BIAS), rotated="all",
        entries=lambda facts: facts.count(
            "rope.scaling.original_context_length", facts.config.integer(
                "original_max_position_embeddings", facts.config.integer("max_position_embeddings")
            )
        ),
        keys=counts(attention__sliding_window="sliding_window"),
        defaults={"num_local_experts": 16, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "sliding_window": 0},
    ),
    "BailingMoeForCausalLM": _BAILING,
    "BailingMoeV2ForCausalLM": _BAILING2,
    "SarvamMoEForCausalLM": _SARVAM,
    "modeling_sarvam_moe.SarvamMoEForCausalLM": _SARVAM,
    "MiniMaxM2ForCausalLM": _MINIMAX_M2,
    "Ernie4_5_MoeForCausalLM": _ERNIE_MOE,
    "HunYuanMoEV1ForCausalLM": Architecture(
        "hunyuan-moe",
        (
            *NORMS, *attention(),
            norm("self_attn.query_layernorm", "attn_q_norm", "head"),
            norm("self_attn.key_layernorm", "attn_k_norm", "head"),
            *experts(gate="gate.wg"), *gated("mlp.shared_mlp", end="_shexp", width="*"),
        ),
        entries=_hunyuan_entries, defaults={"num_experts_per_tok": 1},
    ),
    "AfmoeForCausalLM": _AFMOE,
    "ExaoneMoeForCausalLM": _EXAONE_MOE,
    "ExaoneMoEForCausalLM": _EXAONE_MOE,
    "HYV3ForCausalLM": _HY3,
    "LagunaForCausalLM": _LAGUNA,
    "DbrxForCausalLM": _DBRX,
    "MellumForCausalLM": Architecture(
        "mellum", (*NORMS, *QK_NORMS, *attention(), *experts()), entries=_windows,
        keys=counts(expert_feed_forward_length="moe_intermediate_size"), fixed={"norm_topk_prob": True},
    ),
}  # fmt: skip
