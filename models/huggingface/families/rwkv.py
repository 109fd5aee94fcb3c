"""RWKV 6, as its makers publish it for Transformers, RWKV 7, as flash-linear-attention has it, and what was made of
Qwen 2 with either in place of attention."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from qrun.formats.tensors import SourceTensor
from qrun.models.huggingface.changes import computed, ordered, scaled, transposed
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import Facts
from qrun.models.huggingface.families.recurrent import LONG_CONTEXT
from qrun.models.huggingface.layout import (
    FEED_FORWARD,
    NORMS,
    Architecture,
    Mapped,
    Part,
    Sizes,
    Stacked,
    either,
    layer_norm,
    linear,
    maybe,
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

# QRWKV 6 and ARWKV 7: blocks of Qwen 2 with another mixer.


def _in_order(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
    """The five mixtures in the order of RWKV 6: they come as r, k, v, w, g."""
    tensor = transposed(tensor, sizes)
    if tensor.n_rows % 5:
        raise tensor.error(f"has {tensor.n_rows} rows, which are not five equal parts")
    rows = np.arange(tensor.n_rows).reshape(5, -1)[[3, 1, 2, 0, 4]]
    return ordered(tensor, rows.reshape(-1), tensor.shape)


def _qwen_sizes(config: Config, sizes: Sizes, head_size: str) -> Mapping[str, int]:
    width = config.integer(head_size, sizes["embd"] // sizes["heads"], high=MAX_STATE)
    if sizes["embd"] % width:
        raise config.error(head_size, f"is {width}, which does not divide the hidden_size of {sizes['embd']}")
    return {"wkv_heads": sizes["embd"] // width, "wkv_head": width, "heads": 0}


def _qwen_entries(facts: Facts) -> None:
    facts.count("context_length", LONG_CONTEXT)
    facts.count("wkv.head_size", facts.sizes["wkv_head"])
    facts.count("token_shift_count", 1)


def _qwen6_entries(facts: Facts) -> None:
    _qwen_entries(facts)
    facts.count("attention.head_count_kv", facts.sizes["kv_heads"])
    for key in ("attention_hidden_size", "lora_rank_tokenshift", "lora_rank_decay"):
        facts.config.get(key)  # weights say it


_QWEN6 = Architecture(
    "rwkv6qwen2",
    (
        *NORMS, *FEED_FORWARD,
        tensor("self_attn.time_maa_x", "time_mix_lerp_x.weight", "1 1 embd", _ROW),
        Stacked(tuple(f"self_attn.time_maa_{part}" for part in "wkvrg"), "time_mix_lerp_fused.weight",
                ("1", "1", "embd")),
        tensor("self_attn.time_maa_w1", "time_mix_w1.weight", "embd five_mix_extra", _in_order),
        tensor("self_attn.time_maa_w2", "time_mix_w2.weight", "5 mix_extra embd", _in_order),
        tensor("self_attn.time_decay", "time_mix_decay.weight", "1 1 embd", _ROW),
        tensor("self_attn.time_decay_w1", "time_mix_decay_w1.weight", "embd decay_extra", transposed),
        tensor("self_attn.time_decay_w2", "time_mix_decay_w2.weight", "decay_extra embd", transposed),
        *linear("self_attn.q_proj", "time_mix_receptance", "embd", "embd"),
        *linear("self_attn.k_proj", "time_mix_key", "kv", "embd"),
        *linear("self_attn.v_proj", "time_mix_value", "kv", "embd"),
        *linear("self_attn.gate", "time_mix_gate", "embd", "embd"),
        *linear("self_attn.o_proj", "time_mix_output", "embd", "embd"),
    ),
    sizes=partial(_qwen_sizes, head_size="wkv_head_size"), sizes_of_weights=_extra, of_weights=_extra_entries,
    entries=_qwen6_entries,
)  # fmt: skip


def _qwen7_sizes(config: Config, sizes: Sizes) -> Mapping[str, int]:
    ranks = {"w_rank": 64, "a_rank": 64, "v_rank": 32, "g_rank": 128}  # as all of them have it
    return {**_qwen_sizes(config, sizes, "head_size"), **ranks}


def _qwen7_entries(facts: Facts) -> None:
    _qwen_entries(facts)
    sizes, gate = facts.sizes, facts.config.flag("wkv_has_gate", True)
    for key, name in (("decay", "w"), ("iclr", "a"), ("value_residual_mix", "v"), ("gate", "g")):
        facts.count(f"attention.{key}_lora_rank", sizes[f"{name}_rank"] if gate or name != "g" else 0)


_MIXER = "self_attn.time_mixer"


def _qwen7_name(name: str, sizes: Sizes) -> str:
    """The first layer mixes no values of one before."""
    return "" if re.fullmatch(rf"layers\.0\.{re.escape(_MIXER)}\.v[012]", name) else name


def _small(name: str, gguf: str) -> tuple[Mapped, ...]:
    return (
        tensor(f"{_MIXER}.{name}1", f"time_mix_{gguf}1.weight", f"embd {name}_rank", transposed),
        tensor(f"{_MIXER}.{name}2", f"time_mix_{gguf}2.weight", f"{name}_rank embd", transposed),
        tensor(f"{_MIXER}.{name}0", f"time_mix_{gguf}0.weight", "1 1 embd", _ROW),
    )


_QWEN7 = Architecture(
    "arwkv7",
    (
        *NORMS, *FEED_FORWARD,
        either(
            (
                *_small("g", "g")[:2],
                Stacked(tuple(f"{_MIXER}.x_{part}" for part in "rwkvag"), "time_mix_lerp_fused.weight",
                        ("1", "1", "embd")),
            ),
            (Stacked(tuple(f"{_MIXER}.x_{part}" for part in "rwkva"), "time_mix_lerp_fused.weight",
                     ("1", "1", "embd")),),
        ),
        *_small("w", "w"), *_small("a", "a"), either(_small("v", "v"), _small("a", "v")),
        tensor(f"{_MIXER}.k_k", "time_mix_k_k.weight", "1 1 embd", _ROW),
        tensor(f"{_MIXER}.k_a", "time_mix_k_a.weight", "1 1 embd", _ROW),
        tensor(f"{_MIXER}.r_k", "time_mix_r_k.weight", "wkv_heads wkv_head", _ROW),
        *(tensor(f"{_MIXER}.{name}.weight", f"time_mix_{name}.weight", "embd embd")
          for name in ("receptance", "key", "value", "output")),
        maybe(*layer_norm(f"{_MIXER}.ln_x", "time_mix_ln")),
    ),
    sizes=_qwen7_sizes, entries=_qwen7_entries, rename=_qwen7_name,
    fixed={"wkv_version": 7},
)  # fmt: skip

CLASSES = {
    "RWKV7ForCausalLM": _RWKV7,
    "Rwkv7ForCausalLM": _RWKV7,
    "Rwkv6ForCausalLM": _RWKV6,
    "RWKV6Qwen2ForCausalLM": _QWEN6,
    "RwkvHybridForCausalLM": _QWEN7,
}
