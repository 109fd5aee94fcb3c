"""Mixtures with latent attention that is not the same on all layers: dots3-note, and Hy4 with its hyper-connections."""

from __future__ import annotations

from math import sqrt

import numpy as np

from qrun.formats import ValueType
from qrun.formats.tensors import SourceTensor
from qrun.models.huggingface.changes import in_full, ordered, scaled_by, then, transposed
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import GATING, Facts
from qrun.models.huggingface.families.deepseek import (
    INDEX_KEYS,
    INDEXER,
    LATENT_ATTENTION,
    MIXTURE,
    indexed_sizes,
    latent_entries,
)
from qrun.models.huggingface.layout import (
    DRAFT,
    FEED_FORWARD,
    NORMS,
    VOCAB_SIZE,
    Architecture,
    Change,
    Sizes,
    counts,
    either,
    hyper_connection,
    linear,
    maybe,
    norm,
    reals,
    tensor,
)
from qrun.models.huggingface.tensors import layer_of
from qrun.models.hyperparameters import MAX_CONTEXT, MAX_HEADS

# dots3-note


def _is_local(sizes: Sizes, layer: int) -> bool:
    """Does a layer see a window only? Those that predict further ahead do."""
    return layer >= sizes["layers"] or sizes.config.required_layer_kinds(sizes["layers"])[layer] == "sliding_attention"


def _dots_half(which: str) -> Change:
    """What makes keys, turned about, or values, of what is kept of a token: see deepseek.py."""

    def change(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
        end = "_local" if _is_local(sizes, layer_of(tensor, sizes)) else ""
        heads, plain, value = sizes[f"heads{end}"], sizes[f"plain_dim{end}"], sizes[f"value_dim{end}"]
        if tensor.shape[0] != heads * (plain + value):
            raise tensor.error(f"has {tensor.shape[0]} rows, expected {heads * (plain + value)}")
        rows = np.arange(tensor.shape[0]).reshape(heads, plain + value)
        chosen = rows[:, :plain] if which == "k" else rows[:, plain:]
        return ordered(tensor, chosen.reshape(-1), (heads, chosen.shape[1], tensor.shape[-1]))

    return then(change, transposed) if which == "k" else change


def _rescaled(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
    """What comes behind these norms is multiplied by the root of how much wider the model is, which they can do."""
    if not sizes.config.flag("apply_mla_qkv_lora_rescale"):
        return tensor
    return scaled_by(tensor, sqrt(sizes["embd"] / tensor.row))


def _dots_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    heads = config.integer("swa_num_attention_heads", sizes["heads"], high=MAX_HEADS)
    return indexed_sizes(config, sizes) | {
        "heads_local": heads, "plain_dim_local": config.integer("swa_qk_nope_head_dim"),
        "value_dim_local": config.integer("swa_v_head_dim"),
    }  # fmt: skip


def _dots_name(name: str, sizes: Sizes) -> str:
    if name.startswith(("vision_encoder.", "audio_encoder.")):
        return ""
    return f"layers.{sizes['layers']}.embed_tokens.weight" if name == "mtp.embed_tokens.weight" else name


def _dots_entries(facts: Facts) -> None:
    config, sizes = facts.config, Sizes(facts.config, facts.sizes)
    for key in ("q_lora_rank", "qk_rope_head_dim"):
        if config.get(key) != config.get(f"swa_{key}"):
            raise config.error(f"swa_{key}", f"is not {key}, which GGUF cannot say")
    if config.integer("swa_head_dim", 256) != sizes["plain_dim_local"] + sizes["turned_dim"]:
        raise config.error("swa_head_dim", "is not swa_qk_nope_head_dim and swa_qk_rope_head_dim together")
    latent_entries(facts)
    local = [_is_local(sizes, layer) for layer in range(sizes["layers"])]
    all_local = local + [True] * sizes["drafts"]
    facts.array("attention.head_count", [sizes["heads_local"] if one else sizes["heads"] for one in all_local])
    facts.count("attention.sliding_window", config.integer("sliding_window_size", high=MAX_CONTEXT))
    facts.flags("attention.sliding_window_pattern", local)
    rank, turned = config.integer("swa_kv_lora_rank"), sizes["turned_dim"]
    facts.count("attention.kv_lora_rank_swa", rank)
    facts.count("attention.key_length_swa", rank + turned)
    facts.count("attention.value_length_swa", rank)
    facts.count("attention.key_length_mla_swa", sizes["plain_dim_local"] + turned)
    facts.count("attention.value_length_mla_swa", sizes["value_dim_local"])
    facts.flags("attention.indexer.types", [not one for one in local])


_DOTS3 = Architecture(
    "dots3note",
    (
        *NORMS,
        *linear("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa", "*", "embd"),
        tensor("self_attn.kv_a_layernorm.weight", "attn_kv_a_norm.weight", "*", _rescaled),
        tensor("self_attn.kv_b_proj.weight", "attn_k_b.weight", "* *", _dots_half("k")),
        tensor("self_attn.kv_b_proj.weight", "attn_v_b.weight", "* *", _dots_half("v")),
        *linear("self_attn.q_a_proj", "attn_q_a", "q_rank", "embd"),
        tensor("self_attn.q_a_layernorm.weight", "attn_q_a_norm.weight", "q_rank", _rescaled),
        tensor("self_attn.q_b_proj.weight", "attn_q_b.weight", "* q_rank"),
        norm("self_attn.k_rope_only_layernorm", "attn_k_norm", "turned_dim"),
        tensor("self_attn.g_proj.weight", "attn_gate.weight", "* embd"),
        *linear("self_attn.o_proj", "attn_output", "embd", "*"),
        maybe(*INDEXER),
        either(MIXTURE, FEED_FORWARD),
    ),
    sizes=_dots_sizes, entries=_dots_entries, rename=_dots_name, extra_layers="num_nextn_predict_layers", draft=DRAFT,
    keys=(*VOCAB_SIZE, *INDEX_KEYS),
    fixed={"use_dsa": True, "normalization": "RMSNorm", "final_norm": "RMSNorm", "k_rope_only_layernorm": True,
           "topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": 1, "topk_group": 1,
           "use_dynamic_rsf": False, "moe_gating_fp32": False, "attention_gate_type": "headwise",
           "swa_attention_gate_type": "headwise"},
)  # fmt: skip

# Hy4


def _hy4_entries(facts: Facts) -> None:
    config, n_layers = facts.config, facts.sizes["layers"]
    latent_entries(facts)
    if config.get("n_group", 1) == 1 and config.get("topk_group", 1) == 1:
        for key in ("expert_group_count", "expert_group_used_count"):
            facts.entries.remove(f"{facts.name}.{key}")
    kinds = config.get("mlp_layer_types")
    if isinstance(kinds, list):
        dense = next((layer for layer, kind in enumerate(kinds) if kind != "dense"), len(kinds))
        if "dense" in kinds[dense:] or config.integer("first_k_dense_replace", dense, low=0) != dense:
            raise config.error("mlp_layer_types", "are not first_k_dense_replace times 'dense' and then others")
        facts.count("leading_dense_block_count", dense)
    facts.count("expert_gating_func", GATING["sigmoid"])
    if limit := config.real("swiglu_limit", 0.0):
        facts.array("swiglu_clamp_exp", [limit] * n_layers, ValueType.FLOAT32)
    if (own := _own_indexers(config, n_layers)) is not None:
        facts.flags("attention.indexer.types", own)
    else:
        for indexers in INDEX_KEYS:
            facts.entries.remove(f"{facts.name}.{indexers.gguf}")


_SPARSE = ("sparse_attention", "deepseek_sparse_attention")


def _own_indexers(config: Config, n_layers: int) -> list[bool] | None:
    """Of each layer, whether it has an indexer: others take over what the one before them has chosen. None: there are
    none."""
    kinds = config.get("indexer_types")
    if kinds is None:
        sparse = [kind in _SPARSE for kind in config.layer_kinds(n_layers) or ()]
        return sparse if any(sparse) else None
    if not isinstance(kinds, list) or len(kinds) < n_layers or set(map(str, kinds[:n_layers])) - {"full", "shared"}:
        raise config.error("indexer_types", f"is not a list of {n_layers} times 'full' or 'shared'")
    if kinds[0] != "full":
        raise config.error("indexer_types", "has no 'full' in front, and there is none to share")
    return [kind == "full" for kind in kinds[:n_layers]]


def _head_in_full(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
    return in_full(tensor, sizes) if sizes.config.flag("enable_lm_head_fp32") else tensor


_HY4 = Architecture(
    "hy_v4",
    (
        *NORMS,
        *hyper_connection("hc_attn_layer.hc_pre.hc", "hc_attn", in_full),
        *hyper_connection("hc_mlp_layer.hc_pre.hc", "hc_ffn", in_full),
        *LATENT_ATTENTION,
        tensor("self_attn.learnable_sink_param", "attn_sinks.weight", "heads"),
        tensor("self_attn.linear_gate.weight", "attn_gate.weight", "values embd"),
        maybe(*INDEXER),
        either(MIXTURE, FEED_FORWARD),
    ),
    outer=(norm("norm", "output_norm"), *hyper_connection("hc_head.hc_head", "output_hc", in_full)),
    sizes=indexed_sizes, entries=_hy4_entries, head_change=_head_in_full,
    rename=lambda name, sizes: "" if name.startswith("mtp_layers.") else name,
    keys=(*VOCAB_SIZE, *INDEX_KEYS, *counts(hyper_connection__count="hc_mult"),
          *reals(hyper_connection__epsilon="hc_eps", hyper_connection__magnitude="hc_magnitude")),
)  # fmt: skip

CLASSES = {
    "Dots3NoteForCausalLM": _DOTS3,
    "Dots3NoteForConditionalGeneration": _DOTS3,
    "Dots3NoteTextForCausalLM": _DOTS3,
    "HYV4ForCausalLM": _HY4,
}
