"""Qwen of all generations, and models with its tensors: KORMo, dots, Dream."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from qrun.models.huggingface.changes import (
    Order,
    by_columns,
    by_order,
    computed,
    negative_exp,
    squeezed_conv,
    then,
    turned_experts,
)
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import Facts
from qrun.models.huggingface.layout import (
    DRAFT,
    EXPERT_WEIGHTS,
    FEED_FORWARD,
    LENGTHS_OF_EXPERTS,
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

# The first Qwen: the width of the feed-forward layer counts both halves.


def _first_sizes(config: Config, sizes: Sizes) -> Mapping[str, int]:
    return {"half_ff": sizes["ff"] // 2}


def _first_entries(facts: Facts) -> None:
    config, head = facts.config, facts.sizes["head"]
    if config.integer("kv_channels", head) != head:
        raise config.error("kv_channels", f"is not {head}, which is not supported")
    for key in ("use_dynamic_ntk", "use_logn_attn"):  # beyond the trained length, and files cannot say it
        config.get(key)


_QWEN = Architecture(
    "qwen",
    (
        norm("ln_1", "attn_norm"), norm("ln_2", "ffn_norm"),
        *linear("attn.c_attn", "attn_qkv", "qkv", "embd"), *linear("attn.c_proj", "attn_output", "embd", "q"),
        *gated(names="w2 w1 c_proj", width="half_ff"),
    ),
    layers="h", embedding="wte", outer=(norm("ln_f", "output_norm"),), sizes=_first_sizes, entries=_first_entries,
    own_head=True,
    settings=lambda values: {"rms_norm_eps": values.get("layer_norm_epsilon"), "hidden_act": "silu", **values},
    rename=lambda name, sizes: "" if name.startswith("visual.") or name.endswith(".attn.bias") else name,
    fixed={"rotary_pct": 1.0, "scale_attn_weights": True, "fp32": False},
)  # fmt: skip

_QWEN_WINDOW = {"sliding_window": 4096}  # if it is used
_QWEN2 = Architecture(
    "qwen2", (*NORMS, *attention(), *FEED_FORWARD), defaults=_QWEN_WINDOW, windows="later layers"
)  # fmt: skip
_QWEN3 = Architecture(
    "qwen3", (*NORMS, *QK_NORMS, *attention(), *FEED_FORWARD), defaults={"head_dim": 128} | _QWEN_WINDOW,
    windows="later layers",
)  # fmt: skip
_QWEN3_MOE = Architecture(
    "qwen3moe", (*NORMS, *QK_NORMS, *attention(), *experts()),
    defaults={"num_experts": 128, "num_experts_per_tok": 8} | _QWEN_WINDOW,
    windows="all if used",
    keys=LENGTHS_OF_EXPERTS,
)  # fmt: skip

# Experts beside one that all tokens pass, which has a gate of its own.

SHARED_EXPERT = (
    *gated("mlp.shared_expert", end="_shexp", width="*"),
    tensor("mlp.shared_expert_gate.weight", "ffn_gate_inp_shexp.weight", "1 embd"),
)


def _vision_entries(facts: Facts) -> None:
    """How many layers get something of an image added; without the tower, files say so all the same."""
    vision = facts.config.section("vision_config")
    indexes = vision.get("deepstack_visual_indexes")
    facts.count("n_deepstack_layers", len(indexes) if isinstance(indexes, list) else 0)


# Layers with a state: gated delta nets.


def _delta_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    keys, values = config.integer("linear_num_key_heads"), config.integer("linear_num_value_heads")
    key, value = config.integer("linear_key_head_dim"), config.integer("linear_value_head_dim")
    if values % keys:
        raise config.error("linear_num_value_heads", f"is {values}, which {keys} key heads do not divide")
    inner, qk = values * value, 2 * keys * key
    return {
        "key_heads": keys, "value_heads": values, "key_dim": key, "value_dim": value, "inner": inner,
        "conv_channels": qk + inner, "conv_kernel": config.integer("linear_conv_kernel_dim", 4), "qkvz": qk + 2 * inner,
        "ba": 2 * values, "twice_q": 2 * sizes["q"],
    }  # fmt: skip


def _tiled(sizes: Sizes, width: int) -> Order:
    """Value heads of one key head lie together in a checkpoint; in GGUF files the first of each key head come first."""
    keys = sizes["key_heads"]
    return np.arange(sizes["value_heads"] * width).reshape(keys, -1, width).swapaxes(0, 1).reshape(-1)


def _behind_keys(sizes: Sizes) -> Order:
    """Rows of queries and keys as they are, and values reordered behind them."""
    n = 2 * sizes["key_heads"] * sizes["key_dim"]
    return np.concatenate([np.arange(n), n + _tiled(sizes, sizes["value_dim"])])


def _values(sizes: Sizes) -> Order:
    return _tiled(sizes, sizes["value_dim"])


def _heads(sizes: Sizes) -> Order:
    return _tiled(sizes, 1)


_A = computed("value_heads", negative_exp)


def _conv(order: Callable[[Sizes], Order] | None) -> Change:
    return then(squeezed_conv, by_order(order)) if order else squeezed_conv


def _unscrambled(which: str) -> Change:
    """Of queries, keys, values and gates of one key head after another."""

    def order(sizes: Sizes) -> Order:
        keys, key = sizes["key_heads"], sizes["key_dim"]
        value = sizes["inner"] // keys
        rows = np.arange(sizes["qkvz"]).reshape(keys, -1)
        ends = np.cumsum([key, key, value, value])
        pieces = np.split(rows, ends[:-1], axis=1)
        chosen = pieces[:3] if which == "qkv" else pieces[3:]
        return np.concatenate([piece.reshape(-1) for piece in chosen])

    return by_order(order)


def _delta_net(tiled: bool):  # type: ignore[no-untyped-def]
    """tiled: see _tiled."""
    order = (lambda change: by_order(change)) if tiled else (lambda change: None)
    return (
        either(
            (
                tensor("linear_attn.in_proj_qkv.weight", "attn_qkv.weight", "conv_channels embd", order(_behind_keys)),
                tensor("linear_attn.in_proj_z.weight", "attn_gate.weight", "inner embd", order(_values)),
            ),
            (
                tensor("linear_attn.in_proj_qkvz.weight", "attn_qkv.weight", "qkvz embd", _unscrambled("qkv")),
                tensor("linear_attn.in_proj_qkvz.weight", "attn_gate.weight", "qkvz embd", _unscrambled("z")),
            ),
        ),
        either(
            (tensor("linear_attn.in_proj_ba.weight", "ssm_ba.weight", "ba embd"),),
            (
                tensor("linear_attn.in_proj_b.weight", "ssm_beta.weight", "value_heads embd", order(_heads)),
                tensor("linear_attn.in_proj_a.weight", "ssm_alpha.weight", "value_heads embd", order(_heads)),
            ),
        ),
        tensor("linear_attn.A_log", "ssm_a", "value_heads", then(_A, by_order(_heads)) if tiled else _A),
        tensor("linear_attn.dt_bias", "ssm_dt.bias", "value_heads", order(_heads)),
        tensor("linear_attn.conv1d.weight", "ssm_conv1d.weight", "conv_channels 1 conv_kernel",
               _conv(_behind_keys if tiled else None)),
        tensor("linear_attn.norm.weight", "ssm_norm.weight", "value_dim", computed("value_dim")),
        tensor("linear_attn.out_proj.weight", "ssm_out.weight", "embd inner", by_columns(_values) if tiled else None),
    )  # fmt: skip


_GATED_ATTENTION = (
    *linear("self_attn.q_proj", "attn_q", "twice_q", "embd"),
    *linear("self_attn.k_proj", "attn_k", "kv", "embd"),
    *linear("self_attn.v_proj", "attn_v", "kv", "embd"),
    *linear("self_attn.o_proj", "attn_output", "embd", "q"),
    *QK_NORMS,
)
_HYBRID_NORMS = (norm("input_layernorm", "attn_norm"), norm("post_attention_layernorm", "post_attention_norm"))
_DRAFT_NAMES = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm",
                "norm": "shared_head.norm"}  # fmt: skip


def draft_layers(name: str, sizes: Sizes) -> str:
    """Layers that predict tokens further ahead come behind the others."""
    if not name.startswith("mtp."):
        return name
    parts = name.split(".")
    if parts[1] == "layers" and len(parts) > 3 and re.fullmatch(r"\d{1,9}", parts[2]):
        return f"layers.{sizes['layers'] + int(parts[2])}.{'.'.join(parts[3:])}"
    return f"layers.{sizes['layers']}.{_DRAFT_NAMES.get(parts[1], parts[1])}.{'.'.join(parts[2:])}"


def _delta_entries(facts: Facts) -> None:
    config, sizes = facts.config, facts.sizes
    facts.count("ssm.conv_kernel", sizes["conv_kernel"])
    facts.count("ssm.state_size", sizes["key_dim"])
    facts.count("ssm.group_count", sizes["key_heads"])
    facts.count("ssm.time_step_rank", sizes["value_heads"])
    facts.count("ssm.inner_size", sizes["inner"])
    if config.get("layer_types") is not None:
        recurrent = [kind == "linear_attention" for kind in config.required_layer_kinds(sizes["layers"])]
        facts.flags("attention.recurrent_layers", recurrent + [False] * sizes["drafts"])
    facts.count("full_attention_interval", config.integer("full_attention_interval", 4))


def _qwen35_entries(facts: Facts) -> None:
    _delta_entries(facts)
    if f"{facts.name}.rope.dimension_sections" not in facts.entries.values:
        facts.array("rope.dimension_sections", [11, 11, 10, 0])


def _hybrid(name: str, feed_forward: tuple[Part, ...], tiled: bool) -> Architecture:
    return Architecture(
        name, (*_HYBRID_NORMS, either(_GATED_ATTENTION, _delta_net(tiled)), *feed_forward), norm_shift=1.0,
        sizes=_delta_sizes, entries=_qwen35_entries if tiled else _delta_entries, rename=draft_layers,
        extra_layers="mtp_num_hidden_layers", draft=DRAFT, rotated="part", ffn=False,
        keys=LENGTHS_OF_EXPERTS if feed_forward is not FEED_FORWARD else (), fixed={"norm_topk_prob": True},
        defaults={"num_experts": 512, "num_experts_per_tok": 10, "partial_rotary_factor": 0.25, "head_dim": 256},
    )  # fmt: skip


_EITHER_FF = (either((*experts(), *SHARED_EXPERT), FEED_FORWARD),)
_QWEN35 = _hybrid("qwen35", FEED_FORWARD, True)
QWEN35_MOE = _hybrid("qwen35moe", _EITHER_FF, True)

# Those that see: their language model alone.

_QWEN2_VL = replace(_QWEN2, name="qwen2vl", windows="")
_QWEN3_VL = replace(_QWEN3, name="qwen3vl", windows="", entries=_vision_entries)
_QWEN3_VL_MOE = replace(
    _QWEN3_MOE, name="qwen3vlmoe", windows="", entries=_vision_entries,
    layer=(*NORMS, *QK_NORMS, *attention(), either(turned_experts("mlp"), experts())),
)  # fmt: skip


def _rnd1_entries(facts: Facts) -> None:
    facts.flag("attention.causal", False)
    if facts.config.get("mask_token_id") is not None:
        facts.entries.count("tokenizer.ggml.mask_token_id", facts.config.integer("mask_token_id", low=0))


_DOTS1 = Architecture(
    "dots1",
    (
        *NORMS, *QK_NORMS, *attention(),
        either(
            (
                *experts(),
                *gated("mlp.shared_experts", end="_shexp", width="*"),
                *optional(tensor("mlp.gate.e_score_correction_bias", "exp_probs_b.bias", "experts")),
            ),
            FEED_FORWARD,
        ),
    ),
    keys=(
        *LENGTHS_OF_EXPERTS, *EXPERT_WEIGHTS,
        *counts(leading_dense_block_count="first_k_dense_replace", expert_shared_count="n_shared_experts"),
    ),
)  # fmt: skip


CLASSES = {
    "QWenLMHeadModel": _QWEN,
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen2Model": replace(_QWEN2, embeds=True),
    "Qwen2AudioForConditionalGeneration": _QWEN2,
    "AudioFlamingo3ForConditionalGeneration": _QWEN2,
    "DotsOCRForCausalLM": _QWEN2,
    "KORMoForCausalLM": replace(
        _QWEN2, layer=(
            norm("pre_attention_layernorm", "attn_norm"), norm("pre_mlp_layernorm", "ffn_norm"), *attention(),
            *FEED_FORWARD,
        ), windows="",
    ),
    "Qwen3ForCausalLM": _QWEN3,
    "Qwen3Model": replace(_QWEN3, embeds=True),
    "StepVLForConditionalGeneration": _QWEN3,
    "Qwen3MoeForCausalLM": _QWEN3_MOE,
    "Qwen2MoeForCausalLM": Architecture(
        "qwen2moe",
        (*NORMS, *attention(), either((*experts(), *SHARED_EXPERT), FEED_FORWARD)), keys=LENGTHS_OF_EXPERTS,
        defaults={"num_experts": 60, "num_experts_per_tok": 4}, fixed={"norm_topk_prob": False},
    ),
    "Qwen3NextForCausalLM": _hybrid("qwen3next", _EITHER_FF, False),
    "Qwen3_5ForCausalLM": _QWEN35,
    "Qwen3_5ForConditionalGeneration": _QWEN35,
    "MiniCPMV4_6ForConditionalGeneration": _QWEN35,
    "Qwen3_5MoeForCausalLM": QWEN35_MOE,
    "Qwen3_5MoeForConditionalGeneration": QWEN35_MOE,
    "Qwen2VLForConditionalGeneration": _QWEN2_VL,
    "Qwen2_5_VLForConditionalGeneration": _QWEN2_VL,
    "Qwen2_5OmniModel": _QWEN2_VL,
    "Qwen2VLModel": _QWEN2_VL,
    "Qwen3VLForConditionalGeneration": _QWEN3_VL,
    "Qwen3ASRForConditionalGeneration": _QWEN3_VL,
    "Qwen3VLMoeForConditionalGeneration": _QWEN3_VL_MOE,
    "Qwen3OmniMoeForConditionalGeneration": _QWEN3_VL_MOE,
    "RND1": replace(
        _QWEN3_MOE, name="rnd1", windows="", entries=_rnd1_entries, fixed={"norm_topk_prob": True}
    ),
    "DreamModel": replace(_QWEN2, name="dream", windows="", entries=_rnd1_entries),
    "Dots1ForCausalLM": _DOTS1,
}  # fmt: skip
