"""The words in which a family of models says what its checkpoints look like: see families/.

An entry lists the tensors of a layer by their names on both sides, with shapes in names of dimensions (`dimensions` in
tensors.py, and what the entry adds), and the keys of config.json that become metadata. "*" is a dimension of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qrun.formats.tensors import SourceTensor
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import Facts

Heads = Literal["", "heads", "kv_heads"]
Windows = Literal["", "all", "all if used", "later layers", "layers without positions", "gemma"]
"""Which layers see a window only, where config.json gives one: all; all or those from `max_window_layers` on, if
`use_sliding_window` says so; as each Gemma has it. What `layer_types` says of single layers goes before that."""


class Sizes(dict[str, int]):
    """The dimensions of a model by their names, and what its config.json says besides."""

    def __init__(self, config: Config, values: Mapping[str, int]) -> None:
        super().__init__(values)
        self.config = config


Change = Callable[[SourceTensor, Sizes], SourceTensor]
"""What becomes of a tensor of the checkpoint: see changes.py."""

SILU = frozenset({"silu", "swish"})
GELU = frozenset({"gelu", "gelu_pytorch_tanh"})  # a config that says "gelu" is an old one of Gemma: it means the other
ANY_GELU = frozenset({"gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast"})
RELU2 = frozenset({"relu2"})


@dataclass(frozen=True)
class Mapped:
    """A tensor. hf, gguf: its names, without what every tensor of the layer begins with.

    shape: that it has in the checkpoint. heads: the number of heads, of each of which the rows change places. change:
    what else becomes of it.
    """

    hf: str
    gguf: str
    shape: tuple[str, ...]
    optional: bool = False
    heads: Heads = ""
    change: Change | None = None


@dataclass(frozen=True)
class Experts:
    """One tensor of each expert, stacked into one. hf: the name, with {} for the expert's number.

    joined: the tensor that holds these of all experts in some files, and the part of its rows that is meant: (name,
    number of the part, number of parts). count: the dimension that says how many there are. heads: as in Mapped.
    """

    hf: str
    gguf: str
    shape: tuple[str, ...]
    joined: tuple[str, int, int] | None = None
    count: str = "experts"


@dataclass(frozen=True)
class Stacked:
    """Several tensors of one shape, as one: [how many there are, *shape]."""

    hf: tuple[str, ...]
    gguf: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Product:
    """Two small tensors as one, number by number: they count as a product only. hf: their names."""

    hf: tuple[str, str]
    gguf: str
    width: str


@dataclass(frozen=True)
class Choice:
    """Some layers have the tensors of one alternative, others those of another one: the first whose first is there.

    optional: or of none.
    """

    alternatives: tuple[tuple[Part, ...], ...]
    optional: bool = False


@dataclass(frozen=True)
class Made:
    """A tensor that follows from config.json. values: the numbers, from it and the sizes."""

    gguf: str
    values: Callable[[Config, Sizes], Any]


@dataclass(frozen=True)
class Indices:
    """A table of whole numbers, as I32."""

    hf: str
    gguf: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Joined:
    """Rows of several tensors one after another, as one. hf: the name, with {} for a number. count: as in Experts."""

    hf: str
    gguf: str
    shape: tuple[str, ...]
    count: str


@dataclass(frozen=True)
class Beside:
    """Columns of two matrices beside each other, as one."""

    hf: tuple[str, str]
    gguf: str
    shape: tuple[str, ...]


Part = Mapped | Experts | Stacked | Product | Choice | Made | Indices | Joined | Beside


@dataclass(frozen=True)
class Stack:
    """Layers beside those of `Architecture.layer`, of models with two halves. hf, gguf: what their names begin with
    before a layer's number. count: the dimension that says how many there are. first: what the first of them has in
    any case, beside what all have."""

    hf: str
    gguf: str
    layer: tuple[Part, ...]
    count: str
    first: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Key:
    """gguf: the key of a GGUF file, without the architecture's name; hf: that of config.json, or several, of which the
    first that is there counts. One that is not there is left out."""

    gguf: str
    hf: str
    kind: Literal["count", "real", "flag"] = "count"


@dataclass(frozen=True)
class Architecture:
    """One class of Transformers. name: as GGUF has it.

    layer, outer: the tensors of a layer, and of none. norm_shift: what is to be added to the weights of norms.
    defaults: of config.json, where they differ from DEFAULTS. windows: which layers see a window only, see Windows.
    layers, embedding, head: what tensors are called beside those of a layer. keys, entries: further metadata. sizes:
    further dimensions. rotated: whether metadata say how much of a head rope turns, and whether that may be a part.
    rename: of names of tensors without "model." and the like; "" leaves one out. extra_layers: the key of config.json
    for how many layers follow that predict tokens further ahead, and draft: their tensors beside those of a layer.
    dropped_layers: such layers are left out. of_weights: metadata that the tensors say, and sizes_of_weights:
    dimensions that only they do.
    """

    name: str
    layer: tuple[Part, ...]
    activations: frozenset[str] = SILU
    norm_shift: float = 0.0
    defaults: Mapping[str, Any] = field(default_factory=dict)
    windows: Windows = ""
    period: int = 0
    """Layers of which the last sees everything and the others a window: what engines take, as files do not say it."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """What models of this architecture always have: another value in config.json is refused."""
    outer: tuple[Part, ...] = (Mapped("norm.weight", "output_norm.weight", ("embd",)),)
    layers: str = "layers"
    embedding: str = "embed_tokens"
    embedding_aliases: tuple[str, ...] = ()
    """Other names under which files have the same matrix, or have it alone."""
    stacks: tuple[Stack, ...] = ()
    head: str = "lm_head"
    embedding_change: Change | None = None
    head_change: Change | None = None
    keys: tuple[Key, ...] = ()
    entries: Callable[[Facts], None] | None = None
    sizes: Callable[[Config, Sizes], Mapping[str, int]] | None = None
    rotated: Literal["", "all", "part"] = ""
    within: str = ""
    """What the names of the language model's tensors begin with, where others end as these do."""
    rename: Callable[[str, Sizes], str] | None = None
    extra_layers: str = ""
    draft: tuple[Part, ...] = ()
    dropped_layers: bool = False
    of_weights: Callable[[Facts, Mapping[str, SourceTensor]], None] | None = None
    sizes_of_weights: Callable[[Mapping[str, SourceTensor]], Mapping[str, int]] | None = None
    embeds: bool = False
    """Whether embeddings are all that models make: they have no head."""
    own_head: bool = False
    """Whether engines want the head as a tensor of its own, also where it is the embedding."""
    ffn: bool = True
    """Whether a model has a width of feed-forward layers."""
    routers_in_full: bool = True
    """Whether matrices on which much depends are F32, whatever the checkpoint has."""
    eight_bits_kept: bool = False
    """Whether matrices of 8-bit floats become Q8_0 where those of 4-bit ones are kept, and not BF16."""
    settings: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    """What config.json says, in the usual words, where a family has others."""
    variant: Callable[[Config], Architecture | None] | None = None
    """What a configuration is instead, if it is one of another kind."""

    def parts(self) -> Iterator[Mapped | Experts]:
        """All tensors that a layer may have."""
        yield from flat(self.layer)

    @property
    def has_experts(self) -> bool:
        return any(isinstance(part, Experts) and part.count == "experts" for part in self.parts())


def flat(parts: tuple[Part, ...]) -> Iterator[Mapped | Experts]:
    """All tensors of these, those of all alternatives too."""
    for part in parts:
        if isinstance(part, Choice):
            for alternative in part.alternatives:
                yield from flat(alternative)
        elif isinstance(part, Mapped | Experts):
            yield part


# Shorthands.


def tensor(hf: str, gguf: str, shape: str, change: Change | None = None, *, optional: bool = False) -> Mapped:
    """shape: names of dimensions with spaces between them."""
    return Mapped(hf, gguf, tuple(shape.split()), optional, change=change)


def norm(hf: str, gguf: str, width: str = "embd") -> Mapped:
    return Mapped(f"{hf}.weight", f"{gguf}.weight", (width,))


def layer_norm(hf: str, gguf: str, width: str = "embd") -> tuple[Mapped, Mapped]:
    """With the bias that some models have."""
    return norm(hf, gguf, width), Mapped(f"{hf}.bias", f"{gguf}.bias", (width,), optional=True)


def linear(
    hf: str, gguf: str, out: str, width: str, heads: Heads = "", change: Change | None = None
) -> tuple[Mapped, Mapped]:
    """A matrix, and the bias that some models have."""
    return (
        Mapped(f"{hf}.weight", f"{gguf}.weight", (out, width), heads=heads, change=change),
        Mapped(f"{hf}.bias", f"{gguf}.bias", (out,), optional=True, heads=heads, change=change),
    )


def either(*alternatives: tuple[Part, ...]) -> Choice:
    return Choice(alternatives)


def maybe(*parts: Part) -> Choice:
    """All of them, or none."""
    return Choice((parts,), optional=True)


def optional(*parts: Mapped) -> tuple[Part, ...]:
    """Each of them, where it is there."""
    return tuple(maybe(part) for part in parts)


def attention(
    block: str = "self_attn", *, permuted: bool = False, out: str = "o_proj", bias_free: bool = False
) -> tuple[Mapped, ...]:
    """permuted: GGUF files of this architecture have the pairs that rope turns side by side."""
    parts = (
        *linear(f"{block}.q_proj", "attn_q", "q", "embd", "heads" if permuted else ""),
        *linear(f"{block}.k_proj", "attn_k", "kv", "embd", "kv_heads" if permuted else ""),
        *linear(f"{block}.v_proj", "attn_v", "kv", "embd"),
        *linear(f"{block}.{out}", "attn_output", "embd", "q"),
    )
    return tuple(part for part in parts if not (bias_free and part.optional))


def gated(block: str = "mlp", names: str = "gate_proj up_proj down_proj", end: str = "", width: str = "ff") -> tuple[
    Mapped, ...
]:
    """A feed-forward layer with a gate. end: "_shexp" for the expert that all tokens pass."""
    gate, up, down = names.split()
    return (
        *linear(f"{block}.{gate}", f"ffn_gate{end}", width, "embd"),
        *linear(f"{block}.{up}", f"ffn_up{end}", width, "embd"),
        *linear(f"{block}.{down}", f"ffn_down{end}", "embd", width),
    )


def plain(block: str = "mlp", names: str = "fc1 fc2") -> tuple[Mapped, ...]:
    """A feed-forward layer without a gate."""
    up, down = names.split()
    return *linear(f"{block}.{up}", "ffn_up", "ff", "embd"), *linear(f"{block}.{down}", "ffn_down", "embd", "ff")


def experts(
    block: str = "mlp", names: str = "gate_proj up_proj down_proj", gate: str = "gate", inner: str = "experts"
) -> tuple[Part, ...]:
    """A router and experts, each a tensor of its own or all in one."""
    first, second, third = names.split()
    both, one = f"{block}.{inner}.gate_up_proj", f"{block}.{inner}.down_proj"
    each = f"{block}.{inner}.{{}}"
    wide, narrow = ("expert_ff", "embd"), ("embd", "expert_ff")
    return (
        Mapped(f"{block}.{gate}.weight", "ffn_gate_inp.weight", ("experts", "embd")),
        Experts(f"{each}.{first}.weight", "ffn_gate_exps.weight", wide, (both, 0, 2)),
        Experts(f"{each}.{second}.weight", "ffn_up_exps.weight", wide, (both, 1, 2)),
        Experts(f"{each}.{third}.weight", "ffn_down_exps.weight", narrow, (one, 0, 1)),
    )


def hyper_connection(hf: str, gguf: str, change: Change | None = None) -> tuple[Mapped, ...]:
    """What mixes the streams around a layer's half, or before the head."""
    return tuple(
        tensor(f"{hf}_{kind}", f"{gguf}_{kind}.weight", shape, change)
        for kind, shape in (("fn", "* *"), ("base", "*"), ("scale", "*"))
    )


FEED_FORWARD = gated()
NORMS = (norm("input_layernorm", "attn_norm"), norm("post_attention_layernorm", "ffn_norm"))
FOUR_NORMS = (
    norm("input_layernorm", "attn_norm"),
    norm("post_attention_layernorm", "post_attention_norm"),
    norm("pre_feedforward_layernorm", "ffn_norm"),
    norm("post_feedforward_layernorm", "post_ffw_norm"),
)
QK_NORMS = (norm("self_attn.q_norm", "attn_q_norm", "head"), norm("self_attn.k_norm", "attn_k_norm", "head"))
LAYER_NORMS = (
    *layer_norm("input_layernorm", "attn_norm"),
    *layer_norm("post_attention_layernorm", "ffn_norm"),
)
OUTPUT_LAYER_NORM = layer_norm("norm", "output_norm")
HEAD_BIAS = maybe(Mapped("lm_head.bias", "output.bias", ("vocab",)))
DRAFT: tuple[Part, ...] = (
    tensor("eh_proj.weight", "nextn.eh_proj.weight", "embd *"),
    norm("enorm", "nextn.enorm"),
    norm("hnorm", "nextn.hnorm"),
    *optional(
        norm("shared_head.norm", "nextn.shared_head_norm"),
        tensor("shared_head.head.weight", "nextn.shared_head_head.weight", "vocab embd"),
        tensor("embed_tokens.weight", "nextn.embed_tokens.weight", "vocab embd"),
    ),
)
"""What a layer that predicts tokens further ahead has beside that of other layers."""


def counts(**keys: str) -> tuple[Key, ...]:
    """Whole numbers. The keys of GGUF with "__" for each dot."""
    return tuple(Key(gguf.replace("__", "."), hf) for gguf, hf in keys.items())


def reals(**keys: str) -> tuple[Key, ...]:
    return tuple(Key(gguf.replace("__", "."), hf, "real") for gguf, hf in keys.items())


def flags(**keys: str) -> tuple[Key, ...]:
    return tuple(Key(gguf.replace("__", "."), hf, "flag") for gguf, hf in keys.items())


LENGTHS_OF_EXPERTS = counts(
    expert_feed_forward_length="moe_intermediate_size",
    expert_shared_feed_forward_length="shared_expert_intermediate_size",
)
EXPERT_WEIGHTS = (
    *reals(expert_weights_scale="routed_scaling_factor"),
    *flags(expert_weights_norm="norm_topk_prob"),
)
VOCAB_SIZE = counts(vocab_size="vocab_size")
