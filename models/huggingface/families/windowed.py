"""Mixtures whose layers with a window have other heads than the rest: MiMo V2, Step 3.5 and 3.7."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from qrun.formats import ValueType
from qrun.formats.checkpoints import DEVICES, ScaledTensor, parts_of
from qrun.formats.tensors import SourceTensor
from qrun.models.huggingface.changes import ordered
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import Facts
from qrun.models.huggingface.families.mixtures import SELECTION_BIAS
from qrun.models.huggingface.layout import (
    DRAFT,
    FEED_FORWARD,
    NORMS,
    QK_NORMS,
    Architecture,
    Sizes,
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
from qrun.models.huggingface.tensors import layer_of
from qrun.models.hyperparameters import MAX_CONTEXT, MAX_EXPERTS, MAX_HEADS

# MiMo V2

MIMO_DRAFTS = 3  # which config.json does not say


def _mimo_windows(config: Config, sizes: Mapping[str, int]) -> list[bool]:
    """Of each layer, whether it sees a window: those that predict further ahead do."""
    pattern = config.integers("hybrid_layer_pattern", low=0, high=1)
    if len(pattern) != sizes["layers"]:
        raise config.error("hybrid_layer_pattern", f"is not a list of {sizes['layers']} numbers")
    return [kind == 1 for kind in pattern] + [True] * sizes["drafts"]


def _whole_rows(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
    """Queries, keys and values in one matrix: 8-bit ones are stored as for several devices, one after the other, each
    with a part of all three. Their number follows from how many blocks have scales."""
    if not isinstance(tensor, ScaledTensor):
        return tensor
    config, layer = sizes.config, layer_of(tensor, sizes)
    windowed = layer >= sizes["layers"] or _mimo_windows(config, sizes)[layer]
    key = "swa_num_key_value_heads" if windowed else "num_key_value_heads"
    kv_heads = config.integer(key, high=MAX_HEADS)
    parts = (sizes["q"], kv_heads * sizes["head"], kv_heads * sizes["value_head"])
    total, n_blocks = sum(parts), len(tensor.scale)
    if tensor.shape[0] != total:
        raise tensor.error(f"has {tensor.shape[0]} rows, expected {total}")
    devices = parts_of(total, n_blocks, tensor.block[0], DEVICES)
    if not devices or any(size % devices for size in parts):
        raise tensor.error(f"has {total} rows and {n_blocks} rows of scales: for how many devices is not known")
    starts = np.cumsum([0, *(size // devices for size in parts)])
    rows = np.arange(total).reshape(devices, total // devices)
    return ordered(tensor, np.concatenate([rows[:, start:end].reshape(-1) for start, end in pairwise(starts)]))


def _mimo_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    return {"value_head": config.integer("v_head_dim", sizes["head"])}


def _mimo_name(name: str, sizes: Sizes) -> str:
    """Layers that predict further ahead come behind the others."""
    name = name.removesuffix(".weight") if name.endswith("attention_sink_bias.weight") else name
    match = re.fullmatch(r"mtp\.layers\.(\d{1,4})\.(.*)", name)
    return name if match is None else f"layers.{sizes['layers'] + int(match[1])}.{match[2]}"


def _mimo_entries(facts: Facts) -> None:
    config, sizes = facts.config, facts.sizes
    for key in ("head_dim", "num_attention_heads", "v_head_dim"):
        if config.get(f"swa_{key}") not in (None, config.get(key)):
            raise config.error(f"swa_{key}", f"is not {key}, which is not supported")
    config.get("moe_layer_freq")  # weights say it by being there
    windowed = _mimo_windows(config, sizes)
    few, many = (config.integer(key, high=MAX_HEADS) for key in ("num_key_value_heads", "swa_num_key_value_heads"))
    facts.array("attention.head_count_kv", [many if inside else few for inside in windowed])
    facts.count("attention.sliding_window", config.integer("sliding_window", high=MAX_CONTEXT))
    facts.array("attention.sliding_window_pattern", [int(inside) for inside in windowed])
    facts.count("attention.value_length", sizes["value_head"])
    part = config.rope().real("partial_rotary_factor", config.real("partial_rotary_factor", 1.0, high=1.0), high=1.0)
    facts.count("rope.dimension_count", int(sizes["head"] * part))
    facts.real("attention.layer_norm_rms_epsilon", config.real("layernorm_epsilon", 1e-5, high=1.0))


_MIMO = Architecture(
    "mimo2",
    (
        norm("input_layernorm", "attn_norm"),
        either((norm("post_attention_layernorm", "ffn_norm"),), (norm("pre_mlp_layernorm", "ffn_norm"),)),
        either(
            (tensor("self_attn.qkv_proj.weight", "attn_qkv.weight", "* embd", _whole_rows),),
            tuple(part for n in "qkv" for part in linear(f"self_attn.{n}_proj", f"attn_{n}", "*", "embd")),
        ),
        *linear("self_attn.o_proj", "attn_output", "embd", "*"),
        *optional(tensor("self_attn.attention_sink_bias", "attn_sinks.weight", "heads")),
        either((*experts(), *SELECTION_BIAS), FEED_FORWARD),
    ),
    sizes=_mimo_sizes, entries=_mimo_entries, rename=_mimo_name, extra_layers="num_nextn_predict_layers",
    draft=(*DRAFT, *optional(norm("final_layernorm", "layer_output_norm"))),
    keys=(
        *counts(expert_feed_forward_length="moe_intermediate_size"),
        *reals(attention__value_scale="attention_value_scale"),
    ),
    defaults={"num_nextn_predict_layers": MIMO_DRAFTS}, fixed={"topk_method": "noaux_tc", "norm_topk_prob": True},
)  # fmt: skip

# Step 3.5 and 3.7


def _step_settings(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The bases of layers that see everything and of others lie in one list."""
    bases = values.get("rope_theta")
    if not isinstance(bases, list) or len(bases) < 2:
        return values
    return {**values, "rope_theta": bases[0], "rope_local_base_freq": bases[1]}


def _step_windows(config: Config, sizes: Mapping[str, int]) -> list[bool]:
    """Of each layer, whether it sees a window: what the file does not say sees everything."""
    kinds = config.get("layer_types", [])
    if not isinstance(kinds, list):
        raise config.error("layer_types", "is not a list")
    n_blocks = sizes["layers"] + sizes["drafts"]
    return ([kind == "sliding_attention" for kind in kinds] + [False] * n_blocks)[:n_blocks]


def _step_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    half = sizes["head"] // 2  # that turns, of heads that see everything; of others as many pairs do
    return {
        "rope_head": half, "pairs": half, "expert_ff": config.integer("moe_intermediate_size"),
        "experts": config.integer("moe_num_experts", high=MAX_EXPERTS),
    }  # fmt: skip


def _step_entries(facts: Facts) -> None:
    config, windowed = facts.config, _step_windows(facts.config, facts.sizes)
    factors = config.get("partial_rotary_factors", [])
    if not isinstance(factors, list) or any(
        factor != (1.0 if inside else 0.5) for factor, inside in zip(factors, windowed, strict=False)
    ):
        raise config.error("partial_rotary_factors", "are not 1 on layers with a window and 0.5 on others")
    other = config.section("attention_other_setting")
    for key, hf in (("head_count", "num_attention_heads"), ("head_count_kv", "num_attention_groups")):
        heads = config.integer(hf, high=MAX_HEADS)
        inner = other.integer(hf, heads, high=MAX_HEADS)
        facts.array(f"attention.{key}", [inner if inside else heads for inside in windowed])
    facts.count("attention.sliding_window", config.integer("sliding_window", high=MAX_CONTEXT))
    facts.flags("attention.sliding_window_pattern", windowed)
    layers = config.text("moe_layers_enum").split(",")
    numbers = [int(layer) for layer in layers if layer.strip().isdecimal() and len(layer) < 6]
    facts.count("leading_dense_block_count", min(numbers, default=0))
    facts.count("moe_every_n_layers", config.integer("moe_every_n_layer", 1))
    for key, hf in (("exp", "swiglu_limits"), ("shexp", "swiglu_limits_shared")):
        limits = config.get(hf)
        if limits is None:
            continue
        if not isinstance(limits, list) or not all(value is None or type(value) in (int, float) for value in limits):
            raise config.error(hf, "is not a list of numbers")
        n_blocks = len(windowed)
        given = [0.0 if value is None else float(value) for value in limits[:n_blocks]]
        facts.array(f"swiglu_clamp_{key}", given + [0.0] * (n_blocks - len(given)), ValueType.FLOAT32)


def _step_name(name: str, sizes: Sizes) -> str:
    if name.endswith(".moe.router_bias.bias"):
        name = name.removesuffix(".bias")
    match = re.match(r"layers\.(\d{1,4})\.", name)
    if match is None or int(match[1]) < sizes["layers"]:
        return name
    return name.replace(".transformer.", ".").replace("shared_head.output", "shared_head.head")


_STEP = Architecture(
    "step35",
    (
        *NORMS, *QK_NORMS,
        *linear("self_attn.q_proj", "attn_q", "*", "embd"), *linear("self_attn.k_proj", "attn_k", "*", "embd"),
        *linear("self_attn.v_proj", "attn_v", "*", "embd"), *linear("self_attn.o_proj", "attn_output", "embd", "*"),
        *optional(tensor("self_attn.g_proj.weight", "attn_gate.weight", "* embd")),
        either(
            (
                tensor("moe.gate.weight", "ffn_gate_inp.weight", "experts embd"),
                *optional(tensor("moe.router_bias", "exp_probs_b.bias", "experts")),
                tensor("moe.gate_proj.weight", "ffn_gate_exps.weight", "experts expert_ff embd"),
                tensor("moe.up_proj.weight", "ffn_up_exps.weight", "experts expert_ff embd"),
                tensor("moe.down_proj.weight", "ffn_down_exps.weight", "experts embd expert_ff"),
                *gated("share_expert", end="_shexp", width="*"),
            ),
            FEED_FORWARD,
        ),
    ),
    norm_shift=1.0, sizes=_step_sizes, entries=_step_entries, rename=_step_name, settings=_step_settings,
    extra_layers="num_nextn_predict_layers", draft=DRAFT,
    keys=(
        *counts(
            expert_feed_forward_length="moe_intermediate_size", expert_shared_feed_forward_length="share_expert_dim",
        ),
        *reals(expert_weights_scale="moe_router_scaling_factor"), *flags(expert_weights_norm="norm_expert_weight"),
    ),
    defaults={"rms_norm_eps": 1e-5},
    fixed={"yarn_only_types": ["full_attention"], "zero_centered": True, "att_impl_type": "GQA",
           "use_head_wise_attn_gate": True, "use_moe_router_bias": True, "need_fp32_gate": True},
)  # fmt: skip

CLASSES = {
    "MiMoV2FlashForCausalLM": _MIMO,
    "MiMoV2ForCausalLM": _MIMO,
    "Step3p5ForCausalLM": _STEP,
    "Step3p7ForConditionalGeneration": _STEP,
}
