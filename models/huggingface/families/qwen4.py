"""Qwen 4: the attention, delta nets and experts of Qwen 3.5 behind hyper-connections, an indexer, and a table whose
rows the last few tokens point to, cut into shards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from qrun.formats import FormatError, ValueType
from qrun.formats.checkpoints import UnreadTensor
from qrun.formats.tensors import SourceTensor
from qrun.models.huggingface.changes import computed, ordered, rows
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import Facts
from qrun.models.huggingface.families.qwen import QWEN35_MOE, draft_layers
from qrun.models.huggingface.layout import Architecture, Beside, Joined, Part, Sizes, counts, maybe, norm, tensor
from qrun.models.huggingface.tensors import INDEX_TYPES
from qrun.models.hyperparameters import MAX_CONTEXT, MAX_HEAD_DIM, MAX_HEADS

TABLE = "ple.ple_embedding"
# From which its constants were made: files have these.
MADE_FROM = ("ple_embed_dim", "ngram_vocab_size_base", "seed", "make_ngram_vocab_size_divisible_by")
# The constants of the table's hashes, and their keys.
HASHES = {
    "layer_multipliers": "ple.layer_multipliers", "ngram_heads_offsets": "ple.head_offsets",
    "ngram_heads_vocab_sizes": "ple.head_vocab_sizes",
}  # fmt: skip
# Parts of what predicts tokens further ahead that Qwen 3.5 has not.
_DRAFT_NAMES = {"fc_embedding": "fc_embedding", "fc_hidden": "fc_hidden", "hyper_connection_mixer": "mixer"}


def _streams(hf: str, gguf: str) -> tuple[Part, ...]:
    return (
        norm(f"{hf}.hc_norm", f"{gguf}_norm", "streams"),
        tensor(f"{hf}.input_mix_weight_down.weight", f"{gguf}_down.weight", "narrow streams"),
        tensor(f"{hf}.input_mix_weight_up.weight", f"{gguf}_up.weight", "streams narrow"),
    )


def _without_ones(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
    return ordered(tensor, np.arange(tensor.n_rows), (tensor.n_rows, tensor.row))


_PLUS_ONE = computed("streams", lambda values: values + np.float32(1))
_INDEX_NORM = computed("index_dim", lambda values: values + np.float32(1))
_INDEXER = "self_attn.indexer"
_MORE: tuple[Part, ...] = (
    *_streams("attn_hyper_connection", "hc_attn"), *_streams("mlp_hyper_connection", "hc_ffn"),
    tensor("attn_hyper_connection.block_inject_weight.weight", "hc_attn_inject.weight", "hc streams"),
    tensor("mlp_hyper_connection.block_inject_weight.weight", "hc_ffn_inject.weight", "hc streams"),
    maybe(
        tensor(f"{_INDEXER}.index_qk_proj.weight", "indexer.q_proj.weight", "index_qk embd", rows("0", "index_q")),
        tensor(f"{_INDEXER}.index_qk_proj.weight", "indexer.k_proj.weight", "index_qk embd",
               rows("index_q", "index_dim")),
        tensor(f"{_INDEXER}.q_layernorm.weight", "indexer.q_norm.weight", "index_dim", _INDEX_NORM),
        tensor(f"{_INDEXER}.k_layernorm.weight", "indexer.k_norm.weight", "index_dim", _INDEX_NORM),
    ),
    maybe(
        tensor("ple.key_proj.weight", "ple_key.weight", "streams *"),
        tensor("ple.value_proj.weight", "ple_value.weight", "embd *"),
        *(tensor(f"ple.norm_{name}.weight", f"ple_norm_{name}.weight", "streams", _PLUS_ONE)
          for name in ("key", "query", "conv")),
        tensor("ple.conv1d.weight", "ple_conv1d.weight", "streams 1 ple_taps", _without_ones),
    ),
)  # fmt: skip


def _sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    assert QWEN35_MOE.sizes
    hc = config.integer("hc_count", 4, low=2, high=64)
    heads = config.integer("indexer_n_heads", 1, high=MAX_HEADS)
    dim = config.integer("indexer_head_dim", 1, high=MAX_HEAD_DIM)
    return {
        **QWEN35_MOE.sizes(config, sizes), "hc": hc, "streams": hc * sizes["embd"],
        "narrow": config.integer("hc_lowrank", 320), "index_dim": dim, "index_q": heads * dim,
        "index_qk": (heads + 1) * dim, "shards": config.integer("split_ngram_parts", 512, high=1 << 16),
        "ple_taps": config.integer("ple_conv_kernel_size", 4, high=16),
    }  # fmt: skip


def _name(name: str, sizes: Sizes) -> str:
    """The table is of no layer; constants of its hashes are metadata."""
    first, _, rest = name.partition(".")
    inner, _, end = rest.partition(".")
    if first == "mtp" and inner in _DRAFT_NAMES:
        return f"layers.{sizes['layers']}.{_DRAFT_NAMES[inner]}.{end}"
    if (match := re.fullmatch(rf"layers\.\d+\.{TABLE}\.ngram_embedding\.shard_(\d+)\.weight", name)) is not None:
        return f"table.{int(match[1])}.weight" if len(match[1]) < 6 else name
    return "" if any(name.endswith(f"{TABLE}.{constant}") for constant in HASHES) else draft_layers(name, sizes)


def _entries(facts: Facts) -> None:
    config, sizes = facts.config, facts.sizes
    assert QWEN35_MOE.entries
    QWEN35_MOE.entries(facts)
    ratio = config.integer("indexer_compress_ratio", 0, low=0, high=MAX_CONTEXT)
    kinds = config.required_layer_kinds(sizes["layers"])
    attends = [kind in ("full_attention", "indexed_attention") for kind in kinds] + [True] * sizes["drafts"]
    facts.array("attention.compress_ratios", [ratio * one for one in attends])
    for key in MADE_FROM:
        config.get(key)
    with_table = config.integers("ple_layer_ids", high=sizes["layers"]) if config.get("ple_layer_ids") else []
    if not with_table:
        return
    facts.array("ple.layers", [layer - 1 for layer in with_table])
    for key, hf in (("ngram_size", "ngram_size"), ("heads_per_ngram", "heads_per_ngram"),
                    ("conv_kernel", "ple_conv_kernel_size")):  # fmt: skip
        facts.count(f"ple.{key}", config.integer(hf))
    ends = config.integers("eos_token_id", low=0, high=1 << 24)
    facts.count("ple.eos_token_id", ends[-1])
    if config.get("image_token_id") is not None:
        facts.count("ple.image_token_id", config.integer("image_token_id", low=0, high=1 << 24))


def _of_weights(facts: Facts, weights: Mapping[str, SourceTensor]) -> None:
    if f"{facts.name}.ple.layers" not in facts.entries.values:
        return
    found = {name.rpartition(".")[2]: tensor for name, tensor in weights.items() if f"{TABLE}." in name}
    for name, key in HASHES.items():
        tensor = found.get(name)
        if not isinstance(tensor, UnreadTensor) or tensor.stored.dtype not in INDEX_TYPES:
            raise FormatError(facts.config.path.parent, f"tensor {TABLE}.{name}, of whole numbers, is missing")
        facts.array(key, [int(value) for value in tensor.stored.array().reshape(-1)], ValueType.UINT64)
    width = next((tensor.shape[-1] for name, tensor in weights.items() if f"{TABLE}.ngram_embedding.shard_" in name), 0)
    facts.count("embedding_length_per_layer_input", width)


_QWEN4 = replace(
    QWEN35_MOE, name="qwen4exp", layer=(*QWEN35_MOE.layer[2:], *_MORE),
    outer=(
        *_streams("hyper_connection_mixer", "output_hc"),
        maybe(Joined("table.{}.weight", "per_layer_token_embd.weight", ("*", "*"), "shards")),
    ),
    draft=(
        Beside(("fc_embedding.weight", "fc_hidden.weight"), "nextn.eh_proj.weight", ("embd", "embd")),
        norm("enorm", "nextn.enorm"), norm("hnorm", "nextn.hnorm", "*"), *_streams("mixer", "nextn.hc_head"),
    ),
    sizes=_sizes, entries=_entries, rename=_name, of_weights=_of_weights,
    keys=(
        *QWEN35_MOE.keys,
        *counts(
            hyper_connection__count="hc_count", hyper_connection__low_rank="hc_lowrank",
            attention__indexer__head_count="indexer_n_heads", attention__indexer__key_length="indexer_head_dim",
            attention__indexer__top_k="indexer_budget",
        ),
    ),
    fixed={"norm_topk_prob": True, "output_gate_type": "sigmoid", "indexer_kv_heads": 1},
)  # fmt: skip
CLASSES: dict[str, Architecture] = {
    "Qwen4ExpForCausalLM": _QWEN4,
    "Qwen4ExpForConditionalGeneration": _QWEN4,
}
