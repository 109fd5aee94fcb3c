"""What config.json says of rope, as GGUF says it.

Transformers 5 has one object `rope_parameters`, or one for each kind of layer; before that there were `rope_theta`,
`rope_local_base_freq` and, for models stretched to longer contexts, `rope_scaling`.
"""

from collections.abc import Mapping
from math import log, pi, sqrt

import numpy as np

from qrun.formats.blocks.layout import F32Array
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import Entries, Facts
from qrun.models.hyperparameters import MAX_CONTEXT, MAX_HEAD_DIM, shorten
from qrun.models.rope import BETA_FAST, BETA_SLOW

# Other kinds of stretching that take effect only beyond the trained context.
WITHOUT_EFFECT = ("default", "dynamic", "mrope")
# Those that metadata, tensors or nothing at all can say; by whether a model has no rope but the usual.
KINDS = {True: ("llama3", *WITHOUT_EFFECT), False: ("llama3", "longrope", "proportional", "xdrope", *WITHOUT_EFFECT)}
# What files say of YaRN, key of GGUF -> keys of config.json.
YARN_KEYS = {
    "yarn_ext_factor": ("extrapolation_factor",),
    "yarn_attn_factor": ("attention_factor", "attn_factor"),
    "yarn_beta_fast": ("beta_fast",),
    "yarn_beta_slow": ("beta_slow",),
}


def rope_section(config: Config) -> tuple[Config, float | None]:
    """What holds for layers that see everything, and the base of those that see a window only, if it is another."""
    section = config.rope()
    if section.get("full_attention") is not None:
        local, key = section.section("sliding_attention"), "rope_theta"
        if _kind(local) not in (*WITHOUT_EFFECT, "proportional"):
            raise local.error("rope_type", f"is {_kind(local)!r}, which layers with a window cannot have in GGUF")
        section = section.section("full_attention")
    else:
        local, key = config, "rope_local_base_freq"
    return section.over(_bases(config)), _base(local, key) if local.get(key) is not None else None


def _bases(config: Config) -> Config:
    keys = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    return Config(config.path, {key: config.get(key) for key in keys})


def _base(rope: Config, key: str = "rope_theta") -> float:
    """A base of frequencies. One of 1 or less would not make a scale of them, and engines refuse it."""
    base = rope.real(key, high=1e15)
    if base <= 1.0:
        raise rope.error(key, f"is {base:g}, expected more than 1")
    return base


def rope_entries(facts: Facts, *, plain: bool) -> None:
    """The keys under `<name>.rope.`, but for phi3's. plain: of models with no rope but the usual ones."""
    config, name = facts.config, facts.name
    rope, local_base = rope_section(config)
    kind = _kind(rope)
    factor = rope.real("factor", 1.0, high=1e6)
    if kind == "linear":
        facts.text("rope.scaling.type", "linear")
        facts.real("rope.scaling.factor", factor)
    elif kind == "yarn":
        if plain:
            _check_yarn(rope, factor)
        original = rope.integer(
            "original_max_position_embeddings", config.integer("max_position_embeddings"), high=MAX_CONTEXT
        )
        facts.text("rope.scaling.type", "yarn")
        facts.real("rope.scaling.factor", factor)
        facts.count("rope.scaling.original_context_length", original)
        if not plain:
            for key, names in YARN_KEYS.items():
                given = next((hf for hf in names if rope.get(hf) is not None), None)
                if given is not None:
                    facts.real(f"rope.scaling.{key}", rope.real(given, high=1e6))
    elif not plain and kind == "longrope":
        facts.text("rope.scaling.type", "longrope")
    elif kind not in KINDS[plain] and (kind, name) != ("longrope", "phi3"):
        raise rope.error("rope_type", f"is {kind!r}, which is not supported")
    if plain and name != "phi3" and rope.real("partial_rotary_factor", 1.0) != 1.0:
        raise rope.error("partial_rotary_factor", "is not 1, which is not supported in models of this architecture")
    if not plain and isinstance(sections := rope.get("mrope_section"), list):
        if not 0 < len(sections) <= 4 or not all(type(size) is int and 0 <= size < MAX_HEAD_DIM for size in sections):
            raise rope.error("mrope_section", "is not a list of three or four sizes")
        facts.array("rope.dimension_sections", [*sections, 0, 0, 0][:4])
    facts.real("rope.freq_base", _base(rope))
    if local_base is not None:
        facts.real("rope.freq_base_swa", local_base)


def longrope_entries(entries: Entries, name: str, config: Config, sizes: Mapping[str, int]) -> None:
    """phi3's: how much of a head turns, and the magnitude for long contexts."""
    rope, _ = rope_section(config)
    context, original = _contexts(config, rope)
    entries.count(f"{name}.rope.scaling.original_context_length", original)
    entries.count(f"{name}.rope.dimension_count", _rotated(rope, sizes["head"]))
    if _kind(rope) == "longrope":
        scale = rope.real("factor", context / original, high=1e6)
        default = sqrt(1 + log(scale) / log(original)) if scale > 1 and original > 1 else 1.0
        entries.real(f"{name}.rope.scaling.attn_factor", rope.real("attention_factor", default, high=1e6))


def rope_factors(config: Config, sizes: Mapping[str, int]) -> dict[str, F32Array]:
    """Divisors of the frequencies, one a pair, by the names of the tensors that hold them."""
    rope, _ = rope_section(config)
    match _kind(rope):
        case "llama3":
            factors = _llama3_factors(rope, sizes.get("rope_head", sizes["head"]))
            rest = max(sizes.get("pairs", 0) - len(factors), 0)  # pairs that turn on some layers only, as they are
            return {"rope_freqs.weight": np.append(factors, np.ones(rest, np.float32))}
        case "longrope":
            pairs = _rotated(rope, sizes.get("rope_head", sizes["head"])) // 2
            return {
                f"rope_factors_{length}.weight": np.array(rope.reals(f"{length}_factor", pairs), np.float32)
                for length in ("long", "short")
            }
    return {}


def _kind(rope: Config) -> str:
    kind = rope.text("rope_type", rope.text("type", "default")).lower()
    return "longrope" if kind == "su" else kind  # its first name


def _contexts(config: Config, rope: Config) -> tuple[int, int]:
    context = config.integer("max_position_embeddings", high=MAX_CONTEXT)
    return context, rope.integer("original_max_position_embeddings", context, high=MAX_CONTEXT)


def _rotated(rope: Config, head: int) -> int:
    return int(rope.real("partial_rotary_factor", 1.0, high=1.0) * min(head, MAX_HEAD_DIM))


def _check_yarn(rope: Config, factor: float) -> None:
    """What GGUF can say of YaRN and this engine does not read must have its usual value."""
    usual = {"beta_fast": BETA_FAST, "beta_slow": BETA_SLOW, "truncate": True,
             "attention_factor": 0.1 * log(factor) + 1.0 if factor > 1.0 else 1.0}  # fmt: skip
    for key, value in usual.items():
        given = rope.get(key, value)
        if not isinstance(given, int | float) or not abs(given - value) <= 1e-5 * abs(value):  # also of NaN
            raise rope.error(key, f"is {shorten(given)}; only {value:g} is supported")
    for key in ("mscale", "mscale_all_dim"):
        if rope.get(key) is not None:
            raise rope.error(key, "is given, which is not supported")


def _llama3_factors(rope: Config, head: int) -> F32Array:
    """Long waves are stretched by the whole factor, short ones not at all, and those between in part."""
    base = np.float32(_base(rope))
    factor = rope.real("factor", 8.0, low=1e-6, high=1e6)
    low, high = rope.real("low_freq_factor", 1.0, low=1e-6), rope.real("high_freq_factor", 4.0, low=1e-6)
    original = rope.integer("original_max_position_embeddings", 8192, high=MAX_CONTEXT)
    if low >= high:
        raise rope.error("high_freq_factor", f"is {high:g}, which is not above low_freq_factor")
    # In single precision and in this order, as the reference converter has it.
    frequencies = np.float32(1) / base ** (np.arange(0, head, 2, dtype=np.float32) / np.float32(head))
    wavelengths = np.float32(2 * pi) / frequencies
    smooth = (np.float32(original) / wavelengths - np.float32(low)) / np.float32(high - low)
    between = np.float32(1) / ((1 - smooth) / np.float32(factor) + smooth)
    factors = np.where(wavelengths > original / low, np.float32(factor), between)
    return np.where(wavelengths < original / high, np.float32(1), factors).astype(np.float32)
