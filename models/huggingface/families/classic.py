"""Models of the first years: GPT-2, NeoX, Falcon, Bloom, StarCoder, StableLM, Phi, OLMo, Command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import floor, log2, prod

import numpy as np

from qrun.formats.tensors import SourceTensor
from qrun.models.huggingface.changes import Order, by_order, scaled_by, transposed
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import Facts
from qrun.models.huggingface.layout import (
    ANY_GELU,
    FEED_FORWARD,
    HEAD_BIAS,
    LAYER_NORMS,
    NORMS,
    OUTPUT_LAYER_NORM,
    RELU2,
    VOCAB_SIZE,
    Architecture,
    Change,
    Experts,
    Part,
    Sizes,
    attention,
    either,
    flags,
    layer_norm,
    linear,
    maybe,
    norm,
    optional,
    plain,
    reals,
    tensor,
)


def _four_times(config: Config, sizes: Sizes) -> dict[str, int]:
    return {"ff": sizes["ff"] or 4 * sizes["embd"], "thrice_embd": 3 * sizes["embd"]}


def _no_scaling(facts: Facts) -> None:
    facts.text("rope.scaling.type", "none")


# GPT-2: matrices are turned about.


def _conv(hf: str, gguf: str, out: str, width: str) -> tuple[Part, ...]:
    return (
        tensor(f"{hf}.weight", f"{gguf}.weight", f"{width} {out}", transposed),
        tensor(f"{hf}.bias", f"{gguf}.bias", out, optional=True),
    )


def _without_masks(name: str, sizes: Sizes) -> str:
    return "" if name.endswith((".attn.bias", ".attn.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")) else name


_GPT2_OUTER = (
    *layer_norm("ln_f", "output_norm"),
    tensor("wpe.weight", "position_embd.weight", "* embd"),
)
_GPT2 = Architecture(
    "gpt2",
    (
        *layer_norm("ln_1", "attn_norm"),
        *layer_norm("ln_2", "ffn_norm"),
        *_conv("attn.c_attn", "attn_qkv", "thrice_embd", "embd"),
        *_conv("attn.c_proj", "attn_output", "embd", "embd"),
        *_conv("mlp.c_fc", "ffn_up", "ff", "embd"),
        *_conv("mlp.c_proj", "ffn_down", "embd", "ff"),
    ),
    activations=ANY_GELU, layers="h", embedding="wte", outer=_GPT2_OUTER, sizes=_four_times, ffn=False,
    rename=_without_masks, fixed={"scale_attn_weights": True},
    defaults={"hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "max_position_embeddings": 1024, "rms_norm_eps": None},
)  # fmt: skip


# Jais: GPT-2 with a gate and ALiBi; embedding and head are multiplied by what config.json says.


def _jais_factor(*keys: tuple[str, ...]) -> Change:
    """keys: of factors that are multiplied; the first choice that the file has of several."""

    def change(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
        config = sizes.config
        found = next((names for names in keys if config.get(names[0]) is not None), None)
        if found is None:
            raise config.error(keys[0][0], "is missing")
        return scaled_by(tensor, prod(config.real(name, high=1e6) for name in found))

    return change


def _jais_name(name: str, sizes: Sizes) -> str:
    return "" if name.endswith((".attn.bias", "relative_pe.slopes")) else name


def _jais_slope(facts: Facts, weights: Mapping[str, SourceTensor]) -> None:
    """The greatest bias: what the first head's slope comes of."""
    slopes = next((tensor for name, tensor in weights.items() if name.endswith("relative_pe.slopes")), None)
    bias = 8.0
    if slopes is not None:
        first = float(slopes.rows(0, 1).reshape(-1)[0])
        if not 0 < first < 1:
            raise slopes.error(f"begins with {first:g}, expected a number between 0 and 1")
        bias = -round(log2(first) * 2 ** floor(log2(facts.sizes["heads"])))
    facts.real("attention.max_alibi_bias", bias)


_JAIS = replace(
    _GPT2, name="jais", activations=frozenset({"swiglu"}), rename=_jais_name, of_weights=_jais_slope,
    layer=(*_GPT2.layer, *_conv("mlp.c_fc2", "ffn_gate", "ff", "embd")), outer=layer_norm("ln_f", "output_norm"),
    embedding_change=_jais_factor(("mup_embeddings_scale",), ("embeddings_scale",)), ffn=True, own_head=True,
    head_change=_jais_factor(("mup_output_alpha", "mup_width_scale"), ("width_scale",)),
    fixed={"position_embedding_type": "alibi", "scale_attn_weights": True, "mup_scale_qk_dot_by_d": True},
)  # fmt: skip


def _bigcode_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    heads = 1 if config.flag("multi_query", True) else sizes["heads"]
    return _four_times(config, sizes) | {"kv_heads": heads, "qkv": sizes["embd"] + 2 * heads * sizes["head"]}


_BIGCODE = replace(
    _GPT2, name="starcoder", sizes=_bigcode_sizes,
    layer=(
        *layer_norm("ln_1", "attn_norm"),
        *layer_norm("ln_2", "ffn_norm"),
        *linear("attn.c_attn", "attn_qkv", "qkv", "embd"),
        *linear("attn.c_proj", "attn_output", "embd", "embd"),
        *linear("mlp.c_fc", "ffn_up", "ff", "embd"),
        *linear("mlp.c_proj", "ffn_down", "embd", "ff"),
    ),
)  # fmt: skip

# NeoX and Bloom: queries, keys and values of each head lie together.


def _by_part(sizes: Sizes) -> Order:
    return np.arange(3 * sizes["q"]).reshape(sizes["heads"], 3, -1).swapaxes(0, 1).reshape(-1)


_NEOX = Architecture(
    "gptneox",
    (
        *LAYER_NORMS,
        *linear("attention.query_key_value", "attn_qkv", "qkv", "embd", change=by_order(_by_part)),
        *linear("attention.dense", "attn_output", "embd", "q"),
        *linear("mlp.dense_h_to_4h", "ffn_up", "ff", "embd"),
        *linear("mlp.dense_4h_to_h", "ffn_down", "embd", "ff"),
    ),
    activations=ANY_GELU, embedding="embed_in", head="embed_out", outer=layer_norm("final_layer_norm", "output_norm"),
    rename=_without_masks, rotated="part", keys=flags(use_parallel_residual="use_parallel_residual"),
    defaults={"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "use_parallel_residual": True,
              "rms_norm_eps": None},
)  # fmt: skip


def _bloom_entries(facts: Facts) -> None:
    facts.count("context_length", facts.config.integer("seq_length", facts.sizes["embd"]))


_BLOOM = Architecture(
    "bloom",
    (
        *LAYER_NORMS,
        *linear("self_attention.query_key_value", "attn_qkv", "qkv", "embd", change=by_order(_by_part)),
        *linear("self_attention.dense", "attn_output", "embd", "q"),
        *linear("mlp.dense_h_to_4h", "ffn_up", "ff", "embd"),
        *linear("mlp.dense_4h_to_h", "ffn_down", "embd", "ff"),
    ),
    activations=ANY_GELU, layers="h", embedding="word_embeddings", sizes=_four_times, ffn=False, entries=_bloom_entries,
    outer=(*layer_norm("ln_f", "output_norm"), *layer_norm("word_embeddings_layernorm", "token_embd_norm")),
    defaults={"layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "rms_norm_eps": None, "hidden_act": "gelu",
              "tie_word_embeddings": True},
)  # fmt: skip

# Falcon: some queries, a key and a value of each group of heads lie together.


def _falcon_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    groups, one = sizes["kv_heads"], config.flag("multi_query", True)
    if config.get("num_key_value_heads") is None or (one and not config.flag("new_decoder_architecture")):
        groups = 1
    return _four_times(config, sizes) | {
        "kv_heads": groups, "kv": groups * sizes["head"], "qkv": (sizes["heads"] + 2 * groups) * sizes["head"]
    }  # fmt: skip


def _falcon_order(sizes: Sizes) -> Order:
    groups, head = sizes["kv_heads"], sizes["head"]
    heads = np.arange(sizes["qkv"]).reshape(groups, -1, head)
    return np.concatenate([heads[:, :-2].reshape(-1), heads[:, -2].reshape(-1), heads[:, -1].reshape(-1)])


def _falcon_entries(facts: Facts) -> None:
    config = facts.config
    if config.flag("alibi") or not config.flag("parallel_attn", True):
        raise config.error("alibi", "is true, or parallel_attn is not, which is not supported")
    facts.count("context_length", 2048)
    facts.text("tensor_data_layout", "jploski")


_FALCON = Architecture(
    "falcon",
    (
        either(
            (*layer_norm("ln_attn", "attn_norm_2"), *layer_norm("ln_mlp", "attn_norm")),
            layer_norm("input_layernorm", "attn_norm"),
        ),
        *linear("self_attention.query_key_value", "attn_qkv", "qkv", "embd", change=by_order(_falcon_order)),
        *linear("self_attention.dense", "attn_output", "embd", "q"),
        *linear("mlp.dense_h_to_4h", "ffn_up", "ff", "embd"),
        *linear("mlp.dense_4h_to_h", "ffn_down", "embd", "ff"),
    ),
    activations=ANY_GELU, layers="h", embedding="word_embeddings", sizes=_falcon_sizes, ffn=False,
    entries=_falcon_entries, rename=_without_masks, outer=layer_norm("ln_f", "output_norm"),
    defaults={"layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "rms_norm_eps": None, "hidden_act": "gelu"},
)  # fmt: skip

# MPT


def _mpt_entries(facts: Facts) -> None:
    attention_config = facts.config.section("attn_config")
    if attention_config.get("clip_qkv") is not None:
        facts.real("attention.clamp_kqv", attention_config.real("clip_qkv"))
    facts.real("attention.max_alibi_bias", attention_config.real("alibi_bias_max", 8.0)
               if attention_config.flag("alibi", True) else 0.0)  # fmt: skip


def _mpt_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    kv_heads = config.section("attn_config").integer("kv_n_heads", sizes["heads"])
    return {"ff": config.integer("expansion_ratio", 4) * sizes["embd"], "kv_heads": kv_heads,
            "qkv": sizes["q"] + 2 * kv_heads * sizes["head"]}  # fmt: skip


_MPT = Architecture(
    "mpt",
    (
        *layer_norm("norm_1", "attn_norm"),
        *layer_norm("norm_2", "ffn_norm"),
        *linear("attn.Wqkv", "attn_qkv", "qkv", "embd"),
        *linear("attn.out_proj", "attn_output", "embd", "q"),
        *linear("ffn.up_proj", "ffn_up", "ff", "embd"),
        *linear("ffn.down_proj", "ffn_down", "embd", "ff"),
        *optional(norm("attn.q_ln", "attn_q_norm", "q"), norm("attn.k_ln", "attn_k_norm", "*")),
    ),
    activations=ANY_GELU, layers="blocks", embedding="wte", fixed={"norm_type": "low_precision_layernorm"},
    sizes=_mpt_sizes, ffn=False, entries=_mpt_entries,
    outer=(*layer_norm("norm_f", "output_norm"), *optional(tensor("wpe.weight", "position_embd.weight", "* embd"))),
    defaults={"layer_norm_eps": 1e-5, "rms_norm_eps": None, "hidden_act": "gelu", "tie_word_embeddings": True},
)  # fmt: skip

# StarCoder 2, Phi, StableLM, Nemotron

_STARCODER2 = Architecture(
    "starcoder2", (*LAYER_NORMS, *attention(), *plain(names="c_fc c_proj")), activations=ANY_GELU,
    outer=OUTPUT_LAYER_NORM, defaults={"layer_norm_eps": 1e-5, "rms_norm_eps": None},
)  # fmt: skip
_PHI2 = Architecture(
    "phi2",
    (*layer_norm("input_layernorm", "attn_norm"), *attention(out="dense"), *plain()),
    activations=ANY_GELU, outer=(*layer_norm("final_layernorm", "output_norm"), HEAD_BIAS), rotated="part",
    defaults={"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "hidden_act": "gelu_new", "rms_norm_eps": None},
)  # fmt: skip
_PHI3 = Architecture(
    "phi3",
    (
        *NORMS,
        *linear("self_attn.qkv_proj", "attn_qkv", "qkv", "embd"),
        *linear("self_attn.o_proj", "attn_output", "embd", "q"),
        *linear("mlp.gate_up_proj", "ffn_up", "twice_ff", "embd"),
        *linear("mlp.down_proj", "ffn_down", "embd", "ff"),
    ),
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    windows="all",
)  # fmt: skip
_STABLELM = Architecture(
    "stablelm",
    (
        *layer_norm("input_layernorm", "attn_norm"),
        *optional(*layer_norm("post_attention_layernorm", "ffn_norm")),
        *attention(), *FEED_FORWARD,
        maybe(
            Experts("self_attn.q_layernorm.norms.{}.weight", "attn_q_norm.weight", ("head",), count="heads"),
            Experts("self_attn.k_layernorm.norms.{}.weight", "attn_k_norm.weight", ("head",), count="kv_heads"),
        ),
    ),
    outer=OUTPUT_LAYER_NORM, rotated="part", keys=flags(use_parallel_residual="use_parallel_residual"),
    defaults={"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "use_parallel_residual": True,
              "rms_norm_eps": None},
)  # fmt: skip


def _nemotron_entries(facts: Facts) -> None:
    if f"{facts.name}.rope.scaling.type" not in facts.entries.values:
        _no_scaling(facts)


_NEMOTRON = Architecture(
    "nemotron", (*LAYER_NORMS, *attention(), *plain(names="up_proj down_proj")), activations=RELU2, norm_shift=1.0,
    outer=OUTPUT_LAYER_NORM, rotated="part", keys=VOCAB_SIZE, entries=_nemotron_entries,
    defaults={"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5, "rms_norm_eps": None},
)  # fmt: skip

# OLMo


def _olmo_entries(facts: Facts) -> None:
    facts.real("attention.layer_norm_epsilon", 1e-5)
    if facts.config.get("clip_qkv") is not None:
        facts.real("attention.clamp_kqv", facts.config.real("clip_qkv"))


def _olmo2_entries(facts: Facts) -> None:
    config, n_layers = facts.config, facts.sizes["layers"]
    if config.get("sliding_window") is None:
        return
    facts.count("attention.sliding_window", config.integer("sliding_window"))
    kinds = config.layer_kinds(n_layers)
    usual = [(layer + 1) % 4 > 0 for layer in range(n_layers)]
    sliding = usual if kinds is None else [kind == "sliding_attention" for kind in kinds]
    facts.flags("attention.sliding_window_pattern", sliding)


_OLMO2 = Architecture(
    "olmo2",
    (
        norm("post_attention_layernorm", "post_attention_norm"),
        norm("post_feedforward_layernorm", "post_ffw_norm"),
        norm("self_attn.q_norm", "attn_q_norm", "q"),
        norm("self_attn.k_norm", "attn_k_norm", "kv"),
        *attention(), *FEED_FORWARD,
    ),
    entries=_olmo2_entries, defaults={"rms_norm_eps": 1e-5, "rope_theta": 500000.0},
)  # fmt: skip

# Command: no biases, one norm, factors of logits

_COHERE_DEFAULTS = {"layer_norm_eps": 1e-5, "logit_scale": 0.0625, "tie_word_embeddings": True, "rms_norm_eps": None}


def _cohere2_entries(facts: Facts) -> None:
    facts.count("attention.sliding_window", facts.config.integer("sliding_window", 4096))
    part = facts.config.real("partial_rotary_factor", 1.0, high=1.0)
    facts.count("rope.dimension_count", int(part * facts.sizes["head"]))
    _no_scaling(facts)


_COHERE_LAYER = (norm("input_layernorm", "attn_norm"), *attention(), *FEED_FORWARD)
_COHERE = Architecture(
    "command-r",
    (
        *_COHERE_LAYER,
        *optional(
            tensor("self_attn.q_norm.weight", "attn_q_norm.weight", "heads head"),
            tensor("self_attn.k_norm.weight", "attn_k_norm.weight", "kv_heads head"),
        ),
    ),
    keys=reals(logit_scale="logit_scale"), entries=_no_scaling, defaults=_COHERE_DEFAULTS,
)  # fmt: skip

_OLMO = Architecture(
    "olmo", (*attention(permuted=True), *FEED_FORWARD), outer=(), entries=_olmo_entries,
    defaults={"rms_norm_eps": None, "tie_word_embeddings": False},
)  # fmt: skip

CLASSES = {
    "GPT2LMHeadModel": _GPT2,
    "GPTBigCodeForCausalLM": _BIGCODE,
    "GPTNeoXForCausalLM": _NEOX,
    "BloomForCausalLM": _BLOOM,
    "BloomModel": _BLOOM,
    "FalconForCausalLM": _FALCON,
    "RWForCausalLM": _FALCON,
    "MPTForCausalLM": _MPT,
    "Starcoder2ForCausalLM": _STARCODER2,
    "PhiForCausalLM": _PHI2,
    "Phi3ForCausalLM": _PHI3,
    "Phi4ForCausalLMV": _PHI3,
    "StableLmForCausalLM": _STABLELM,
    "StableLMEpochForCausalLM": _STABLELM,
    "LlavaStableLMEpochForCausalLM": _STABLELM,
    "JAISLMHeadModel": _JAIS,
    "NemotronForCausalLM": _NEMOTRON,
    "Jais2ForCausalLM": Architecture(
        "jais2", (*LAYER_NORMS, *attention(), *plain(names="up_proj down_proj")), activations=RELU2,
        outer=OUTPUT_LAYER_NORM, rotated="all", defaults={"layer_norm_eps": 1e-5, "rms_norm_eps": None},
    ),
    "OlmoForCausalLM": _OLMO,
    "OLMoForCausalLM": _OLMO,
    "Olmo2ForCausalLM": _OLMO2,
    "Olmo3ForCausalLM": _OLMO2,
    "CohereForCausalLM": _COHERE,
    "Cohere2ForCausalLM": replace(
        _COHERE, name="cohere2", layer=_COHERE_LAYER, entries=_cohere2_entries, period=4,
        keys=(*VOCAB_SIZE, *reals(logit_scale="logit_scale")),
    ),
}  # fmt: skip
