"""Models with layers that keep a state: Mamba, Mamba 2 and hybrids of them, LFM 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from qrun.formats.blocks.layout import F32Array
from qrun.models.huggingface.changes import computed, negative_exp, scaled, squeezed_conv
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import GATING, Facts
from qrun.models.huggingface.layout import (
    EXPERT_WEIGHTS,
    RELU2,
    VOCAB_SIZE,
    Architecture,
    Change,
    Experts,
    Mapped,
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
    plain,
    tensor,
)

LONG_CONTEXT = 1 << 20  # of models that know no positions

# Mamba


def _mamba_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    inner = config.integer("intermediate_size", config.integer("d_inner", 2 * sizes["embd"]))
    rank = config.get("time_step_rank", config.get("mamba_dt_rank"))
    return {
        "inner": inner, "twice_inner": 2 * inner, "conv_channels": inner,
        "conv_kernel": config.integer("conv_kernel", config.integer("d_conv", 4)),
        "state": config.integer("state_size", config.integer("d_state", 16)),
        "rank": config.integer("time_step_rank") if isinstance(rank, int) else -(sizes["embd"] // -16),
        "ff": 0, "heads": 0, "kv_heads": 0,
    }  # fmt: skip


def _mamba_mixer(block: str) -> tuple[Part, ...]:
    return (
        *linear(f"{block}.in_proj", "ssm_in", "twice_inner", "embd"),
        tensor(f"{block}.conv1d.weight", "ssm_conv1d.weight", "conv_channels 1 conv_kernel", squeezed_conv),
        *optional(tensor(f"{block}.conv1d.bias", "ssm_conv1d.bias", "conv_channels")),
        tensor(f"{block}.x_proj.weight", "ssm_x.weight", "* inner"),
        *linear(f"{block}.dt_proj", "ssm_dt", "inner", "rank"),
        tensor(f"{block}.A_log", "ssm_a", "inner state", computed("inner state", negative_exp)),
        tensor(f"{block}.D", "ssm_d", "inner"),
        *linear(f"{block}.out_proj", "ssm_out", "embd", "inner"),
    )


def _ssm_entries(facts: Facts, *, groups: bool = False) -> None:
    sizes = facts.sizes
    facts.count("ssm.conv_kernel", sizes["conv_kernel"])
    facts.count("ssm.inner_size", sizes["inner"])
    facts.count("ssm.state_size", sizes["state"])
    facts.count("ssm.time_step_rank", sizes["rank"])
    if groups:
        facts.count("ssm.group_count", sizes["groups"])


def _one_epsilon(facts: Facts) -> None:
    """The norms are RMS norms, whatever their epsilon is called."""
    facts.real("attention.layer_norm_rms_epsilon", facts.config.real("layer_norm_eps", 1e-5, high=1.0))
    facts.entries.remove(f"{facts.name}.attention.layer_norm_epsilon")


def _mamba_entries(facts: Facts) -> None:
    _ssm_entries(facts)
    facts.count("context_length", LONG_CONTEXT)
    facts.count("feed_forward_length", 0)
    _one_epsilon(facts)
    facts.flag("ssm.dt_b_c_rms", facts.config.get("model_type") == "falcon_mamba")


_POSITIONS = {"num_attention_heads": 1, "head_dim": 1, "max_position_embeddings": LONG_CONTEXT,
              "tie_word_embeddings": None}  # fmt: skip
_MAMBA = Architecture(
    "mamba", (norm("norm", "attn_norm"), *_mamba_mixer("mixer")), sizes=_mamba_sizes, entries=_mamba_entries,
    embedding="embeddings", embedding_aliases=("embedding",), outer=(norm("norm_f", "output_norm"),), ffn=False,
    defaults=_POSITIONS | {"layer_norm_eps": 1e-5, "rms_norm_eps": 1e-5}, fixed={"rms_norm": True},
)  # fmt: skip

# Mamba 2


def mamba2_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    def first(*keys: str, default: int | None = None) -> int:
        key = next((key for key in keys if config.get(key) is not None), keys[0])
        return config.integer(key, default)

    heads = first("mamba_n_heads", "mamba_num_heads", "num_heads", default=1)
    head = config.get("mamba_d_head", config.get("mamba_head_dim"))
    expand = first("mamba_expand", "expand", default=2)
    inner = first("mamba_d_ssm", "d_inner", default=expand * sizes["embd"])
    if isinstance(head, int) and (config.get("mamba_head_dim") is not None):
        inner = heads * head
    groups = first("mamba_n_groups", "n_groups", default=1)
    state = first("mamba_d_state", "state_size", "ssm_state_size", "d_state", default=128)
    channels = inner + 2 * groups * state
    if inner % groups:
        raise config.error("mamba_n_groups", f"is {groups}, which does not divide {inner}")
    return {
        "inner": inner, "groups": groups, "group_width": inner // groups, "state": state, "ssm_heads": heads,
        "rank": heads, "conv_channels": channels, "conv_kernel": first("mamba_d_conv", "conv_kernel", default=4),
        "projected": inner + channels + heads,
    }  # fmt: skip


def mamba2_mixer(block: str) -> tuple[Part, ...]:
    return (
        *linear(f"{block}.in_proj", "ssm_in", "projected", "embd"),
        tensor(f"{block}.conv1d.weight", "ssm_conv1d.weight", "conv_channels 1 conv_kernel", squeezed_conv),
        *optional(tensor(f"{block}.conv1d.bias", "ssm_conv1d.bias", "conv_channels")),
        tensor(f"{block}.dt_bias", "ssm_dt.bias", "ssm_heads"),
        tensor(f"{block}.A_log", "ssm_a", "ssm_heads", computed("ssm_heads 1", negative_exp)),
        tensor(f"{block}.D", "ssm_d", "ssm_heads", computed("ssm_heads 1")),
        *optional(tensor(f"{block}.norm.weight", "ssm_norm.weight", "inner", computed("groups group_width"))),
        *linear(f"{block}.out_proj", "ssm_out", "embd", "inner"),
    )


def mamba2_entries(facts: Facts) -> None:
    _ssm_entries(facts, groups=True)


MAMBA2_MIXER = mamba2_mixer("mamba")

# Falcon H1: attention and Mamba 2 beside each other, and factors of config.json that GGUF files have in the weights.


def _factor(*names: str, index: int = 0) -> Change:
    """index: of a factor that is one of a list."""

    def factors(sizes: Sizes, n_rows: int) -> F32Array:
        return np.full((len(names), n_rows), 1.0, np.float32) * np.array(
            [[_number(sizes.config, name, index)] for name in names], np.float32
        )

    return scaled(factors)


def _number(config: Config, name: str, index: int) -> float:
    value = config.get(name, 1.0)
    if isinstance(value, list):
        value = value[index] if index < len(value) else None
    if type(value) not in (int, float) or abs(value) > 1e6:
        raise config.error(name, "is not a number")
    return float(value)


def _in_factors(sizes: Sizes, n_rows: int) -> F32Array:
    """Of gates, inputs, B, C and steps, which are the rows of one matrix."""
    states = sizes["groups"] * sizes["state"]
    counts = (sizes["inner"], sizes["inner"], states, states, sizes["ssm_heads"])
    inner = np.repeat([_number(sizes.config, "ssm_multipliers", part) for part in range(5)], counts)
    outer = np.full(len(inner), _number(sizes.config, "ssm_in_multiplier", 0))
    return np.array([outer, inner], np.float32)


def _falcon_h1_entries(facts: Facts) -> None:
    mamba2_entries(facts)
    if facts.config.flag("mamba_norm_before_gate") and facts.config.flag("mamba_rms_norm"):
        raise facts.config.error("mamba_norm_before_gate", "is true, which is not supported")


_FALCON_H1_MIXER = (
    *linear("mamba.in_proj", "ssm_in", "projected", "embd", change=scaled(_in_factors)),
    *MAMBA2_MIXER[2:-2],
    *linear("mamba.out_proj", "ssm_out", "embd", "inner", change=_factor("ssm_out_multiplier")),
)
_FALCON_H1 = Architecture(
    "falcon-h1",
    (
        norm("input_layernorm", "attn_norm"),
        Mapped("pre_ff_layernorm.weight", "ffn_norm", ("embd",)),  # the one name that has no end there
        *linear("self_attn.q_proj", "attn_q", "q", "embd", change=_factor("attention_in_multiplier")),
        *linear("self_attn.k_proj", "attn_k", "kv", "embd",
                change=_factor("key_multiplier", "attention_in_multiplier")),
        *linear("self_attn.v_proj", "attn_v", "kv", "embd", change=_factor("attention_in_multiplier")),
        *linear("self_attn.o_proj", "attn_output", "embd", "q", change=_factor("attention_out_multiplier")),
        *_FALCON_H1_MIXER,
        *linear("feed_forward.gate_proj", "ffn_gate", "ff", "embd", change=_factor("mlp_multipliers", index=0)),
        *linear("feed_forward.up_proj", "ffn_up", "ff", "embd"),
        *linear("feed_forward.down_proj", "ffn_down", "embd", "ff", change=_factor("mlp_multipliers", index=1)),
    ),
    sizes=mamba2_sizes, entries=_falcon_h1_entries, keys=VOCAB_SIZE,
    outer=(norm("final_layernorm", "output_norm"),),
    embedding_change=_factor("embedding_multiplier"), head_change=_factor("lm_head_multiplier"),
)  # fmt: skip




def _mamba2_entries(facts: Facts) -> None:
    mamba2_entries(facts)
    _one_epsilon(facts)
    facts.count("context_length", LONG_CONTEXT)
    facts.count("feed_forward_length", 0)


def _mamba2_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    found = mamba2_sizes(config, sizes)
    head = config.integer("head_dim", 64)
    heads = found["inner"] // head
    return found | {"heads": 0, "kv_heads": 0, "ff": 0, "ssm_heads": heads, "rank": heads,
                    "projected": found["inner"] + found["conv_channels"] + heads}  # fmt: skip


_MAMBA2 = Architecture(
    "mamba2", (norm("norm", "attn_norm"), *mamba2_mixer("mixer")), sizes=_mamba2_sizes, entries=_mamba2_entries,
    embedding="embeddings", outer=(norm("norm_f", "output_norm"),), ffn=False,
    defaults=_POSITIONS | {"layer_norm_eps": 1e-5, "rms_norm_eps": 1e-5},
)  # fmt: skip

# Jamba


def _jamba_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    inner = config.integer("mamba_expand", 2) * sizes["embd"]
    given = config.get("mamba_dt_rank")
    return {
        "inner": inner, "twice_inner": 2 * inner, "conv_channels": inner, "state": config.integer("mamba_d_state", 16),
        "conv_kernel": config.integer("mamba_d_conv", 4), "expert_ff": sizes["ff"],
        "rank": config.integer("mamba_dt_rank") if isinstance(given, int) else -(sizes["embd"] // -16),
    }  # fmt: skip


def _jamba_entries(facts: Facts) -> None:
    _ssm_entries(facts)
    config, sizes = facts.config, facts.sizes
    period, offset = config.integer("attn_layer_period", 8), config.integer("attn_layer_offset", 4, low=0)
    there = [layer >= offset and (layer - offset) % period == 0 for layer in range(sizes["layers"])]
    facts.array("attention.head_count_kv", [sizes["kv_heads"] * attends for attends in there])


_JAMBA = Architecture(
    "jamba",
    (
        norm("input_layernorm", "attn_norm"),
        norm("pre_ff_layernorm", "ffn_norm"),
        either(
            attention(),
            (
                *_mamba_mixer("mamba"),
                norm("mamba.dt_layernorm", "ssm_dt_norm", "rank"),
                norm("mamba.b_layernorm", "ssm_b_norm", "state"),
                norm("mamba.c_layernorm", "ssm_c_norm", "state"),
            ),
        ),
        either(experts("feed_forward", gate="router"), gated("feed_forward")),
    ),
    sizes=_jamba_sizes, entries=_jamba_entries, outer=(norm("final_layernorm", "output_norm"),),
    defaults={"num_experts": 16, "num_experts_per_tok": 2},
)  # fmt: skip

# Nemotron H: each layer is a mixer of one of three kinds.

_RELU_EXPERTS: tuple[Part, ...] = (
    tensor("mixer.gate.weight", "ffn_gate_inp.weight", "experts embd"),
    tensor("mixer.gate.e_score_correction_bias", "exp_probs_b.bias", "experts"),
    Experts("mixer.experts.{}.up_proj.weight", "ffn_up_exps.weight", ("expert_ff", "*")),
    Experts("mixer.experts.{}.down_proj.weight", "ffn_down_exps.weight", ("*", "expert_ff")),
    tensor("mixer.shared_experts.up_proj.weight", "ffn_up_shexp.weight", "* embd"),
    tensor("mixer.shared_experts.down_proj.weight", "ffn_down_shexp.weight", "embd *"),
    *optional(
        tensor("mixer.fc1_latent_proj.weight", "ffn_latent_down.weight", "* embd"),
        tensor("mixer.fc2_latent_proj.weight", "ffn_latent_up.weight", "embd *"),
    ),
)
_PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_KINDS = {"linear_attention": "mamba", "full_attention": "attention"}


def _nemotron_kinds(config: Config) -> list[str]:
    given = config.get("hybrid_override_pattern") or config.get("layers_block_type")
    if isinstance(given, str):
        return [_PATTERN.get(letter, "") for letter in given]
    if not isinstance(given, list):
        raise config.error("layers_block_type", "is not a list of kinds of layers")
    return [_KINDS.get(str(kind), str(kind)) for kind in given]


def _nemotron_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    return mamba2_sizes(config, sizes) | {"layers": len(_nemotron_kinds(config))}


def _nemotron_entries(facts: Facts) -> None:
    config, sizes = facts.config, facts.sizes
    mamba2_entries(facts)
    kinds = _nemotron_kinds(config) + ["both"] * sizes["drafts"]
    mixture = facts.name == "nemotron_h_moe"
    width, wide = (sizes["expert_ff"], "moe") if mixture else (sizes["ff"], "mlp")
    facts.array("attention.head_count_kv", [sizes["kv_heads"] * (kind in ("attention", "both")) for kind in kinds])
    facts.array("feed_forward_length", [width * (kind in (wide, "both")) for kind in kinds])
    facts.flag("rope.scaling.finetuned", False)
    facts.count("rope.dimension_count", sizes["embd"] // sizes["heads"])  # no layer turns anything
    facts.count("context_length", LONG_CONTEXT)


def _nemotron_variant(config: Config) -> Architecture | None:
    return None if config.get("num_experts_per_tok") is None else _NEMOTRON_MOE


_NEMOTRON_PARTS = (norm("norm", "attn_norm"), mamba2_mixer("mixer"), attention("mixer", permuted=True))
_NEMOTRON = Architecture(
    "nemotron_h",
    (_NEMOTRON_PARTS[0], either(_NEMOTRON_PARTS[1], _NEMOTRON_PARTS[2], plain("mixer", "up_proj down_proj"))),
    activations=RELU2, sizes=_nemotron_sizes, entries=_nemotron_entries, variant=_nemotron_variant, rotated="all",
    embedding="embeddings", outer=(norm("norm_f", "output_norm"),), keys=VOCAB_SIZE,
    defaults={"num_hidden_layers": 1},
)  # fmt: skip
_NEMOTRON_MOE = Architecture(
    "nemotron_h_moe",
    (_NEMOTRON_PARTS[0], either(_NEMOTRON_PARTS[1], _NEMOTRON_PARTS[2], _RELU_EXPERTS)),
    activations=RELU2, sizes=_nemotron_sizes, entries=_nemotron_entries, rotated="all",
    embedding="embeddings", outer=(norm("norm_f", "output_norm"),), defaults={"num_hidden_layers": 1},
    keys=(
        *VOCAB_SIZE, *EXPERT_WEIGHTS,
        *counts(
            expert_feed_forward_length="moe_intermediate_size", expert_shared_count="n_shared_experts",
            expert_shared_feed_forward_length="moe_shared_expert_intermediate_size", moe_latent_size="moe_latent_size",
        ),
    ),
)  # fmt: skip

# Nemotron 3 Puzzle: each block has a mixture of its own size, as a search has found it.


def _puzzle_settings(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is said of each block, as lists and the most of each."""
    blocks = values.get("block_configs")
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        return values
    lists = {key: [block.get(key) or 0 for block in blocks] for key in ("moe_intermediate_size", "num_experts_per_tok")}
    most = {key: max((n for n in sizes if type(n) is int), default=0) or None for key, sizes in lists.items()}
    return {
        **values, **most, "layers_block_type": [block.get("block_type") for block in blocks],
        "hybrid_override_pattern": None, "block_sizes": lists,
    }  # fmt: skip


def _puzzle_entries(facts: Facts) -> None:
    _nemotron_entries(facts)
    config, n_layers = facts.config, facts.sizes["layers"]
    config.get("block_configs")
    lists = config.section("block_sizes")
    widths, used = (lists.integers(key, low=0) for key in ("moe_intermediate_size", "num_experts_per_tok"))
    if not len(widths) == len(used) == n_layers:
        raise config.error("block_configs", f"is not a list of {n_layers} objects")
    facts.array("feed_forward_length", widths)
    facts.array("expert_feed_forward_length", widths)
    facts.array("expert_used_count", used)
    config.get("mtp_block_configs")


_PUZZLE = replace(
    _NEMOTRON_MOE, settings=_puzzle_settings, entries=_puzzle_entries,
    rename=lambda name, sizes: "" if name.startswith("mtp.") else name,
    layer=(
        _NEMOTRON_PARTS[0],
        either(
            _NEMOTRON_PARTS[1], _NEMOTRON_PARTS[2],
            tuple(replace(part, shape=("*", "*")) if isinstance(part, Experts) else part for part in _RELU_EXPERTS),
        ),
    ),
)  # fmt: skip

# LFM 2: short convolutions.


def _lfm2_width(config: Config) -> int:
    width = config.integer("block_ff_dim", config.integer("intermediate_size"))
    if config.flag("block_auto_adjust_ff_dim", True):
        width = int(2 * width / 3)
        if config.get("block_ffn_dim_multiplier") is not None:
            width = int(config.real("block_ffn_dim_multiplier", 1.0) * width)
        multiple = config.integer("block_multiple_of", 256)
        width = multiple * -(width // -multiple)
    return width


def _lfm2_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    width = {} if sizes["experts"] else {"ff": _lfm2_width(config)}
    return {"conv_kernel": config.integer("conv_L_cache", 3), "conv_channels": sizes["embd"],
            "thrice_embd": 3 * sizes["embd"], **width}  # fmt: skip


def _lfm2_entries(facts: Facts) -> None:
    kinds = facts.config.required_layer_kinds(facts.sizes["layers"])
    facts.array("attention.head_count_kv", [facts.sizes["kv_heads"] * (kind == "full_attention") for kind in kinds])
    facts.count("shortconv.l_cache", facts.sizes["conv_kernel"])


def _lfm2_moe_entries(facts: Facts) -> None:
    _lfm2_entries(facts)
    facts.count("expert_gating_func", GATING["sigmoid"])


_LFM2_MIXER: tuple[Part, ...] = (
    norm("operator_norm", "attn_norm"),
    norm("ffn_norm", "ffn_norm"),
    either(
        (
            *attention(out="out_proj"),
            norm("self_attn.q_layernorm", "attn_q_norm", "head"),
            norm("self_attn.k_layernorm", "attn_k_norm", "head"),
        ),
        (
            tensor("conv.conv.weight", "shortconv.conv.weight", "conv_channels 1 conv_kernel", squeezed_conv),
            *optional(tensor("conv.conv.bias", "shortconv.conv.bias", "conv_channels")),
            *linear("conv.in_proj", "shortconv.in_proj", "thrice_embd", "embd"),
            *linear("conv.out_proj", "shortconv.out_proj", "embd", "embd"),
        ),
    ),
)
_LFM2_FORWARD = gated("feed_forward", "w1 w3 w2")
_LFM2 = Architecture(
    "lfm2", (*_LFM2_MIXER, *_LFM2_FORWARD), sizes=_lfm2_sizes, entries=_lfm2_entries, keys=VOCAB_SIZE,
    outer=(norm("embedding_norm", "token_embd_norm"),), defaults={"rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0},
)  # fmt: skip
_LFM2_MOE = Architecture(
    "lfm2moe",
    (
        *_LFM2_MIXER,
        either(
            (
                *experts("feed_forward", "w1 w3 w2"),
                *optional(tensor("feed_forward.expert_bias", "exp_probs_b.bias", "experts")),
            ),
            _LFM2_FORWARD,
        ),
    ),
    sizes=_lfm2_sizes, entries=_lfm2_moe_entries,
    keys=(
        *VOCAB_SIZE,
        *counts(expert_feed_forward_length="moe_intermediate_size", leading_dense_block_count="num_dense_layers"),
    ),
    outer=(norm("embedding_norm", "token_embd_norm"),), defaults={"rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0},
    fixed={"norm_topk_prob": True, "routed_scaling_factor": 1.0},
)  # fmt: skip

CLASSES = {
    "MambaForCausalLM": _MAMBA,
    "MambaLMHeadModel": _MAMBA,
    "FalconMambaForCausalLM": _MAMBA,
    "Mamba2ForCausalLM": _MAMBA2,
    "FalconH1ForCausalLM": _FALCON_H1,
    "JambaForCausalLM": _JAMBA,
    "NemotronHForCausalLM": _NEMOTRON,
    "NemotronHPuzzleForCausalLM": _PUZZLE,
    "Lfm2ForCausalLM": _LFM2,
    "LFM2ForCausalLM": _LFM2,
    "Lfm2MoeForCausalLM": _LFM2_MOE,
}
