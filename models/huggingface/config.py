"""Numbers and names out of config.json, checked as they are taken."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from qrun.formats import FormatError
from qrun.formats.gguf.cursor import quote
from qrun.models.hyperparameters import MAX_WIDTH

DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}
# What models call what all have: the name by which it is asked for here -> other names of it.
SYNONYMS = {
    "hidden_size": ("n_embd", "d_model", "dim", "n_embed", "model_dim"),
    "num_hidden_layers": ("n_layers", "n_layer", "num_layers", "num_transformer_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("n_kv_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", "kv_n_heads",
                            "num_attention_groups"),
    "intermediate_size": ("n_inner", "hidden_dim", "ffn_hidden_size", "block_ff_dim", "d_ff",
                          "mlp_hidden_size"),
    "max_position_embeddings": ("n_ctx", "n_positions", "max_sequence_length", "model_max_length", "seq_length",
                                "max_seq_len", "max_context_length"),
    "vocab_size": ("padded_vocab_size",),
    "rms_norm_eps": ("norm_eps",),
    "layer_norm_eps": ("layer_norm_epsilon", "norm_epsilon"),
    "rope_theta": ("rotary_emb_base", "rope_freq_constant", "global_rope_theta", "rope_global_theta"),
    "rope_local_base_freq": ("local_rope_theta", "rope_local_theta", "swa_rope_theta"),
    "num_experts_per_tok": ("num_experts_per_token", "top_k_experts", "moe_top_k"),
    "partial_rotary_factor": ("rotary_pct", "rope_pct", "rope_percent"),
    "hidden_act": ("activation_function", "mlp_hidden_act", "activation"),
    "head_dim": ("attention_head_dim", "d_kv"),
}


class Config:
    """Typed, bounded access. A key that is missing or null has its default: the one below, or the one of the call.

    defaults: what the model's class in Transformers takes where a file says nothing; files are often saved without.
    Raises FormatError, with the file and the key, for a value of the wrong type or out of bounds.
    """

    def __init__(
        self, path: Path, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, prefix: str = ""
    ) -> None:
        self.path = path
        self._values = values
        self._defaults = defaults or {}
        self._prefix = prefix
        self.asked: set[str] = set()
        """The keys that were asked for so far."""

    def error(self, key: str, problem: str) -> FormatError:
        """The error to raise: `<file>: <key> <problem>`."""
        return FormatError(self.path, f"{self._prefix}{key} {problem}")

    def given(self) -> Mapping[str, Any]:
        """All keys that the file has, with their values."""
        return self._values

    def get(self, key: str, default: Any = None) -> Any:
        """A value of any type."""
        self.asked.add(key)
        value = self._values.get(key)
        if value is None:
            value = self._defaults.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = MAX_WIDTH) -> int:
        """A whole number in low..high; without a default, the key is required."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"is not a whole number: {quote(str(value))}")
        if not low <= value <= high:
            raise self.error(key, f"is {value}, expected {low} to {high}")
        return value

    def real(self, key: str, default: float | None = None, low: float = 0.0, high: float = 1e30) -> float:
        """A finite number in low..high; without a default, the key is required."""
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"is not a number: {quote(str(value))}")
        if not low <= value <= high or not isfinite(value):
            raise self.error(key, f"is {value}, expected {low:g} to {high:g}")
        return float(value)

    def text(self, key: str, default: str = "") -> str:
        value = self._required(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"is not a text: {quote(str(value))}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._required(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"is neither true nor false: {quote(str(value))}")
        return value

    def reals(self, key: str, count: int) -> list[float]:
        """That many finite numbers."""
        values = self.get(key)
        if not isinstance(values, list) or len(values) != count:
            raise self.error(key, f"is not a list of {count} numbers")
        if not all(type(value) in (int, float) and abs(value) < 1e30 for value in values):
            raise self.error(key, "has a value that is no finite number")
        return [float(value) for value in values]

    def integers(self, key: str, low: int = 1, high: int = MAX_WIDTH, default: int | None = None) -> list[int]:
        """A list of whole numbers in low..high, or one that stands for a list of it alone."""
        values = self._required(key, default)
        values = values if isinstance(values, list) and values else [values]
        return [Config(self.path, {key: value}, prefix=self._prefix).integer(key, None, low, high) for value in values]

    def layer_kinds(self, n_layers: int) -> list[Any] | None:
        """What `layer_types` says of each layer; None where it is no list of as many."""
        kinds = self.get("layer_types")
        return kinds if isinstance(kinds, list) and len(kinds) == n_layers else None

    def required_layer_kinds(self, n_layers: int) -> list[Any]:
        """The same, which the file has to say."""
        kinds = self.layer_kinds(n_layers)
        if kinds is None:
            raise self.error("layer_types", f"is not a list of {n_layers} kinds")
        return kinds

    def section(self, key: str) -> Config:
        """The values of an object within this one; it is empty where there is none."""
        values = self.get(key, {})
        if not isinstance(values, dict):
            raise self.error(key, "is not an object")
        return Config(self.path, values, prefix=f"{self._prefix}{key}.")

    def rope(self) -> Config:
        """What is said of rope, by the newer of its names or the older."""
        return self.section("rope_parameters" if self.get("rope_parameters") else "rope_scaling")

    def over(self, other: Config) -> Config:
        """These values, and those of another one where there are none here."""
        return Config(self.path, {**other._values, **self._values}, {**other._defaults, **self._defaults}, self._prefix)

    def _required(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is None:
            raise self.error(key, "is missing")
        return value
