"""RWKV 6, as its makers publish it for Transformers, and RWKV 7, as flash-linear-attention has it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from qrun.formats.tensors import SourceTensor
from qrun.models.huggingface.changes import computed, scaled, transposed
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import Facts
from qrun.models.huggingface.families.recurrent import LONG_CONTEXT
from qrun.models.huggingface.layout import (
    Architecture,
    Mapped,
    Part,
    Sizes,
    Stacked,
    either,
    layer_norm,
    tensor,
)
from qrun.models.hyperparameters import MAX_LAYERS, MAX_STATE

_ROW = computed("embd")
_NO_ATTENTION = {"num_attention_heads": 1, "max_position_embeddings": LONG_CONTEXT, "rms_norm_eps": None}


def _norm(hf: str, gguf: str) -> tuple[Mapped, Mapped]:
    """With a bias, which engines want."""
    weight, bias = layer_norm(hf, gguf)
    return weight, replace(bias, optional=False)


def _size(weights: Mapping[str, SourceTensor], end: str, axis: int) -> int:
    """That of the first tensor whose name ends so; 0 where there is none. axis: from the last one on, -1."""
    shapes = (tensor.shape for name, tensor in weights.items() if name.endswith(end))
    return next((shape[axis] for shape in shapes if len(shape) >= -axis), 0)


def _sizes(config: Config, sizes: Sizes, head_size: str) -> Mapping[str, int]:
    factor = 3.5 if "rescale_every" in config.given() else 4.0
    ff = config.integer("intermediate_size", int(factor * sizes["embd"]) // 32 * 32)
    width = config.integer(head_size, 64, high=MAX_STATE)
    if sizes["embd"] % width:
        raise config.error(head_size, f"is {width}, which does not divide the hidden_size of {sizes['embd']}")
    return {"ff": ff, "heads": 0, "kv_heads": 0, "wkv_heads": sizes["embd"] // width, "wkv_head": width}


def _entries(facts: Facts, epsilon: str) -> None:
    config = facts.config
    facts.real("attention.layer_norm_epsilon", config.real(epsilon, 1e-5, high=1.0))
    facts.entries.remove(f"{facts.name}.attention.layer_norm_rms_epsilon")
    facts.count("wkv.head_size", facts.sizes["wkv_head"])


# RWKV 7


def _seven_entries(facts: Facts) -> None:
    _entries(facts, "norm_eps")


def _ranks(weights: Mapping[str, SourceTensor]) -> Mapping[str, int]:
    """How narrow the rows are from which a layer makes vectors."""
    return {f"{name}_rank": _size(weights, f"attn.{name}_lora.lora.0.weight", -2) for name in "wavg"}


def _rank_entries(facts: Facts, weights: Mapping[str, SourceTensor]) -> None:
    for key, name in (("decay", "w"), ("iclr", "a"), ("value_residual_mix", "v"), ("gate", "g")):
        facts.count(f"attention.{key}_lora_rank", facts.sizes[f"{name}_rank"])


def _narrowed(name: str, gguf: str) -> tuple[Mapped, ...]:
    return (
        tensor(f"attn.{name}_lora.lora.0.weight", f"time_mix_{gguf}1.weight", f"{name}_rank embd"),
        tensor(f"attn.{name}_lora.lora.2.weight", f"time_mix_{gguf}2.weight", f"embd {name}_rank"),
        tensor(f"attn.{name}_lora.lora.2.bias", f"time_mix_{gguf}0.weight", "embd"),
    )


_MATRICES = {"r_proj": "receptance", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
_SEVEN: tuple[Part, ...] = (
    *_norm("attn_norm", "attn_norm"),
    *_norm("ffn_norm", "attn_norm_2"),
    Stacked(tuple(f"attn.x_{part}" for part in "rwkvag"), "time_mix_lerp_fused.weight", ("1", "1", "embd")),
    *(tensor(f"attn.{hf}.weight", f"time_mix_{gguf}.weight", "embd embd") for hf, gguf in _MATRICES.items()),
    *_narrowed("w", "w"),
    *_narrowed("a", "a"),
    # The first layer has none of its own, and engines look for some that they do not use.
    either(_narrowed("v", "v"), _narrowed("a", "v")),
    *_narrowed("g", "g")[:2],
    tensor("attn.k_k", "time_mix_k_k.weight", "embd"),
    tensor("attn.k_a", "time_mix_k_a.weight", "embd"),
    tensor("attn.r_k", "time_mix_r_k.weight", "wkv_heads wkv_head", _ROW),
    *_norm("attn.g_norm", "time_mix_ln"),
    tensor("ffn.x_k", "channel_mix_lerp_k.weight", "embd"),
    tensor("ffn.key.weight", "channel_mix_key.weight", "ff embd"),
    tensor("ffn.value.weight", "channel_mix_value.weight", "embd ff"),
)
_RWKV7 = Architecture(
    "rwkv7", _SEVEN, embedding="embeddings", entries=_seven_entries, ffn=False, own_head=True,
    sizes=partial(_sizes, head_size="head_dim"), sizes_of_weights=_ranks, of_weights=_rank_entries,
    activations=frozenset({"sqrelu"}), outer=(*_norm("layers.0.pre_norm", "token_embd_norm"),
                                               *_norm("norm", "output_norm")),
    fixed={"norm_first": True, "norm_bias": True, "attn": None}, defaults=_NO_ATTENTION,
)  # fmt: skip

# RWKV 6


def _six_entries(facts: Facts) -> None:
    _entries(facts, "layer_norm_epsilon")
    facts.count("rescale_every_n_layers", facts.config.integer("rescale_every", 0, low=0, high=MAX_LAYERS))


def _extra(weights: Mapping[str, SourceTensor]) -> Mapping[str, int]:
    """How narrow the rows are from which a layer makes its five mixtures and its decay."""
    mix, decay = _size(weights, ".time_maa_w2", -2), _size(weights, ".time_decay_w2", -2)
    return {"mix_extra": mix, "five_mix_extra": 5 * mix, "decay_extra": decay}


def _extra_entries(facts: Facts, weights: Mapping[str, SourceTensor]) -> None:
    facts.count("time_mix_extra_dim", facts.sizes["mix_extra"])
    facts.count("time_decay_extra_dim", facts.sizes["decay_extra"])


def _rescaled(source: SourceTensor, sizes: Sizes) -> SourceTensor:
    """Halved every few layers, as engines halve what comes from before."""
    match = re.search(r"blocks\.(\d+)\.", source.name)
    every = sizes.config.integer("rescale_every", 0, low=0, high=MAX_LAYERS)
    times = int(match[1]) // every if match and every else 0
    if not times:
        return source
    return scaled(lambda sizes, n_rows: np.full((1, n_rows), 0.5**times, np.float32))(source, sizes)


_BLOCK = "attention"
_SIX: tuple[Part, ...] = (
    *_norm("ln1", "attn_norm"),
    *_norm("ln2", "attn_norm_2"),
    tensor(f"{_BLOCK}.time_maa_x", "time_mix_lerp_x.weight", "1 1 embd", _ROW),
    Stacked(tuple(f"{_BLOCK}.time_maa_{part}" for part in "wkvrg"), "time_mix_lerp_fused.weight", ("1", "1", "embd")),
    tensor(f"{_BLOCK}.time_maa_w1", "time_mix_w1.weight", "embd five_mix_extra", transposed),
    tensor(f"{_BLOCK}.time_maa_w2", "time_mix_w2.weight", "5 mix_extra embd", transposed),
    tensor(f"{_BLOCK}.time_decay", "time_mix_decay.weight", "1 1 embd", _ROW),
    tensor(f"{_BLOCK}.time_decay_w1", "time_mix_decay_w1.weight", "embd decay_extra", transposed),
    tensor(f"{_BLOCK}.time_decay_w2", "time_mix_decay_w2.weight", "decay_extra embd", transposed),
    tensor(f"{_BLOCK}.time_faaaa", "time_mix_first.weight", "wkv_heads wkv_head"),
    *(tensor(f"{_BLOCK}.{name}.weight", f"time_mix_{name}.weight", "embd embd")
      for name in ("receptance", "key", "value", "gate")),
    tensor(f"{_BLOCK}.output.weight", "time_mix_output.weight", "embd embd", _rescaled),
    *_norm(f"{_BLOCK}.ln_x", "time_mix_ln"),
    tensor("feed_forward.time_maa_k", "channel_mix_lerp_k.weight", "1 1 embd", _ROW),
    tensor("feed_forward.time_maa_r", "channel_mix_lerp_r.weight", "1 1 embd", _ROW),
    tensor("feed_forward.key.weight", "channel_mix_key.weight", "ff embd"),
    tensor("feed_forward.receptance.weight", "channel_mix_receptance.weight", "embd embd"),
    tensor("feed_forward.value.weight", "channel_mix_value.weight", "embd ff", _rescaled),
)  # fmt: skip
_RWKV6 = Architecture(
    "rwkv6", _SIX, layers="blocks", embedding="embeddings", head="head", entries=_six_entries, ffn=False,
    own_head=True,
    sizes=partial(_sizes, head_size="head_size"), sizes_of_weights=_extra, of_weights=_extra_entries,
    rename=lambda name, sizes: name.removeprefix("rwkv."),
    outer=(*_norm("blocks.0.pre_ln", "token_embd_norm"), *_norm("ln_out", "output_norm")),
    fixed={"head_size_divisor": 8}, defaults=_NO_ATTENTION,
)  # fmt: skip

CLASSES = {"RWKV7ForCausalLM": _RWKV7, "Rwkv7ForCausalLM": _RWKV7, "Rwkv6ForCausalLM": _RWKV6}
