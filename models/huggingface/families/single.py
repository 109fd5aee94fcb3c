"""Models that are a family each: dense ones, mixtures of experts, and those that keep a state."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qrun.formats import ValueType
from qrun.models.huggingface.changes import computed, in_full, negative_exp, part, rows, squeezed_conv
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import GATING, Facts
from qrun.models.huggingface.families.deepseek import latent_sizes
from qrun.models.huggingface.families.llama import CLASSES as LLAMAS
from qrun.models.huggingface.families.llama import PERMUTED
from qrun.models.huggingface.families.mixtures import SHARED
from qrun.models.huggingface.layout import (
    ANY_GELU,
    FEED_FORWARD,
    NORMS,
    QK_NORMS,
    RELU2,
    SILU,
    VOCAB_SIZE,
    Architecture,
    Experts,
    Mapped,
    Part,
    Sizes,
    attention,
    counts,
    either,
    experts,
    gated,
    layer_norm,
    linear,
    norm,
    plain,
    reals,
    tensor,
)
from qrun.models.huggingface.rope import rope_section
from qrun.models.hyperparameters import MAX_EXPERTS, MAX_HEADS

EXPERT_FF = counts(expert_feed_forward_length="moe_intermediate_size")


def _windows(facts: Facts) -> None:
    facts.count("attention.sliding_window", facts.config.integer("sliding_window"))
    kinds = facts.config.required_layer_kinds(facts.sizes["layers"])
    facts.flags("attention.sliding_window_pattern", [kind == "sliding_attention" for kind in kinds])


def _both_ways(facts: Facts) -> None:
    facts.flag("attention.causal", False)
    facts.entries.flag("diffusion.shift_logits", False)


# Like Llama


def _nanbeige_entries(facts: Facts) -> None:
    facts.count("num_loops", facts.config.integer("num_loops", 1))
    facts.flag("skip_loop_final_norm", facts.config.flag("skip_loop_final_norm"))


_COGVLM = Architecture(  # what looks at images has names of its own, and is left out
    "cogvlm",
    (
        *NORMS,
        *linear("self_attn.language_expert_query_key_value", "attn_qkv", "qkv", "embd"),
        *linear("self_attn.language_expert_dense", "attn_output", "embd", "q"),
        *gated("mlp.language_mlp"),
    ),
    keys=VOCAB_SIZE, rotated="all", sizes=lambda config, sizes: _with_kv_heads(config, sizes, "num_multi_query_heads"),
)  # fmt: skip


def _with_kv_heads(config: Config, sizes: Sizes, key: str) -> dict[str, int]:
    """Where config.json says how many heads of keys there are under another name."""
    kv_heads = config.integer(key, sizes["kv_heads"], high=MAX_HEADS)
    return {"kv_heads": kv_heads, "qkv": (sizes["heads"] + 2 * kv_heads) * sizes["head"]}


def _janus_name(name: str, sizes: Sizes) -> str:
    """Without what makes images."""
    return "" if name.startswith(("vqmodel.", "generation_")) else name


def _plm_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    found = latent_sizes(config, sizes)
    return found | {"kv_heads": sizes["kv_heads"], "head": found["plain_dim"] + found["turned_dim"]}


def _plm_entries(facts: Facts) -> None:
    facts.count("attention.kv_lora_rank", facts.sizes["kv_rank"])
    facts.count("attention.value_length", facts.sizes["value_dim"])
    facts.count("rope.dimension_count", facts.sizes["turned_dim"])


_PLM = Architecture(
    "plm",
    (
        *NORMS,
        tensor("self_attn.q_proj.weight", "attn_q.weight", "latent_q embd"),
        tensor("self_attn.kv_a_proj_with_mqa.weight", "attn_kv_a_mqa.weight", "latent_kv embd"),
        norm("self_attn.kv_a_layernorm", "attn_kv_a_norm", "kv_rank"),
        tensor("self_attn.kv_b_proj.weight", "attn_kv_b.weight", "kv_b kv_rank"),
        tensor("self_attn.o_proj.weight", "attn_output.weight", "embd values"),
        *plain("mlp", "up_proj down_proj"),
    ),
    activations=RELU2, sizes=_plm_sizes, entries=_plm_entries, keys=VOCAB_SIZE, fixed={"q_lora_rank": None},
)  # fmt: skip


def _spark_entries(facts: Facts) -> None:
    _windows(facts)
    rope = facts.config.section("rope_parameters")
    for kind, end in (("full_attention", ""), ("sliding_attention", "_swa")):
        turned = rope.section(kind).real("partial_rotary_factor", 1.0, high=1.0)
        facts.count(f"rope.dimension_count{end}", int(facts.sizes["head"] * turned))


_SPARK = Architecture(
    "spark2_5",
    (
        *NORMS, *FEED_FORWARD,
        tensor("self_attn.q_k_v_proj.weight", "attn_qkv.weight", "qkv embd"),
        tensor("self_attn.g_proj.weight", "attn_gate.weight", "heads embd"),
        *linear("self_attn.o_proj", "attn_output", "embd", "q"),
    ),
    activations=frozenset({"gelu"}), entries=_spark_entries, keys=VOCAB_SIZE,
    fixed={"gate_attn_act_mode": "sigmoid", "headwise_attn_output_gate": True},
)  # fmt: skip


def _codeshell_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    return _with_kv_heads(config, sizes, "num_query_groups") | {"ff": 4 * sizes["embd"]}


def _codeshell_entries(facts: Facts) -> None:
    facts.text("rope.scaling.type", "linear")
    facts.real("rope.scaling.factor", 1.0)
    facts.entries.remove(f"{facts.name}.attention.layer_norm_rms_epsilon")


_CODESHELL = Architecture(
    "codeshell",
    (
        *layer_norm("ln_1", "attn_norm"), *layer_norm("ln_2", "ffn_norm"),
        *linear("attn.c_attn", "attn_qkv", "qkv", "embd"), *linear("attn.c_proj", "attn_output", "embd", "embd"),
        *plain("mlp", "c_fc c_proj"),
    ),
    activations=ANY_GELU, layers="h", embedding="wte", outer=layer_norm("ln_f", "output_norm"), ffn=False,
    sizes=_codeshell_sizes, entries=_codeshell_entries,
    fixed={"position_embedding_type": "rope", "group_query_attention": True},
)  # fmt: skip


def _refact_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    multiple = 256
    ff = multiple * -(int(8 * sizes["embd"] / 3) // -multiple)
    return {"kv_heads": 1, "kv": sizes["head"], "twice_head": 2 * sizes["head"], "ff": ff, "twice_ff": 2 * ff}


def _refact_entries(facts: Facts) -> None:
    facts.real("attention.layer_norm_rms_epsilon", facts.config.real("layer_norm_eps", 1e-5, high=1.0))
    facts.entries.remove(f"{facts.name}.attention.layer_norm_epsilon")


_REFACT = Architecture(
    "refact",
    (
        norm("ln_1", "attn_norm"), norm("ln_2", "ffn_norm"),
        tensor("attn.q.weight", "attn_q.weight", "q embd"),
        tensor("attn.kv.weight", "attn_k.weight", "twice_head embd", rows("0", "head")),
        tensor("attn.kv.weight", "attn_v.weight", "twice_head embd", rows("head", "head")),
        tensor("attn.c_proj.weight", "attn_output.weight", "embd q"),
        tensor("mlp.gate_up_proj.weight", "ffn_gate.weight", "twice_ff embd", part(0, 2)),
        tensor("mlp.gate_up_proj.weight", "ffn_up.weight", "twice_ff embd", part(1, 2)),
        tensor("mlp.c_proj.weight", "ffn_down.weight", "embd ff"),
    ),
    activations=ANY_GELU | SILU, layers="h", embedding="wte", outer=(norm("ln_f", "output_norm"),), ffn=False,
    sizes=_refact_sizes, entries=_refact_entries, fixed={"multi_query": True},
)  # fmt: skip

# OpenELM: layers are of different widths.


def _openelm_lists(config: Config, sizes: Sizes) -> tuple[list[int], list[int], list[int]]:
    """Heads, heads of keys, and widths of feed-forward layers."""
    layers = sizes["layers"]
    multipliers = config.reals("ffn_multipliers", layers)
    divisor = config.integer("ffn_dim_divisor")
    heads, kv_heads = config.integers("num_query_heads"), config.integers("num_kv_heads")
    for key, values in (("num_query_heads", heads), ("num_kv_heads", kv_heads)):
        if len(values) != layers:
            raise config.error(key, f"is not a list of {layers} numbers")
    widths = []
    for multiplier in multipliers:
        wanted = multiplier * sizes["embd"]
        if not 0 < wanted < 1 << 24:
            raise config.error("ffn_multipliers", f"has {multiplier:g}")
        width = max(divisor, int(wanted + divisor / 2) // divisor * divisor)
        widths.append(width + divisor * (width < 0.9 * wanted))
    return heads, kv_heads, widths


def _openelm_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    heads, _, widths = _openelm_lists(config, sizes)
    return {"ff": max(widths), "heads": max(heads), "kv_heads": max(heads)}


def _openelm_entries(facts: Facts) -> None:
    heads, kv_heads, widths = _openelm_lists(facts.config, Sizes(facts.config, facts.sizes))
    facts.array("attention.head_count", heads)
    facts.array("attention.head_count_kv", kv_heads)
    facts.array("feed_forward_length", widths)


_OPENELM = Architecture(
    "openelm",
    (
        norm("attn_norm", "attn_norm"), norm("ffn_norm", "ffn_norm"),
        norm("attn.q_norm", "attn_q_norm", "head"), norm("attn.k_norm", "attn_k_norm", "head"),
        tensor("attn.qkv_proj.weight", "attn_qkv.weight", "* embd"),
        tensor("attn.out_proj.weight", "attn_output.weight", "embd *"),
        tensor("ffn.proj_1.weight", "ffn_gate.weight", "* embd", part(0, 2)),
        tensor("ffn.proj_1.weight", "ffn_up.weight", "* embd", part(1, 2)),
        tensor("ffn.proj_2.weight", "ffn_down.weight", "embd *"),
    ),
    embedding="token_embeddings", ffn=False, sizes=_openelm_sizes, entries=_openelm_entries, rotated="all",
    defaults={"num_attention_heads": 1},
    fixed={"ffn_with_glu": True, "normalize_qk_projections": True, "share_input_output_layers": True},
)  # fmt: skip

# HRM: two stacks of layers, which run in cycles.


def _hrm_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    return {"layers": 2 * config.integer("num_layers_per_stack", sizes["layers"], high=256), "four_q": 4 * sizes["q"]}


def _hrm_name(name: str, sizes: Sizes) -> str:
    stack, _, rest = name.partition("_module.layers.")
    layer, _, inner = rest.partition(".")
    if stack not in ("L", "H") or not layer.isdecimal() or len(layer) > 4:
        return name
    return f"layers.{int(layer) + (sizes['layers'] // 2 if stack == 'H' else 0)}.{inner}"


def _hrm_entries(facts: Facts) -> None:
    config, per_stack = facts.config, facts.sizes["layers"] // 2
    slow, fast = config.integer("H_cycles", high=64), config.integer("L_cycles", high=64)
    facts.count("block_count", per_stack * slow * (fast + 1))
    facts.count("hrm.layers_per_stack", per_stack)
    facts.count("hrm.h_cycles", slow)
    facts.count("hrm.l_cycles", fast)
    facts.flag("hrm.prefix_lm", config.flag("prefix_lm"))


_HRM = Architecture(
    "hrm_text",
    (
        *(tensor("attn.gqkv_proj.weight", f"attn_{name}.weight", "four_q embd", part(number, 4))
          for number, name in enumerate(("gate", "q", "k", "v"))),
        *linear("attn.o_proj", "attn_output", "embd", "q"),
        tensor("mlp.gate_up_proj.weight", "ffn_gate.weight", "twice_ff embd", part(0, 2)),
        tensor("mlp.gate_up_proj.weight", "ffn_up.weight", "twice_ff embd", part(1, 2)),
        *linear("mlp.down_proj", "ffn_down", "embd", "ff"),
    ),
    outer=(tensor("z_L_init", "hrm.z_l_init", "embd"),), rename=_hrm_name, sizes=_hrm_sizes, entries=_hrm_entries,
    keys=reals(embedding_scale="embedding_scale"), rotated="all",
)  # fmt: skip

# PLaMo: norms count from 1, 1/5 and 1/sqrt(125).


def _from(start: float, hf: str, gguf: str, width: str = "embd") -> Mapped:
    return tensor(f"{hf}.weight", gguf, width, computed(width, lambda values: values + np.float32(start)))


_PLAMO_NORMS = (
    _from(1.0, "pre_mixer_norm", "attn_norm.weight"), _from(1 / 5, "post_mixer_norm", "post_attention_norm"),
    _from(1.0, "pre_mlp_norm", "ffn_norm.weight"), _from(1 / 5**1.5, "post_mlp_norm", "post_ffw_norm"),
    tensor("mlp.gate_up_proj.weight", "ffn_up.weight", "twice_ff embd"),
    *linear("mlp.down_proj", "ffn_down", "embd", "ff"),
)  # fmt: skip
_PLAMO_ATTENTION = (
    tensor("mixer.qkv_proj.weight", "attn_qkv.weight", "qkv embd"), *linear("mixer.o_proj", "attn_output", "embd", "q"),
)  # fmt: skip
_PLAMO_OUTER = (_from(1.0, "norm", "output_norm.weight"),)


def _plamo2_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    head = config.integer("hidden_size_per_head", 128)
    mamba_heads = config.integer("mamba_num_heads", 64)
    heads, kv_heads, inner = sizes["heads"], sizes["kv_heads"], mamba_heads * head
    return {
        "head": head, "q": heads * head, "kv": kv_heads * head, "qkv": (heads + 2 * kv_heads) * head,
        "ssm_heads": mamba_heads, "inner": inner, "twice_inner": 2 * inner, "conv_channels": inner,
        "conv_kernel": config.integer("mamba_d_conv", 4), "state": config.integer("mamba_d_state", 64),
    }  # fmt: skip


def _plamo2_entries(facts: Facts) -> None:
    config, sizes = facts.config, facts.sizes
    layers, step = sizes["layers"], config.integer("mamba_step", 2)
    attends = [layer == layers - 1 if layers <= step // 2 else layer % step == step // 2 for layer in range(layers)]
    if config.flag("mamba_enabled", True):
        facts.array("attention.head_count", [sizes["heads"] * one for one in attends])
        facts.array("attention.head_count_kv", [sizes["kv_heads"] * one for one in attends])
    for key, name in (("conv_kernel", "conv_kernel"), ("inner_size", "inner"), ("state_size", "state"),
                      ("time_step_rank", "ssm_heads")):  # fmt: skip
        facts.count(f"ssm.{key}", sizes[name])
    facts.count("ssm.group_count", 0)


_PLAMO2 = Architecture(
    "plamo2",
    (
        *_PLAMO_NORMS,
        either(
            (
                *_PLAMO_ATTENTION,
                tensor("mixer.q_weight", "attn_q_norm.weight", "heads head"),
                tensor("mixer.k_weight", "attn_k_norm.weight", "kv_heads head"),
            ),
            (
                *linear("mixer.in_proj", "ssm_in", "twice_inner", "embd"),
                tensor("mixer.conv1d.weight", "ssm_conv1d.weight", "conv_channels 1 conv_kernel", squeezed_conv),
                tensor("mixer.bcdt_proj.weight", "ssm_x.weight", "* inner"),
                tensor("mixer.dt_proj.weight", "ssm_dt.weight", "ssm_heads *"),
                tensor("mixer.dt_bias", "ssm_dt.bias", "ssm_heads"),
                tensor("mixer.A_log", "ssm_a", "ssm_heads", computed("ssm_heads", negative_exp)),
                tensor("mixer.D", "ssm_d", "ssm_heads"),
                tensor("mixer.dt_norm_weight", "ssm_dt_norm", "*"),
                tensor("mixer.B_norm_weight", "ssm_b_norm", "state"),
                tensor("mixer.C_norm_weight", "ssm_c_norm", "state"),
                *linear("mixer.out_proj", "ssm_out", "embd", "inner"),
            ),
        ),
    ),
    layers="layers.layers", outer=_PLAMO_OUTER, sizes=_plamo2_sizes, entries=_plamo2_entries, keys=VOCAB_SIZE,
)  # fmt: skip


def _plamo3_entries(facts: Facts) -> None:
    config = facts.config
    if config.real("rope_scaling_factor", 1.0) != 1:
        raise config.error("rope_scaling_factor", "is not 1, which is not supported")
    key = next((key for key in ("window_size", "sliding_window") if config.get(key) is not None), None)
    if key is None:
        return
    facts.count("attention.sliding_window", config.integer(key))
    facts.count("attention.sliding_window_pattern", config.integer("sliding_window_pattern"))


_PLAMO3 = Architecture(
    "plamo3",
    (
        *_PLAMO_NORMS, *_PLAMO_ATTENTION,
        _from(1.0, "mixer.q_norm", "attn_q_norm.weight", "head"),
        _from(1.0, "mixer.k_norm", "attn_k_norm.weight", "head"),
    ),
    layers="layers.layers", outer=_PLAMO_OUTER, entries=_plamo3_entries, keys=VOCAB_SIZE,
)  # fmt: skip

# LLaDA, which writes by diffusion.

_LLADA = Architecture(
    "llada",
    (
        norm("attn_norm", "attn_norm"), norm("ff_norm", "ffn_norm"),
        *linear("q_proj", "attn_q", "q", "embd", "heads"), *linear("k_proj", "attn_k", "kv", "embd", "kv_heads"),
        *linear("v_proj", "attn_v", "kv", "embd"), *linear("attn_out", "attn_output", "embd", "q"),
        *linear("ff_proj", "ffn_gate", "ff", "embd"), *linear("up_proj", "ffn_up", "ff", "embd"),
        *linear("ff_out", "ffn_down", "embd", "ff"),
    ),
    layers="blocks", embedding="wte", head="ff_out", outer=(norm("ln_f", "output_norm"),), entries=_both_ways,
    keys=VOCAB_SIZE, rotated="all", fixed={"activation_type": "silu", "block_type": "llama", "alibi": False},
)  # fmt: skip
_LLADA_MOE = Architecture(
    "llada-moe", (*NORMS, *QK_NORMS, *attention(), *experts()), entries=_both_ways,
    sizes=lambda config, sizes: {"expert_ff": config.integer("expert_intermediate_size", sizes["ff"])},
    keys=counts(expert_feed_forward_length="expert_intermediate_size"),
)  # fmt: skip

# Mixtures of experts


def _smallthinker_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    width = config.integer("moe_ffn_hidden_size")
    return {"experts": config.integer("moe_num_primary_experts", high=MAX_EXPERTS), "ff": width, "expert_ff": width}


def _smallthinker_entries(facts: Facts) -> None:
    config, sizes = facts.config, facts.sizes
    facts.count("expert_count", sizes["experts"])
    facts.count("expert_used_count", config.integer("moe_num_active_primary_experts", high=sizes["experts"]))
    facts.count("expert_feed_forward_length", sizes["expert_ff"])
    softmax = config.flag("moe_primary_router_apply_softmax")
    facts.count("expert_gating_func", GATING["softmax" if softmax else "sigmoid"])
    windows = config.get("sliding_window_layout")
    if not isinstance(windows, list) or not any(windows):
        return
    for key in ("sliding_window_layout", "rope_layout"):
        if config.get(key) != [int(layer % 4 != 0) for layer in range(sizes["layers"])]:
            raise config.error(key, "is not every layer but the first of each four, as engines take it")
    facts.count("attention.sliding_window", config.integer("sliding_window_size"))


_SMALLTHINKER = Architecture(
    "smallthinker",
    (
        *NORMS, *attention(),
        tensor("block_sparse_moe.primary_router.weight", "ffn_gate_inp.weight", "experts embd"),
        *(Experts(f"block_sparse_moe.experts.{{}}.{name}.weight", f"ffn_{name}_exps.weight", shape)
          for name, shape in (("gate", ("expert_ff", "embd")), ("up", ("expert_ff", "embd")),
                              ("down", ("embd", "expert_ff")))),
    ),
    activations=frozenset({"relu"}), ffn=False, sizes=_smallthinker_sizes, entries=_smallthinker_entries,
    defaults={"num_experts_per_tok": 1, "num_experts": 1, "moe_intermediate_size": 1},
)  # fmt: skip


def _maple_entries(facts: Facts) -> None:
    _windows(facts)
    facts.array("swiglu_clamp_exp", [7.0] * facts.sizes["layers"], ValueType.FLOAT32)
    turned = rope_section(facts.config)[0].real("partial_rotary_factor", 1.0, high=1.0)
    facts.count("rope.dimension_count", int(facts.sizes["head"] * turned))


_MAPLE = Architecture(
    "maple", (*NORMS, *QK_NORMS, *attention(), *experts()), entries=_maple_entries, keys=(*VOCAB_SIZE, *EXPERT_FF),
    fixed={"num_shared_experts": 0, "norm_topk_prob": True, "nope_on_global_attention": True},
)  # fmt: skip


def _grove_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    chunk = config.integer("head_dim", 128)  # whatever that has to do with it
    return {"chunks": sizes["experts"] // 2, "chunk_ff": chunk}


def _grove_entries(facts: Facts) -> None:
    facts.count("expert_chunk_feed_forward_length", facts.sizes["chunk_ff"])
    facts.count("experts_per_group", 2)
    facts.real("expert_group_scale", 0.05)


def _without_bias(name: str, sizes: Sizes) -> str:
    """Without what the model itself does not use."""
    return "" if name.endswith(".mlp.expert_bias") else name


_GROVE = Architecture(
    "grovemoe",
    (
        *NORMS, *QK_NORMS, *attention(), *experts(),
        *(Experts(f"mlp.chunk_experts.{{}}.{name}_proj.weight", f"ffn_{name}_chexps.weight", shape, count="chunks")
          for name, shape in (("gate", ("chunk_ff", "embd")), ("up", ("chunk_ff", "embd")),
                              ("down", ("embd", "chunk_ff")))),
    ),
    rename=_without_bias, sizes=_grove_sizes, entries=_grove_entries, keys=EXPERT_FF, fixed={"norm_topk_prob": True},
)  # fmt: skip
_ARCTIC = Architecture(
    "arctic",
    (
        norm("input_layernorm", "attn_norm"), norm("residual_layernorm", "ffn_norm"),
        norm("post_attention_layernorm", "ffn_norm_exps"), *PERMUTED,
        *gated("residual_mlp", "w1 w3 w2", width="embd"), *experts("block_sparse_moe", "w1 w3 w2"),
    ),
    keys=VOCAB_SIZE, rotated="all", fixed={"moe_layer_frequency": 1, "parallel_attn_mlp_res": True},
)  # fmt: skip


def _cohere_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    return {"expert_ff": sizes["ff"], "ff": config.integer("prefix_dense_intermediate_size", sizes["ff"])}


def _cohere_entries(facts: Facts) -> None:
    config, sizes = facts.config, facts.sizes
    _windows(facts)
    kinds = config.get("mlp_layer_types")
    dense = config.integer("first_k_dense_replace", 0, low=0)
    if isinstance(kinds, list):
        dense = next((layer for layer, kind in enumerate(kinds) if kind != "dense"), len(kinds))
    facts.count("leading_dense_block_count", dense)
    facts.count("expert_feed_forward_length", sizes["expert_ff"])
    facts.flag("expert_weights_norm", config.flag("norm_topk_prob"))
    if shared := config.integer("num_shared_experts", 0, low=0):
        facts.count("expert_shared_count", shared)
        facts.count("expert_shared_feed_forward_length", sizes["expert_ff"] * shared)
    facts.text("rope.scaling.type", "none")
    facts.entries.remove(f"{facts.name}.attention.layer_norm_rms_epsilon")


_COHERE2_MOE = Architecture(
    "cohere2moe",
    (
        norm("input_layernorm", "attn_norm"), *attention(bias_free=True),
        either((*experts(), *SHARED), FEED_FORWARD),
    ),
    sizes=_cohere_sizes, entries=_cohere_entries, keys=(*VOCAB_SIZE, *reals(logit_scale="logit_scale")), rotated="all",
    fixed={"shared_expert_combination_strategy": "average"},
)  # fmt: skip


def _minimax3_sizes(config: Config, sizes: Sizes) -> dict[str, int]:
    index = config.section("sparse_attention_config").integer("sparse_index_dim")
    return {"expert_ff": sizes["ff"], "ff": config.integer("dense_intermediate_size", sizes["ff"]), "index_dim": index}


def _minimax3_entries(facts: Facts) -> None:
    config, sizes = facts.config, facts.sizes
    facts.count("expert_feed_forward_length", sizes["expert_ff"])
    facts.flag("expert_weights_norm", True)
    sparse = config.section("sparse_attention_config")
    for key, hf in (("head_count", "sparse_num_index_heads"), ("key_length", "sparse_index_dim"),
                    ("top_k", "sparse_topk_blocks"), ("block_size", "sparse_block_size"),
                    ("local_blocks", "sparse_local_block")):  # fmt: skip
        facts.count(f"attention.indexer.{key}", sparse.integer(hf))
    mixed = config.integers("moe_layer_freq", low=0)
    facts.count("leading_dense_block_count", mixed.index(1) if 1 in mixed else len(mixed))


_MINIMAX_M3_INDEXER: tuple[Part, ...] = (
    tensor("self_attn.index_q_proj.weight", "indexer.q_proj.weight", "* embd", in_full),
    tensor("self_attn.index_k_proj.weight", "indexer.k_proj.weight", "index_dim embd", in_full),
    norm("self_attn.index_q_norm", "indexer.q_norm", "index_dim"),
    norm("self_attn.index_k_norm", "indexer.k_norm", "index_dim"),
)
_MINIMAX_M3 = Architecture(
    "minimax-m3",
    (
        *NORMS, *QK_NORMS, *attention(),
        either(
            (
                *experts("block_sparse_moe", "w1 w3 w2"), *_MINIMAX_M3_INDEXER,
                tensor("block_sparse_moe.e_score_correction_bias", "exp_probs_b.bias", "experts"),
                *gated("block_sparse_moe.shared_experts", end="_shexp", width="*"),
            ),
            FEED_FORWARD,
        ),
    ),
    activations=frozenset({"swigluoai"}), norm_shift=1.0, sizes=_minimax3_sizes, entries=_minimax3_entries,
    keys=(
        *counts(rope__dimension_count="rotary_dim", expert_shared_count="n_shared_experts"),
        *reals(expert_weights_scale="routed_scaling_factor"),
    ),
)  # fmt: skip

CLASSES = {
    "MaincoderForCausalLM": Architecture(
        "maincoder", (*NORMS, *QK_NORMS, *attention(), *FEED_FORWARD), rotated="all"
    ),
    "NanbeigeForCausalLM": replace(LLAMAS["LlamaForCausalLM"], name="nanbeige", entries=_nanbeige_entries),
    "PanguEmbeddedForCausalLM": Architecture(
        "pangu-embedded", (*NORMS, *attention(), *FEED_FORWARD), keys=VOCAB_SIZE, rotated="all"
    ),
    "CogVLMForCausalLM": _COGVLM,
    "JanusForConditionalGeneration": replace(LLAMAS["LlamaForCausalLM"], rename=_janus_name),
    "PLMForCausalLM": _PLM,
    "Spark2_5ForCausalLM": _SPARK,
    "CodeShellForCausalLM": _CODESHELL,
    "GPTRefactForCausalLM": _REFACT,
    "OpenELMForCausalLM": _OPENELM,
    "HrmTextForCausalLM": _HRM,
    "Plamo2ForCausalLM": _PLAMO2,
    "PLaMo2ForCausalLM": _PLAMO2,
    "Plamo3ForCausalLM": _PLAMO3,
    "PLaMo3ForCausalLM": _PLAMO3,
    "LLaDAModelLM": _LLADA,
    "LLaDAMoEModelLM": _LLADA_MOE,
    "LLaDAMoEModel": _LLADA_MOE,
    "SmallThinkerForCausalLM": _SMALLTHINKER,
    "MapleForCausalLM": _MAPLE,
    "GroveMoeForCausalLM": _GROVE,
    "modeling_grove_moe.GroveMoeForCausalLM": _GROVE,
    "ArcticForCausalLM": _ARCTIC,
    "Cohere2MoeForCausalLM": _COHERE2_MOE,
    "MiniMaxM3SparseForCausalLM": _MINIMAX_M3,
    "MiniMaxM3SparseForConditionalGeneration": _MINIMAX_M3,
}
