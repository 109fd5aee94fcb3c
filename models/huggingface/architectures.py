"""Which models can be converted, and what their tensors are called on both sides.

An architecture is known by the class that config.json names under "architectures". Names and shapes are those of the
Transformers library (modeling_*.py); the names in GGUF files those of llama.cpp (gguf-py/gguf/tensor_mapping.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Heads = Literal["", "heads", "kv_heads"]
Windows = Literal["", "all", "all if used", "later layers", "layers without positions", "gemma"]
"""Which layers see a window only, where config.json gives one: all; all or those from `max_window_layers` on, if
`use_sliding_window` says so; as each Gemma has it. What `layer_types` says of single layers goes before that."""

SILU = frozenset({"silu", "swish"})
GELU = frozenset({"gelu", "gelu_pytorch_tanh"})  # a config that says "gelu" is an old one of Gemma: it means the other


@dataclass(frozen=True)
class Mapped:
    """A tensor of a layer. hf, gguf: its names, without what every tensor of the layer begins with.

    shape: names of dimensions, see tensors.py. heads: the number of heads, of each of which the rows change places.
    """

    hf: str
    gguf: str
    shape: tuple[str, ...]
    optional: bool = False
    heads: Heads = ""


@dataclass(frozen=True)
class Experts:
    """One matrix of each expert, stacked into one tensor. hf: the name, with {} for the expert's number.

    joined: the tensor that holds these matrices of all experts in some files, and the part of its rows that is meant:
    (name, number of the part, number of parts).
    """

    hf: str
    gguf: str
    shape: tuple[str, str]
    joined: tuple[str, int, int]


@dataclass(frozen=True)
class Architecture:
    """name: as GGUF has it. layer: the tensors of a layer. norm_shift: what is to be added to the weights of norms.

    defaults: of config.json, where they differ from DEFAULTS. windows: which layers see a window only, see Windows.
    """

    name: str
    layer: tuple[Mapped | Experts, ...]
    activations: frozenset[str] = SILU
    norm_shift: float = 0.0
    defaults: Mapping[str, Any] = field(default_factory=dict)
    windows: Windows = ""


def _norm(hf: str, gguf: str, width: str = "embd") -> Mapped:
    return Mapped(f"{hf}.weight", f"{gguf}.weight", (width,))


def _linear(hf: str, gguf: str, out: str, width: str, heads: Heads = "") -> tuple[Mapped, Mapped]:
    """A matrix, and the bias that some models have."""
    return (
        Mapped(f"{hf}.weight", f"{gguf}.weight", (out, width), heads=heads),
        Mapped(f"{hf}.bias", f"{gguf}.bias", (out,), optional=True, heads=heads),
    )


def _attention(*, permuted: bool = False) -> tuple[Mapped, ...]:
    """permuted: GGUF files of this architecture have the pairs that rope turns side by side."""
    return (
        *_linear("self_attn.q_proj", "attn_q", "q", "embd", "heads" if permuted else ""),
        *_linear("self_attn.k_proj", "attn_k", "kv", "embd", "kv_heads" if permuted else ""),
        *_linear("self_attn.v_proj", "attn_v", "kv", "embd"),
        *_linear("self_attn.o_proj", "attn_output", "embd", "q"),
    )


_FEED_FORWARD = (
    *_linear("mlp.gate_proj", "ffn_gate", "ff", "embd"),
    *_linear("mlp.up_proj", "ffn_up", "ff", "embd"),
    *_linear("mlp.down_proj", "ffn_down", "embd", "ff"),
)
_NORMS = (_norm("input_layernorm", "attn_norm"), _norm("post_attention_layernorm", "ffn_norm"))
_FOUR_NORMS = (
    _norm("input_layernorm", "attn_norm"),
    _norm("post_attention_layernorm", "post_attention_norm"),
    _norm("pre_feedforward_layernorm", "ffn_norm"),
    _norm("post_feedforward_layernorm", "post_ffw_norm"),
)
_QK_NORMS = (_norm("self_attn.q_norm", "attn_q_norm", "head"), _norm("self_attn.k_norm", "attn_k_norm", "head"))


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Mapped | Experts, ...]:
    both, one = f"{block}.experts.gate_up_proj", f"{block}.experts.down_proj"
    return (
        Mapped(f"{block}.gate.weight", "ffn_gate_inp.weight", ("experts", "embd")),
        Experts(f"{block}.experts.{{}}.{gate}.weight", "ffn_gate_exps.weight", ("expert_ff", "embd"), (both, 0, 2)),
        Experts(f"{block}.experts.{{}}.{up}.weight", "ffn_up_exps.weight", ("expert_ff", "embd"), (both, 1, 2)),
        Experts(f"{block}.experts.{{}}.{down}.weight", "ffn_down_exps.weight", ("embd", "expert_ff"), (one, 0, 1)),
    )


DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}
_GEMMA = {"head_dim": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "max_position_embeddings": 8192,
          "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip
_GEMMA3 = _GEMMA | {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208, "sliding_window": 4096,
                    "max_position_embeddings": 131072, "query_pre_attn_scalar": 256, "rope_theta": 1_000_000.0,
                    "rope_local_base_freq": 10000.0}  # fmt: skip

_QWEN_WINDOW = {"sliding_window": 4096}  # if it is used

_LLAMA = Architecture("llama", (*_NORMS, *_attention(permuted=True), *_FEED_FORWARD))
_GEMMA3_TEXT = Architecture(
    "gemma3", (*_FOUR_NORMS, *_QK_NORMS, *_attention(), *_FEED_FORWARD), GELU, 1.0, _GEMMA3, "gemma"
)  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "LLaMAForCausalLM": _LLAMA,
    "MistralForCausalLM": replace(_LLAMA, defaults={"sliding_window": 4096}, windows="all"),
    "MixtralForCausalLM": Architecture(
        "llama", (*_NORMS, *_attention(permuted=True), *_experts("block_sparse_moe", "w1", "w3", "w2")),
        defaults={"num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0},
        windows="all",
    ),
    "Qwen2ForCausalLM": Architecture(
        "qwen2", (*_NORMS, *_attention(), *_FEED_FORWARD), defaults=_QWEN_WINDOW, windows="later layers"
    ),
    "Qwen3ForCausalLM": Architecture(
        "qwen3", (*_NORMS, *_QK_NORMS, *_attention(), *_FEED_FORWARD), defaults={"head_dim": 128} | _QWEN_WINDOW,
        windows="later layers",
    ),
    "Qwen3MoeForCausalLM": Architecture(
        "qwen3moe",
        (*_NORMS, *_QK_NORMS, *_attention(), *_experts("mlp", "gate_proj", "up_proj", "down_proj")),
        defaults={"num_experts": 128, "num_experts_per_tok": 8} | _QWEN_WINDOW,
        windows="all if used",
    ),
    "GemmaForCausalLM": Architecture("gemma", (*_NORMS, *_attention(), *_FEED_FORWARD), GELU, 1.0, _GEMMA),
    "Gemma2ForCausalLM": Architecture(
        "gemma2", (*_FOUR_NORMS, *_attention(), *_FEED_FORWARD), GELU, 1.0,
        _GEMMA | {"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
                  "query_pre_attn_scalar": 256},
        "gemma",
    ),
    "Gemma3ForCausalLM": _GEMMA3_TEXT,
    "Gemma3ForConditionalGeneration": _GEMMA3_TEXT,
    "Phi3ForCausalLM": Architecture(
        "phi3",
        (
            *_NORMS,
            *_linear("self_attn.qkv_proj", "attn_qkv", "qkv", "embd"),
            *_linear("self_attn.o_proj", "attn_output", "embd", "q"),
            *_linear("mlp.gate_up_proj", "ffn_up", "twice_ff", "embd"),
            *_linear("mlp.down_proj", "ffn_down", "embd", "ff"),
        ),
        defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        windows="all",
    ),
    "SmolLM3ForCausalLM": Architecture(
        "smollm3", (*_NORMS, *_attention(permuted=True), *_FEED_FORWARD),
        defaults={"tie_word_embeddings": True, "rope_theta": 2_000_000.0, "num_key_value_heads": 4},
        windows="layers without positions",
    ),
}  # fmt: skip
"""By the class's name."""
