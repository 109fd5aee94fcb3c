"""Which tensor gets which type, when a whole model is asked for by a name such as Q4_K_M.

A name stands for a mix: most tensors get its base type, and those that suffer most from rounding (the output, attention
values, the down projections of some layers) get more bits. The choices are llama.cpp's (`src/llama-quant.cpp`), tensor
for tensor, so that a file is what people expect by that name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qrun.formats import TensorType as T

# Name -> (base type, the number by which `general.file_type` knows the mix).
FILE_TYPES: dict[str, tuple[T, int]] = {
    "F32": (T.F32, 0),
    "F16": (T.F16, 1),
    "BF16": (T.BF16, 32),
    "Q8_0": (T.Q8_0, 7),
    "Q4_0": (T.Q4_0, 2),
    "Q4_1": (T.Q4_1, 3),
    "Q5_0": (T.Q5_0, 8),
    "Q5_1": (T.Q5_1, 9),
    "Q1_0": (T.Q1_0, 40),
    "Q2_0": (T.Q2_0, 41),
    "Q2_K": (T.Q2_K, 10),
    "Q2_K_S": (T.Q2_K, 21),
    "Q3_K_S": (T.Q3_K, 11),
    "Q3_K_M": (T.Q3_K, 12),
    "Q3_K_L": (T.Q3_K, 13),
    "Q4_K_S": (T.Q4_K, 14),
    "Q4_K_M": (T.Q4_K, 15),
    "Q5_K_S": (T.Q5_K, 16),
    "Q5_K_M": (T.Q5_K, 17),
    "Q6_K": (T.Q6_K, 18),
    "IQ1_S": (T.IQ1_S, 24),
    "IQ1_M": (T.IQ1_M, 31),
    "IQ2_XXS": (T.IQ2_XXS, 19),
    "IQ2_XS": (T.IQ2_XS, 20),
    "IQ2_S": (T.IQ2_XS, 28),
    "IQ2_M": (T.IQ2_S, 29),
    "IQ3_XXS": (T.IQ3_XXS, 23),
    "IQ3_XS": (T.IQ3_S, 22),
    "IQ3_S": (T.IQ3_S, 26),
    "IQ3_M": (T.IQ3_S, 27),
    "IQ4_NL": (T.IQ4_NL, 25),
    "IQ4_XS": (T.IQ4_XS, 30),
    "TQ1_0": (T.TQ1_0, 36),
    "TQ2_0": (T.TQ2_0, 37),
    "MXFP4": (T.MXFP4, 38),
    "NVFP4": (T.NVFP4, 39),
}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "MXFP4_MOE": "MXFP4"}
COPY = "COPY"

FLOATS = frozenset({T.F32, T.F16, T.BF16, T.F64})
NUMBERS = frozenset({T.I8, T.I16, T.I32, T.I64})

# Mixes of the fewest bits, where all that is not spared gets a type of one or two.
LOWEST = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
# Those of them that spare tensors with IQ3_S; the others do with Q2_K.
WITH_THREE_BITS = ("IQ2_S", "IQ2_M")

# Types of which a tensor would be garbage without an importance matrix.
NEED_IMPORTANCE = frozenset({T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS})

# What an embedding gets that is not the output too.
EMBEDDINGS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), T.Q2_K),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), T.IQ3_S),
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q2_0"), T.Q4_K),
}

# Where rows are not whole blocks of 64, 128 or 256: a type with blocks of 32 that has as many bits or more.
FALLBACKS = {
    T.Q1_0: T.Q4_0,
    T.Q2_0: T.Q4_0,
    T.TQ1_0: T.Q4_0,
    T.TQ2_0: T.Q4_0,
    T.IQ1_S: T.IQ4_NL,
    T.IQ1_M: T.IQ4_NL,
    T.IQ2_XXS: T.IQ4_NL,
    T.IQ2_XS: T.IQ4_NL,
    T.IQ2_S: T.IQ4_NL,
    T.IQ3_XXS: T.IQ4_NL,
    T.IQ3_S: T.IQ4_NL,
    T.NVFP4: T.IQ4_NL,
    T.Q2_K: T.Q4_0,
    T.Q3_K: T.Q4_0,
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
    T.IQ4_XS: T.IQ4_NL,
}

# Tensors that stay as they are although their names end in "weight": small, or of another use than in a product.
KEPT = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight",
    ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger",
    "a.rvq.codebook", "mm.a.code_embd",
    *(f"time_mix_{part}.weight" for part in ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2",
                                             "decay_w1", "decay_w2", "lerp_fused")),
)  # fmt: skip
KEPT_NAMES = frozenset({"position_embd.weight", "token_types.weight"})


@dataclass(frozen=True)
class Facts:
    """What of a model's metadata the choice depends on."""

    architecture: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    n_experts: int
    has_importance: bool = False

    @classmethod
    def of(cls, metadata: Mapping[str, Any], has_importance: bool) -> Facts:
        architecture = str(metadata.get("general.architecture", ""))

        def number(key: str, default: int) -> int:
            value = metadata.get(f"{architecture}.{key}", default)
            if hasattr(value, "__len__"):  # a number for each layer
                value = value[0] if len(value) else default
            return int(value) if isinstance(value, int) or hasattr(value, "__int__") else default

        n_heads = number("attention.head_count", 1)
        n_kv_heads = number("attention.head_count_kv", n_heads)
        n_layers, n_experts = number("block_count", 0), number("expert_count", 0)
        return cls(architecture, n_layers, n_heads, n_kv_heads, n_experts, has_importance)

    @property
    def heads_per_kv(self) -> int:
        return self.n_heads // self.n_kv_heads if self.n_kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """Eighty layers whose values many heads share: those get more bits."""
        if self.n_layers != 80:
            return False
        return self.architecture == "qwen2" or (self.architecture == "llama" and self.n_heads != self.n_kv_heads)


@dataclass(frozen=True)
class Choice:
    """What the user asked for. overrides: patterns (regular expressions, found anywhere in a name) with their types.

    keep: tensors of these types stay as they are. types: the type of every tensor by its name, chosen one by one; then
    file_type is only what the file says of itself, and the rest does not matter.
    """

    file_type: str
    pure: bool = False
    output: T | None = None
    embedding: T | None = None
    overrides: Sequence[tuple[re.Pattern[str], T]] = ()
    keep: Collection[T] = ()
    types: Mapping[str, T] | None = None


def file_type_name(name: str) -> str:
    """The proper spelling. Raises ValueError if there is no such type."""
    upper = name.upper()
    proper = ALIASES.get(upper, upper)
    if proper != COPY and proper not in FILE_TYPES:
        known = f"it can be {', '.join(FILE_TYPES)} or {COPY}"
        raise ValueError(f"{name!r} is no type{perhaps(name, (*FILE_TYPES, COPY))}: {known}")
    return proper


def perhaps(name: str, known: Iterable[str]) -> str:
    """" (did you mean Q4_K_M?)", of the one among the names that is most like it; nothing if none is."""
    from difflib import get_close_matches  # only on the way to an error

    def plain(text: str) -> str:
        return re.sub(r"[^A-Z0-9]", "", text.upper())

    names = {plain(one): one for one in known}
    close = get_close_matches(plain(name), names, 1, 0.7)
    return f" (did you mean {names[close[0]]}?)" if close else ""


def category(name: str) -> str:
    """What a tensor is for, as far as the choice goes."""
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "embedding"
    for part in ("attn_qkv", "attn_kv_b", "attn_v", "attn_k", "attn_q", "attn_output"):
        if f"{part}.weight" in name:
            return "attn_v" if part in ("attn_qkv", "attn_kv_b") else part
    return next((part for part in ("ffn_up", "ffn_gate", "ffn_down") if part in name), "other")


def needs_importance(name: str, type: T, choice: Choice) -> bool:
    """Whether a tensor would be garbage without an importance matrix: of few bits, or Q2_K where little else is."""
    if category(name) in ("output", "embedding"):
        return False
    return type in NEED_IMPORTANCE or (type == T.Q2_K and choice.file_type == "Q2_K_S")


def is_quantisable(name: str, shape: tuple[int, ...], type: T) -> bool:
    n_dims = next((len(shape) - i for i, n in enumerate(shape) if n > 1), 1)
    if n_dims < 2 or type in NUMBERS or not name.endswith("weight"):
        return False
    return name not in KEPT_NAMES and not any(part in name for part in KEPT)


def layer_of(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def choose_types(tensors: Mapping[str, tuple[T, tuple[int, ...]]], facts: Facts, choice: Choice) -> dict[str, T]:
    """The type of each tensor. tensors: name -> (type it has, shape in NumPy's order)."""
    if choice.types is not None:
        return {name: choice.types[name] for name in tensors}
    if choice.file_type == COPY:
        return {name: type for name, (type, _) in tensors.items()}
    mix = _Mix(facts, choice, tensors)
    # Some choices count the tensors of a kind that came before: layer by layer, within a layer by name.
    order = sorted(tensors, key=lambda name: (layer_of(name), name.encode("utf-8", "surrogateescape")))
    types = {name: mix.type_of(name, *tensors[name]) for name in order}
    return {name: types[name] for name in tensors}


class _Mix:
    """The choice for one model, tensor after tensor."""

    def __init__(self, facts: Facts, choice: Choice, names: Mapping[str, object]) -> None:
        self.facts, self.choice = facts, choice
        self.name = choice.file_type
        self.base = FILE_TYPES[choice.file_type][0]
        self.n_values = sum(category(name) == "attn_v" for name in names)
        self.tied = "output.weight" not in names
        self.i_values = self.i_down = 0
        self.i_wide = {"ffn_gate": 0, "ffn_up": 0}

    def type_of(self, name: str, type: T, shape: tuple[int, ...]) -> T:
        if type in self.choice.keep or not is_quantisable(name, shape, type):
            return type
        kind = category(name)
        manual = next((chosen for pattern, chosen in self.choice.overrides if pattern.search(name)), None)
        embeds = kind == "embedding" and (name == "token_embd.weight" or manual is None)
        if embeds and self.choice.embedding is not None:
            return fitting_type(self.choice.embedding, shape[-1])
        if kind == "output" and self.choice.output is not None:
            return fitting_type(self.choice.output, shape[-1])
        if manual is not None:
            return fitting_type(manual, shape[-1])
        if self.base in FLOATS:
            return self.base
        chosen = self.base if self.choice.pure else self._mixed(name, kind, shape)
        return fitting_type(chosen, shape[-1])

    def _mixed(self, name: str, kind: str, shape: tuple[int, ...]) -> T:
        if kind == "output" or (kind == "embedding" and self.tied):
            return self._output(shape[-1])
        if self.name == "MXFP4":
            return T.MXFP4 if len(shape) > 2 and shape[-3] > 1 else T.Q8_0
        if kind == "embedding":
            return EMBEDDINGS.get(self.name, self.base)
        if self.name in LOWEST:
            return self._lowest(kind)
        if kind == "attn_v":
            return self._values()
        if kind == "attn_k" and self.facts.n_experts == 8:
            return T.Q8_0
        if kind in ("attn_k", "attn_q"):
            return {"IQ3_XS": T.IQ3_XXS, "IQ3_XXS": T.IQ2_S}.get(self.name, self.base)
        if kind == "ffn_down":
            return self._down(name)
        if kind == "attn_output":
            return self._attention_output()
        if kind in self.i_wide:
            return self._wide(name, kind)
        return self.base

    def _lowest(self, kind: str) -> T:
        """Of a tensor in a mix of one or two bits that is no embedding and no output."""
        facts, spared = self.facts, T.IQ3_S if self.name in WITH_THREE_BITS else T.Q2_K
        if kind == "attn_v":
            return T.Q4_K if facts.heads_per_kv >= 4 or facts.n_experts >= 4 else spared
        if kind == "attn_k" and facts.n_experts == 8:
            return T.Q4_K
        if kind == "ffn_down":
            self.i_down += 1
            return spared if self.i_down - 1 < facts.n_layers // 8 else self.base
        if kind == "attn_output":
            if facts.n_experts == 8:
                return T.Q5_K
            if self.name in ("IQ1_S", "IQ1_M"):
                return T.IQ2_XXS
            return T.IQ3_S if self.name in WITH_THREE_BITS else self.base
        return self.base

    def _output(self, row: int) -> T:
        if self.choice.output is not None:
            return self.choice.output
        if self.name == "MXFP4" or self.facts.architecture == "falcon" or row % block_size(self.base):
            return T.Q8_0
        if self.name in LOWEST or self.name == "IQ3_XXS":
            return T.Q5_K
        return T.Q8_0 if self.base == T.Q8_0 else T.Q6_K

    def _values(self) -> T:
        name, facts, i = self.name, self.facts, self.i_values
        chosen, many_share = self.base, facts.heads_per_kv >= 4
        if name == "Q2_K":
            chosen = T.Q4_K if many_share else T.Q3_K
        elif name == "Q2_K_S" and many_share:
            chosen = T.Q4_K
        elif name == "Q3_K_M":
            chosen = T.Q5_K if i < 2 else T.Q4_K
        elif name == "Q3_K_L" or (name in ("IQ4_NL", "IQ4_XS") and many_share):
            chosen = T.Q5_K
        elif name == "IQ3_M" or (name in ("IQ3_XXS", "IQ3_XS", "IQ3_S") and many_share):
            chosen = T.Q4_K
        elif name == "IQ3_XXS" and not facts.has_importance:
            chosen = T.IQ3_S
        elif name in ("Q4_K_M", "Q5_K_M") and _wants_more(i, self.n_values):
            chosen = T.Q6_K
        elif name == "Q4_K_S" and i < 4:
            chosen = T.Q5_K
        if facts.is_70b and chosen in (T.Q3_K, T.Q4_K):
            chosen = T.Q5_K
        if facts.n_experts == 8:
            chosen = T.Q8_0
        self.i_values += 1
        return chosen

    def _down(self, tensor: str) -> T:
        name, n = self.name, self.facts.n_layers
        falcon = self.facts.architecture == "falcon"
        i = self._layer(tensor, self.i_down)
        self.i_down += 1
        early = i < n // 8
        if name == "Q2_K":
            return T.Q3_K
        if name == "Q2_K_S" and early:
            return T.Q4_K
        if name == "Q3_K_M":
            if i < n // 16:
                return T.Q5_K
            return T.Q4_K if not falcon or _wants_more(i, n) else T.Q3_K
        if name == "Q3_K_L":
            return T.Q4_K if falcon else T.Q5_K
        if name == "IQ3_XXS" and not self.facts.has_importance:
            return T.Q4_K if early else T.Q3_K
        if name == "IQ3_M" and (early or (self.facts.n_experts == 8 and _wants_more(i, n))):
            return T.Q4_K
        if name == "Q4_K_M":
            if falcon:
                return T.Q6_K if i < n // 16 else T.Q5_K if _wants_more(i, n) else T.Q4_K
            return T.Q6_K if _wants_more(i, n) else self.base
        if name in ("IQ4_NL", "IQ4_XS") and early and not self.facts.has_importance:
            return T.Q5_K
        if name == "Q5_K_M" and _wants_more(i, n):
            return T.Q6_K
        if name == "Q4_K_S" and early and not falcon:
            return T.Q5_K
        if name in ("Q4_0", "Q5_0") and early and self.facts.has_importance:
            return T.Q4_1 if name == "Q4_0" else T.Q5_1
        return self.base

    def _attention_output(self) -> T:
        name = self.name
        if self.facts.architecture == "falcon":
            return T.Q4_K if name == "Q3_K_L" else self.base
        if self.facts.n_experts == 8:
            more = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL",
                    "IQ4_XS")  # fmt: skip
            return T.Q5_K if name in more else self.base
        finer = {"Q2_K": T.Q3_K, "Q3_K_M": T.Q4_K, "Q3_K_L": T.Q5_K, "IQ3_XXS": T.IQ3_S, "IQ3_M": T.Q4_K}
        return finer.get(name, self.base)

    def _wide(self, tensor: str, kind: str) -> T:
        """Gates and up projections."""
        n, i = self.facts.n_layers, self._layer(tensor, self.i_wide[kind])
        self.i_wide[kind] += 1
        return T.IQ3_XXS if self.name == "IQ3_XS" and n // 8 <= i < 7 * n // 8 else self.base

    def _layer(self, tensor: str, count: int) -> int:
        """The layer, as the number of such tensors before; those of experts do not come in order everywhere."""
        return layer_of(tensor) if self.facts.n_experts > 1 else count


def _wants_more(i: int, n: int) -> bool:
    """The first eighth of the layers, the last, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def block_size(type: T) -> int:
    from qrun.formats.blocks import BLOCK_SIZES

    return BLOCK_SIZES[type][0]


def fitting_type(type: T, row: int) -> T:
    """`type`, or where rows are not whole blocks of it, the next that fits."""
    if row % block_size(type) == 0:
        return type
    fallback = FALLBACKS.get(type, type)
    return fallback if row % block_size(fallback) == 0 else T.F16
