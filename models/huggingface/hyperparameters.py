"""The hyper-parameters of config.json as metadata of a GGUF file, under the names of llama.cpp's converter.

What a file cannot say, and no engine would therefore do, is refused: a wrong model is worse than none.
"""

from collections.abc import Mapping

from qrun.formats import ValueType
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import GATING, Entries, Facts
from qrun.models.huggingface.layout import Architecture, Key
from qrun.models.huggingface.rope import longrope_entries, rope_entries, rope_section
from qrun.models.hyperparameters import MAX_CONTEXT, MAX_LAYERS
from qrun.models.smollm3 import NOPE_PERIOD

# Layers of which the last sees everything and the others a window: what engines take where a file says nothing.
WINDOW_PERIODS = {"gemma2": 2, "gemma3": 6, "gemma-embedding": 6}
# Those of which the models divide queries by the share of the embedding that a head has, by the count of layers.
LARGEST = {"gemma2": 46, "gemma3": 62}
# Of which engines know no other rope than one of the whole head, stretched in the usual ways.
PLAIN_ROPE = ("llama", "qwen2", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "phi3", "smollm3")


def hyperparameter_entries(
    entries: Entries, architecture: Architecture, config: Config, sizes: Mapping[str, int]
) -> None:
    """All keys that begin with the architecture's name. Raises FormatError for what GGUF cannot say."""
    name = architecture.name
    facts = Facts(entries, name, config, sizes)
    _check(architecture, config, sizes)
    facts.count("block_count", sizes["layers"] + sizes["drafts"])
    facts.count("context_length", config.integer("max_position_embeddings", high=MAX_CONTEXT))
    facts.count("embedding_length", sizes["embd"])
    if sizes["ff"]:
        facts.count("feed_forward_length", sizes["ff"])
    facts.count("attention.head_count", sizes["heads"])
    if sizes["heads"]:
        facts.count("attention.head_count_kv", sizes["kv_heads"])
        rope_entries(facts, plain=name in PLAIN_ROPE)
        facts.count("attention.key_length", sizes["head"])
        facts.count("attention.value_length", sizes["head"])
    _norm_entries(facts, architecture)
    _expert_entries(facts)
    if architecture.rotated:
        part = rope_section(config)[0].real("partial_rotary_factor", 1.0, high=1.0)
        facts.count("rope.dimension_count", int(sizes["head"] * (part if architecture.rotated == "part" else 1.0)))
    if sizes["drafts"]:
        facts.count("nextn_predict_layers", sizes["drafts"])
    for key in architecture.keys:
        _key_entry(facts, key)
    if name == "phi3":
        longrope_entries(entries, name, config, sizes)
        facts.count("attention.sliding_window", config.integer("sliding_window", 0, 0, MAX_CONTEXT))
    if name in WINDOW_PERIODS:
        _gemma_entries(entries, name, config, sizes)
    elif architecture.windows:
        _window_entries(entries, architecture, config, sizes["layers"])
    if architecture.entries:
        architecture.entries(facts)


def _key_entry(facts: Facts, key: Key) -> None:
    config = facts.config
    hf = next((name for name in key.hf.split() if config.get(name) is not None), None)
    if hf is None:
        return
    match key.kind:
        case "count":
            facts.count(key.gguf, config.integer(hf, low=0, high=MAX_CONTEXT))
        case "real":
            facts.real(key.gguf, config.real(hf, low=-1e30))
        case "flag":
            facts.flag(key.gguf, config.flag(hf))


def _norm_entries(facts: Facts, architecture: Architecture) -> None:
    if facts.config.get("rms_norm_eps") is not None:
        facts.real("attention.layer_norm_rms_epsilon", facts.config.real("rms_norm_eps", high=1.0))
    if facts.config.get("layer_norm_eps") is not None:
        facts.real("attention.layer_norm_epsilon", facts.config.real("layer_norm_eps", high=1.0))


GATING_KEYS = (
    "score_function", "scoring_func", "score_func", "moe_router_activation", "moe_router_activation_func",
    "expert_selection_fn",
)  # fmt: skip


def _expert_entries(facts: Facts) -> None:
    config, n_experts = facts.config, facts.sizes["experts"]
    if not n_experts:
        return
    facts.count("expert_count", n_experts)
    facts.count("expert_used_count", config.integer("num_experts_per_tok", high=n_experts))
    for key, hf in (("expert_group_count", "n_group"), ("expert_group_used_count", "topk_group")):
        if config.get(hf) is not None:
            facts.count(key, config.integer(hf, high=n_experts))
    for hf in GATING_KEYS:
        if config.get(hf) is not None:
            gating = GATING.get(config.text(hf))
            if gating is None:
                raise config.error(hf, f"is {config.get(hf)!r}, which is not supported")
            facts.count("expert_gating_func", gating)
            break


def _window_entries(entries: Entries, architecture: Architecture, config: Config, n_layers: int) -> None:
    """Which layers see a window, with a flag for each: without flags engines take a window for unsure."""
    null = "sliding_window" in config.given() and config.given()["sliding_window"] is None
    window = 0 if null else config.integer("sliding_window", 0, low=0, high=MAX_CONTEXT)
    sliding = _windowed(architecture, config, n_layers, has_window=window > 0)
    if any(sliding) and window < config.integer("max_position_embeddings", high=MAX_CONTEXT):
        entries.count(f"{architecture.name}.attention.sliding_window", window)
        entries.array(f"{architecture.name}.attention.sliding_window_pattern", sliding, ValueType.BOOL)


def _windowed(architecture: Architecture, config: Config, n_layers: int, *, has_window: bool) -> list[bool]:
    """Of each layer, whether it sees a window only, as the model's class has it."""
    kind = architecture.windows
    if not kind:  # the class knows no windows
        return [False] * n_layers
    if kind != "all":
        has_window = has_window and config.flag("use_sliding_window")
    match kind:
        case "later layers":
            first = config.integer("max_window_layers", 28, low=0, high=MAX_LAYERS)
            sliding = [has_window and layer >= first for layer in range(n_layers)]
        case "layers without positions":
            sliding = [has_window and (layer + 1) % NOPE_PERIOD == 0 for layer in range(n_layers)]
        case _:
            sliding = [has_window] * n_layers
    named = _sliding_layers(config, n_layers)
    if named is None or named == sliding:
        return sliding
    if kind in ("all", "all if used") or (any(named) and not has_window):
        raise config.error("layer_types", "is not what sliding_window and use_sliding_window say")
    return named


def _gemma_entries(entries: Entries, name: str, config: Config, sizes: Mapping[str, int]) -> None:
    for kind in ("attn", "final"):
        if cap := config.real(f"{kind}_logit_softcapping", 0.0):
            entries.real(f"{name}.{kind}_logit_softcapping", cap)
    if config.get("sliding_window_pattern") == 1:
        return
    entries.count(f"{name}.attention.sliding_window", config.integer("sliding_window", high=MAX_CONTEXT))
    sliding = _sliding_layers(config, sizes["layers"])
    if sliding is None and (given := config.integer("sliding_window_pattern", 0, low=0)):
        sliding = [(layer + 1) % given > 0 for layer in range(sizes["layers"])]
    period = WINDOW_PERIODS[name]
    if sliding is not None and sliding != [(layer + 1) % period > 0 for layer in range(sizes["layers"])]:
        entries.array(f"{name}.attention.sliding_window_pattern", sliding, ValueType.BOOL)


def _sliding_layers(config: Config, n_layers: int) -> list[bool] | None:
    """What `layer_types` says, if anything."""
    if config.get("layer_types") is None:
        return None
    kinds = config.required_layer_kinds(n_layers)
    unknown = next((kind for kind in kinds if kind not in ("sliding_attention", "full_attention")), None)
    if unknown is not None:
        raise config.error("layer_types", f"has {unknown!r}, which is not supported")
    return [kind == "sliding_attention" for kind in kinds]


def _check(architecture: Architecture, config: Config, sizes: Mapping[str, int]) -> None:
    name = architecture.name
    for key, fixed in architecture.fixed.items():
        if (given := config.get(key, fixed)) != fixed:
            problem = f"is {given!r}; models of the architecture {name} have {fixed!r}, and GGUF cannot say otherwise"
            raise config.error(key, problem)
    if period := architecture.period:
        sliding = _sliding_layers(config, sizes["layers"])
        if sliding not in (None, [(layer + 1) % period > 0 for layer in range(sizes["layers"])]):
            raise config.error("layer_types", f"is not every layer but each {period}th, as engines take it")
    key = "hidden_act" if config.get("hidden_activation") is None else "hidden_activation"
    activation = config.text(key, next(iter(architecture.activations)))
    if activation not in architecture.activations:
        raise config.error(key, f"is {activation!r}, which models of the architecture {name} cannot have in GGUF")
    if sizes["kv_heads"] and sizes["heads"] % sizes["kv_heads"]:
        raise config.error("num_key_value_heads", f"is {sizes['kv_heads']}, which does not divide {sizes['heads']}")
    if config.flag("use_bidirectional_attention") and not architecture.embeds:
        raise config.error("use_bidirectional_attention", "is true, which is not supported")
    if name in LARGEST:
        _check_query_scale(config, sizes, largest=sizes["layers"] == LARGEST[name])
    if name == "gemma-embedding":
        _check_query_scale(config, sizes, largest=False)
    if name == "qwen3moe":
        if not config.flag("norm_topk_prob"):
            raise config.error("norm_topk_prob", "is not true: GGUF cannot say so, and engines would normalise")
        if config.get("mlp_only_layers") or config.integer("decoder_sparse_step", 1) != 1:
            raise config.error("mlp_only_layers", "names layers without experts, which is not supported")
    if name == "gemma3" and config.real("attn_logit_softcapping", 0.0):
        raise config.error("attn_logit_softcapping", "is given, which models of this architecture cannot have in GGUF")
    if name == "smollm3":
        _check_nope(config, sizes["layers"])


def _check_query_scale(config: Config, sizes: Mapping[str, int], *, largest: bool) -> None:
    width = sizes["embd"] // sizes["heads"] if largest else sizes["head"]
    if (given := config.real("query_pre_attn_scalar")) != width:
        raise config.error("query_pre_attn_scalar", f"is {given:g}; GGUF cannot say so, and engines would take {width}")


def _check_nope(config: Config, n_layers: int) -> None:
    turned = config.get("no_rope_layers")  # 1 for a layer with positions
    period = config.integer("no_rope_layer_interval", NOPE_PERIOD)
    if turned is None:
        turned = [int((layer + 1) % period != 0) for layer in range(n_layers)]
    if turned != [int((layer + 1) % NOPE_PERIOD != 0) for layer in range(n_layers)]:
        raise config.error("no_rope_layers", f"is not every layer but each {NOPE_PERIOD}th, as engines take it")
