"""The tensors of a GGUF file, each made of rows of a checkpoint's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qrun.formats import FormatError, TensorType
from qrun.formats.blocks import BLOCK_SIZES
from qrun.formats.blocks.floats import Floats
from qrun.formats.blocks.layout import F32Array, U8Array
from qrun.formats.blocks.q8_0 import round_to_nearest
from qrun.formats.checkpoints import ScaledTensor, UnreadTensor
from qrun.formats.gguf.cursor import quote
from qrun.formats.tensors import SourceTensor
from qrun.models.huggingface.changes import beside
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.layout import (
    Architecture,
    Beside,
    Choice,
    Experts,
    Indices,
    Joined,
    Made,
    Mapped,
    Part,
    Product,
    Sizes,
    Stacked,
)
from qrun.models.hyperparameters import MAX_EXPERTS, MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS

# Stored in full: few, and much depends on them. (Everything of one dimension is too.)
ALWAYS_F32 = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "position_embd.weight", "token_types.weight",
    "ssm_conv1d.weight", "ssm_conv1d_q.weight", "ssm_conv1d_k.weight", "ssm_conv1d_v.weight", "shortconv.conv.weight",
    "altup_correct_coef.weight", "altup_predict_coef.weight", "indexer.proj.weight",
    "time_mix_lerp_fused.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_first.weight",
    "time_mix_decay_w1.weight", "time_mix_decay_w2.weight",
)  # fmt: skip
NORMS = "_norm.weight"  # of which the first of these is all that some models have so
INDEX_TYPES = ("I32", "I64")
# By which other models hold a language model.
PREFIXES = (
    "model.", "language_model.", "text_model.", "thinker.", "transformer.", "gpt_neox.", "backbone.", "lfm.", "ernie.",
    "llm.",
)  # fmt: skip
# Parts of a model that sees, hears or speaks, which are left behind.
OTHER_PARTS = re.compile(
    r"(.*\.)?(visual|vit|vpm|siglip2|conformer|merger|resampler|sound_encoder|sound_projection|speech_embeddings|talker"
    r"|token2wav|code2wav|connector|mlp1|aligner|vision_\w+|audio_\w+|embed_vision|embed_audio|\w*projector\w*"
    r"|patch_embed\w*|patch_merge\w*|pre_mm_projector_norm|mm_\w+|vision|audio)\..*|(.*\.)?(image_newline|view_seperator)"
)
# Constants that some files hold and that follow from config.json: frequencies, masks, positions, a factor.
DERIVED = re.compile(
    r"(.*\.)?(rotary_emb(_local)?\.\w+|attention\.(masked_)?bias|position_ids|embed_tokens\.embed_scale)"
)
# Of a quantised cache of keys and values.
CACHE_SCALES = re.compile(r".*\.(kv|k|v)_(scale|zero_point)")
# What the configuration that a language model's lies in says of its embedding: it holds where there is no head.
TIED_OUTSIDE = "tie_word_embeddings outside"
COMPARE_WEIGHTS = 1 << 20  # that are compared at a time


Number = TypeVar("Number", bound=np.generic)

EMBEDDING = Mapped("embed_tokens.weight", "token_embd.weight", ("vocab", "embd"))
HEAD = Mapped("lm_head.weight", "output.weight", ("vocab", "embd"))


@dataclass(frozen=True)
class Segment:
    """Rows start to end of a tensor."""

    tensor: SourceTensor
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class MappedTensor(SourceTensor):
    """Rows of one tensor, or of several one after another.

    heads: if not 0, rope turns rows i and i + n/2 of each head of n rows as a pair, and they are to lie side by side:
    row 2i + s comes from row s * n/2 + i. shift: added to every weight.
    """

    segments: tuple[Segment, ...]
    heads: int = 0
    shift: float = 0.0

    def rows(self, start: int, end: int) -> F32Array:
        if len(self.shape) == 1:  # one row, of which the columns are what rows are elsewhere
            rows = self._permuted(0, self.row, self._column) if self.heads else self._column(0, self.row)
            rows = rows.reshape(1, -1)
        else:
            rows = self._permuted(start, end, self._stored) if self.heads else self._stored(start, end)
        return rows + np.float32(self.shift) if self.shift else rows

    def floats(self, start: int, end: int) -> Floats:
        pieces = list(self._pieces(start, end))
        if len(self.shape) == 1 or self.heads or self.shift or len(pieces) != 1:
            return self.rows(start, end)
        tensor, first, last = pieces[0]
        return tensor.floats(first, last)

    @property
    def tensor_scales(self) -> F32Array:
        """What the weights of each segment are to be multiplied by, where they are not decoded: see SourceTensor."""
        return np.array([segment.tensor.tensor_scale for segment in self.segments], np.float32)

    def raw(self, start: int, end: int) -> U8Array:
        if self.shift or any(segment.tensor.type != self.type for segment in self.segments):
            return super().raw(start, end)
        if len(self.shape) == 1:
            return super().raw(start, end) if self.heads else self._stored_bytes(start, end).reshape(-1)
        stored = self._permuted(start, end, self._stored_bytes) if self.heads else self._stored_bytes(start, end)
        return stored.reshape(-1)

    def forget(self) -> None:
        for segment in self.segments:
            segment.tensor.forget()

    def error(self, reason: str) -> FormatError:
        return self.segments[0].tensor.error(reason)

    def _stored(self, start: int, end: int) -> F32Array:
        parts = []
        for tensor, first, last in self._pieces(start, end):
            rows = tensor.rows(first, last)
            alone = tensor.type != self.type and tensor.tensor_scale != 1
            parts.append(rows * tensor.tensor_scale if alone else rows)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _stored_bytes(self, start: int, end: int) -> U8Array:
        """[rows, bytes of a row]"""
        parts = [tensor.raw(first, last) for tensor, first, last in self._pieces(start, end)]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(end - start, -1)

    def _pieces(self, start: int, end: int) -> Iterator[tuple[SourceTensor, int, int]]:
        """Where rows start to end lie: tensors, and which rows of each."""
        begin = 0
        for segment in self.segments:
            first, last = max(start - begin, 0), min(end - begin, segment.end - segment.start)
            if first < last:
                yield segment.tensor, segment.start + first, segment.start + last
            begin += segment.end - segment.start

    def _column(self, start: int, end: int) -> F32Array:
        return self._stored(0, 1).reshape(-1, 1)[start:end]

    def _permuted(self, start: int, end: int, stored: Callable[[int, int], NDArray[Number]]) -> NDArray[Number]:
        size = (self.row if len(self.shape) == 1 else self.n_rows) // self.heads
        parts = []
        for head in range(start // size, -(-end // size)):
            base = head * size
            low, high = max(start - base, 0), min(end - base, size)
            first, last = low // 2, -(-high // 2)
            halves = [stored(base + half + first, base + half + last) for half in (0, size // 2)]
            pairs = np.stack(halves, axis=1).reshape(2 * (last - first), -1)
            parts.append(pairs[low - 2 * first : high - 2 * first])
        return np.concatenate(parts)


@dataclass(frozen=True, eq=False)
class ConstantTensor(SourceTensor):
    """Numbers that follow from config.json."""

    values: F32Array
    config: Config

    @classmethod
    def of(cls, name: str, values: F32Array, config: Config) -> ConstantTensor:
        return cls(name, TensorType.F32, values.shape, values.astype(np.float32), config)

    def rows(self, start: int, end: int) -> F32Array:
        return self.values.reshape(-1, self.row)[start:end]

    def error(self, reason: str) -> FormatError:
        return self.config.error(self.name, reason)


@dataclass(frozen=True, eq=False)
class IndexTensor(SourceTensor):
    """Whole numbers, which are no weights."""

    base: UnreadTensor

    def rows(self, start: int, end: int) -> F32Array:
        return self._numbers(start, end).astype(np.float32)

    def raw(self, start: int, end: int) -> U8Array:
        return np.ascontiguousarray(self._numbers(start, end), "<i4").reshape(-1).view(np.uint8)

    def _numbers(self, start: int, end: int) -> NDArray[np.integer[Any]]:
        return self.base.stored.array().reshape(-1, self.row)[start:end]

    def forget(self) -> None:
        self.base.forget()

    def error(self, reason: str) -> FormatError:
        return self.base.error(reason)


@dataclass(frozen=True, eq=False)
class EightBitTensor(MappedTensor):
    """Floats of 8 bits as Q8_0."""

    def raw(self, start: int, end: int) -> U8Array:
        return round_to_nearest(self.rows(start, end).reshape(-1, 32)).reshape(-1)


def keep_scaled(tensors: dict[str, SourceTensor]) -> None:
    """Matrices of 8-bit floats become Q8_0; those of which a row is not whole blocks, F16."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, MappedTensor) or tensor.type == TensorType.F32:
            continue
        if all(isinstance(segment.tensor, ScaledTensor) for segment in tensor.segments):
            fits = tensor.row % BLOCK_SIZES[TensorType.Q8_0][0] == 0
            type, kind = (TensorType.Q8_0, EightBitTensor) if fits else (TensorType.F16, MappedTensor)
            tensors[name] = kind(name, type, tensor.shape, tensor.segments, tensor.heads, tensor.shift)


def dimensions(config: Config, architecture: Architecture) -> Sizes:
    """The sizes that shapes are made of, by the names of architectures.py, and the counts of layers and heads."""
    embd = config.integer("hidden_size")
    heads = config.integer("num_attention_heads", high=MAX_HEADS)
    # Where layers differ, those of the widest; an entry that knows of that says which.
    kv_heads = max(config.integers("num_key_value_heads", high=MAX_HEADS, default=heads))
    head = config.integer("head_dim", embd // heads or None, high=MAX_HEAD_DIM)
    # Where layers differ, that of the widest.
    ff = max(config.integers("intermediate_size")) if architecture.ffn or config.get("intermediate_size") else 0
    has_experts = architecture.has_experts
    if any(part.heads for part in architecture.parts() if isinstance(part, Mapped)) and head % 2:
        raise config.error("head_dim", f"is {head}, expected an even number")
    sizes = Sizes(config, {
        "layers": config.integer("num_hidden_layers", high=MAX_LAYERS),
        "vocab": config.integer("vocab_size", high=1 << 24),
        "embd": embd, "heads": heads, "kv_heads": kv_heads, "head": head, "q": heads * head, "kv": kv_heads * head,
        "qkv": (heads + 2 * kv_heads) * head, "ff": ff, "twice_ff": 2 * ff,
        "experts": _n_experts(config) if has_experts else 0,
        "expert_ff": uniform(config, "moe_intermediate_size", ff) if has_experts else 0,
        "twice_embd": 2 * embd, "drafts": 0,
    })  # fmt: skip
    if architecture.sizes:
        sizes.update(architecture.sizes(config, sizes))
    sizes["twice_expert_ff"] = 2 * sizes["expert_ff"]
    return sizes


def _n_experts(config: Config) -> int:
    keys = ("num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts")
    key = next((key for key in keys if config.get(key) is not None), keys[1])
    return config.integer(key, high=MAX_EXPERTS)


def uniform(config: Config, key: str, default: int | None = None) -> int:
    """A whole number, or a list with the same for each layer."""
    given = config.get(key)
    if isinstance(given, list) and given and all(value == given[0] for value in given):
        return Config(config.path, {key: given[0]}).integer(key)
    return config.integer(key, default)


def count_drafts(names: Iterable[str], architecture: Architecture, sizes: Sizes, config: Config) -> int:
    """How many layers that predict tokens further ahead the checkpoint has, of those that config.json tells of."""
    if not architecture.extra_layers:
        return 0
    told = config.integer(architecture.extra_layers, 1, low=0, high=MAX_LAYERS)
    layers = {_layer_number(_renamed(short_name(name), architecture, sizes), architecture) for name in names}
    return min(told, sum(layer >= sizes["layers"] for layer in layers))


def map_tensors(
    weights: Mapping[str, SourceTensor],
    architecture: Architecture,
    sizes: Sizes,
    config: Config,
    notice: Callable[[str], None] = lambda text: None,
) -> dict[str, SourceTensor]:
    """Every tensor of the GGUF file, by its name there.

    weights: of the checkpoint. notice: called with a line about what of it is not used, or is not as config.json says.
    Raises FormatError where a tensor is missing, has the wrong shape, or is not known.
    """
    mapper = _Mapper(_text_part(weights, architecture, sizes, notice), architecture, sizes, config)
    tied = mapper.add_embedding(notice)
    for layer in range(sizes["layers"] + sizes["drafts"] if architecture.layer else 0):
        extra = architecture.draft if layer >= sizes["layers"] else ()
        for part in (*architecture.layer, *extra):
            mapper.add(part, f"{architecture.layers}.{layer}.", f"blk.{layer}.")
    for stack in architecture.stacks:
        for layer in range(sizes[stack.count]):
            for part in (*stack.layer, *(stack.first if layer == 0 else ())):
                mapper.add(part, f"{stack.hf}.{layer}.", f"{stack.gguf}.{layer}.")
    for part in architecture.outer:
        mapper.add(part)
    if not tied and not architecture.embeds:
        mapper.add(mapper.head)
    elif architecture.own_head:
        there = next(part for part in (mapper.embedding, mapper.head) if part.hf in mapper.weights)
        mapper.add(replace(there, gguf=mapper.head.gguf))
    mapper.check_rest()
    return mapper.tensors


def scale_tensors(tensors: Mapping[str, SourceTensor], config: Config) -> dict[str, SourceTensor]:
    """What products with tensors are to be multiplied by, where those are kept in a type without a place for it."""
    scales: dict[str, SourceTensor] = {}
    for tensor in tensors.values():
        if isinstance(tensor, MappedTensor) and tensor.type == TensorType.NVFP4:
            factors = tensor.tensor_scales
            if not np.allclose(factors, 1, rtol=0 if len(factors) == 1 else 1e-5, atol=1e-6):
                name = f"{tensor.name.removesuffix('.weight')}.scale"
                scales[name] = ConstantTensor.of(name, factors, config)
    return scales


def whole_tensor(name: str, tensor: SourceTensor) -> SourceTensor:
    """A tensor under the name that it has in the file."""
    type = TensorType.F32 if len(tensor.shape) == 1 else tensor.type
    return MappedTensor(name, type, tensor.shape, (Segment(tensor, 0, tensor.n_rows),))


def layer_of(tensor: SourceTensor, sizes: Sizes) -> int:
    """The layer that a tensor belongs to; one behind the others where it is of those that predict further ahead."""
    match = re.search(r"(mtp\.)?layers\.(\d{1,4})\.", tensor.name)
    if match is None:
        raise tensor.error("is of no layer")
    return int(match[2]) + (sizes["layers"] if match[1] else 0)


def short_name(name: str) -> str:
    """A tensor's or a module's name without "model." and the like, by which models of other kinds hold this one."""
    while True:
        prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return name
        name = name.removeprefix(prefix)


def is_other_part(name: str) -> bool:
    """Is a tensor or a module one of what sees or hears?"""
    return OTHER_PARTS.fullmatch(f"{name}.") is not None or OTHER_PARTS.fullmatch(name) is not None


def _renamed(name: str, architecture: Architecture, sizes: Sizes) -> str:
    return architecture.rename(name, sizes) if architecture.rename else name


def _text_part(
    weights: Mapping[str, SourceTensor],
    architecture: Architecture,
    sizes: Sizes,
    notice: Callable[[str], None],
) -> dict[str, SourceTensor]:
    """The tensors of the language model, by names without "model." and the like."""
    text: dict[str, SourceTensor] = {}
    cache_scales: list[SourceTensor] = []
    others: list[SourceTensor] = []
    for name, tensor in weights.items():
        if is_other_part(name) or not name.startswith(architecture.within):
            others.append(tensor)
            continue
        short = _renamed(short_name(name), architecture, sizes)
        if not short or DERIVED.fullmatch(short) or _is_dropped(short, architecture, sizes):
            continue
        if CACHE_SCALES.fullmatch(short):
            cache_scales.append(tensor)
            continue
        if short in text:
            raise tensor.error(f"and {quote(text[short].name)} are the same tensor")
        text[short] = tensor
    for alias in architecture.embedding_aliases:
        if (same := text.pop(f"{alias}.weight", None)) is not None:
            text.setdefault(f"{architecture.embedding}.weight", same)
    if cache_scales:
        first = cache_scales[0].error("and its like are scales of a quantised cache, which are not used here")
        notice(str(first))
    if others:
        notice(str(others[0].error(f"and its like ({len(others)}) see or hear: they are left out")))
    return text


def _is_dropped(name: str, architecture: Architecture, sizes: Sizes) -> bool:
    """Is it of a layer that predicts tokens further ahead, and that files of this architecture do not have?"""
    return architecture.dropped_layers and _layer_number(name, architecture) >= sizes["layers"]


def _layer_number(name: str, architecture: Architecture) -> int:
    """Of the layer that a tensor belongs to; -1 for none."""
    match = re.match(rf"{architecture.layers}\.(\d{{1,9}})\.", name)
    return int(match[1]) if match else -1


def _equal(a: SourceTensor, b: SourceTensor) -> bool:
    """Are these the same numbers?"""
    if a.shape != b.shape or isinstance(a, UnreadTensor) or isinstance(b, UnreadTensor):
        return False
    step = max(1, COMPARE_WEIGHTS // max(a.row, 1))
    try:
        for start in range(0, a.n_rows, step):
            end = min(start + step, a.n_rows)
            if a.type == b.type and np.array_equal(a.raw(start, end), b.raw(start, end)):  # sooner than decoded
                continue
            if not np.array_equal(a.rows(start, end), b.rows(start, end)):
                return False
        return True
    finally:
        a.forget()
        b.forget()


def _of_one_shape(tensors: Sequence[SourceTensor | None]) -> list[Segment]:
    """Tensors that become one, whatever shape that is."""
    found = [tensor for tensor in tensors if tensor is not None]
    for tensor in found[1:]:
        if tensor.shape != found[0].shape:
            raise tensor.error(f"has shape {tensor.shape}, and {quote(found[0].name)} has {found[0].shape}")
    return [Segment(tensor, 0, tensor.n_rows) for tensor in found]


class _Mapper:
    def __init__(
        self, weights: dict[str, SourceTensor], architecture: Architecture, sizes: Sizes, config: Config
    ) -> None:
        self.weights = weights
        self.architecture = architecture
        self.sizes = sizes
        self.config = config
        self.tensors: dict[str, SourceTensor] = {}
        self._taken: set[str] = set()

    @property
    def embedding(self) -> Mapped:
        architecture = self.architecture
        return replace(EMBEDDING, hf=f"{architecture.embedding}.weight", change=architecture.embedding_change)

    @property
    def head(self) -> Mapped:
        return replace(HEAD, hf=f"{self.architecture.head}.weight", change=self.architecture.head_change)

    def add(self, part: Part, hf_prefix: str = "", gguf_prefix: str = "") -> None:
        match part:
            case Choice():
                there = (parts for parts in part.alternatives if self._has(parts[0], hf_prefix))
                for inner in next(there, () if part.optional else part.alternatives[0]):
                    self.add(inner, hf_prefix, gguf_prefix)
            case Experts():
                segments = self._expert_segments(part, hf_prefix)
                shape = (self.sizes[part.count], *self._shape(part.shape, segments[0].tensor))
                self._put(gguf_prefix + part.gguf, shape, segments)
            case Stacked():
                pieces = _of_one_shape([self._take(hf_prefix + name, part.shape) for name in part.hf])
                self._put(gguf_prefix + part.gguf, (len(part.hf), *pieces[0].tensor.shape), pieces)
            case Joined():
                tensors = [self._take(hf_prefix + part.hf.format(i), part.shape) for i in range(self.sizes[part.count])]
                pieces = [Segment(tensor, 0, tensor.n_rows) for tensor in tensors if tensor is not None]
                widths = {piece.tensor.row for piece in pieces}
                if len(widths) != 1:
                    raise pieces[0].tensor.error(f"and its like have rows of {sorted(widths)} numbers, not of as many")
                self._put(gguf_prefix + part.gguf, (sum(piece.end for piece in pieces), *widths), pieces)
            case Beside():
                left, right = (self._take(hf_prefix + name, part.shape) for name in part.hf)
                assert left is not None and right is not None
                both = beside(left, right)
                self._put(gguf_prefix + part.gguf, both.shape, [Segment(both, 0, both.n_rows)])
            case Product():
                name = gguf_prefix + part.gguf
                product = np.prod([self._row(hf_prefix + hf, self.sizes[part.width]) for hf in part.hf], axis=0)
                self.tensors[name] = ConstantTensor.of(name, product, self.config)
            case Made():
                values = np.asarray(part.values(self.config, self.sizes), np.float32)
                name = gguf_prefix + part.gguf
                self.tensors[name] = ConstantTensor.of(name, values, self.config)
            case Indices():
                self._add_indices(part, hf_prefix + part.hf, gguf_prefix + part.gguf)
            case Mapped():
                self._add_mapped(part, hf_prefix + part.hf, gguf_prefix + part.gguf)

    def _has(self, part: Part, prefix: str) -> bool:
        match part:
            case Choice():
                return any(self._has(parts[0], prefix) for parts in part.alternatives)
            case Experts():
                return prefix + part.hf.format(0) in self.weights or (
                    part.joined is not None and prefix + part.joined[0] in self.weights
                )
            case Mapped() | Indices():
                return prefix + part.hf in self.weights
            case Joined():
                return prefix + part.hf.format(0) in self.weights
            case Stacked() | Product() | Beside():
                return prefix + part.hf[0] in self.weights
        return True

    def _add_mapped(self, part: Mapped, hf: str, gguf: str) -> None:
        tensor = self._take(hf, part.shape, part.optional)
        if tensor is None:
            return
        heads = self.sizes[part.heads] if part.heads else 0
        if heads and tensor.shape[0] % (2 * heads):
            raise tensor.error(f"has {tensor.shape[0]} rows, which are not those of {heads} heads")
        shift = self.architecture.norm_shift if part.hf.endswith("norm.weight") else 0.0
        if part.change is not None:
            tensor, shift = part.change(tensor, self.sizes), 0.0
        self._put(gguf, tensor.shape, [Segment(tensor, 0, tensor.n_rows)], heads, shift)

    def _add_indices(self, part: Indices, hf: str, gguf: str) -> None:
        tensor = self._take(hf, part.shape, indices=True)
        if not isinstance(tensor, UnreadTensor) or tensor.stored.dtype not in INDEX_TYPES:
            assert tensor is not None
            raise tensor.error(f"is not of one of the types {', '.join(INDEX_TYPES)}")
        self.tensors[gguf] = IndexTensor(gguf, TensorType.I32, tensor.shape, tensor)

    def add_embedding(self, notice: Callable[[str], None]) -> bool:
        """The embedding. Returns whether it is the head too: if config.json says so, and the weights do not differ.

        One matrix for both may go by either name, or be there twice.
        """
        embedding, head = self.weights.get(self.embedding.hf), self.weights.get(self.head.hf)
        unsaid = self.config.get("tie_word_embeddings") is None
        outside = self.config.get(TIED_OUTSIDE) is True
        tied = self.config.flag("tie_word_embeddings") or (head is None and (unsaid or outside))
        if tied and head is not None:
            if embedding is None:
                self.add(replace(EMBEDDING, hf=self.head.hf))
                return True
            if _equal(embedding, head):
                self._taken.add(self.head.hf)
            else:
                text = "differs from the embedding, though tie_word_embeddings says that it is the same: it is kept"
                notice(str(head.error(text)))
                tied = False
        self.add(self.embedding)
        return tied

    def check_rest(self) -> None:
        """Nothing may be left over: it would be missing from the result."""
        rest = next((tensor for name, tensor in self.weights.items() if name not in self._taken), None)
        if rest is not None:
            self._check_read()
            raise rest.error(f"is not known in models of the architecture {self.architecture.name}")

    def _check_read(self) -> None:
        """Raises FormatError for a tensor that could not be read: that says more than that another one is missing."""
        for tensor in self.weights.values():
            if isinstance(tensor, UnreadTensor):
                raise tensor.unread()

    def _put(
        self, name: str, shape: tuple[int, ...], segments: list[Segment], heads: int = 0, shift: float = 0.0
    ) -> None:
        types = {segment.tensor.type for segment in segments}
        always = ALWAYS_F32 if self.architecture.routers_in_full else NORMS
        in_full = len(shape) == 1 or name.endswith(always) or not name.endswith(".weight") or len(types) > 1
        type = TensorType.F32 if in_full else types.pop()
        self.tensors[name] = MappedTensor(name, type, shape, tuple(segments), heads, shift)

    def _take(
        self, name: str, shape: tuple[str, ...], optional: bool = False, *, indices: bool = False
    ) -> SourceTensor | None:
        tensor = self.weights.get(name)
        if tensor is None:
            if optional:
                return None
            self._check_read()
            full = name if name.startswith("lm_head.") else f"model.{name}"
            raise FormatError(self.config.path.parent, f"tensor {quote(full)} is missing")
        if isinstance(tensor, UnreadTensor) and not indices:
            raise tensor.unread()
        expected = self._shape(shape, tensor)
        if tensor.shape != expected:
            raise tensor.error(f"has shape {tensor.shape}, expected {expected}")
        self._taken.add(name)
        return tensor

    def _row(self, name: str, width: int) -> F32Array:
        """The numbers of a small tensor, whatever its shape."""
        tensor = self.weights.get(name)
        shape = tuple(map(str, tensor.shape)) if tensor is not None and prod(tensor.shape) == width else (str(width),)
        tensor = self._take(name, shape)
        assert tensor is not None
        return tensor.rows(0, tensor.n_rows).reshape(width)

    def _expert_segments(self, part: Experts, prefix: str) -> list[Segment]:
        n_experts = self.sizes[part.count]
        if part.joined and prefix + part.joined[0] in self.weights:
            joined, no, parts = part.joined
            tensor = self._take(prefix + joined, (part.count, "*", *part.shape[1:]))
            assert tensor is not None
            out = tensor.shape[1] // parts
            if (expected := self._shape(part.shape, tensor))[0] != out or tensor.shape[1] % parts:
                full = (n_experts, parts * expected[0], *expected[1:])
                raise tensor.error(f"has shape {tensor.shape}, expected {full}")
            starts = [(expert * parts + no) * out for expert in range(n_experts)]
            return [Segment(tensor, start, start + out) for start in starts]
        tensors = [self._take(prefix + part.hf.format(expert), part.shape) for expert in range(n_experts)]
        return _of_one_shape(tensors)

    def _shape(self, names: tuple[str, ...], tensor: SourceTensor) -> tuple[int, ...]:
        """What the names stand for. Where they say "*", it is as the tensor has it."""
        given = tensor.shape[-len(names) :] if len(tensor.shape) >= len(names) else (1,) * len(names)
        return tuple(
            size if name == "*" else int(name) if name.isdecimal() else self.sizes[name]
            for name, size in zip(names, given, strict=True)
        )
