"""LoRA adapters as Hugging Face's PEFT saves them, seen as GGUF adapters.

A folder holds adapter_config.json and adapter_model.safetensors, in which each matrix that was trained has

    base_model.model.<module>.lora_A.weight [rank, columns]    base_model.model.<module>.lora_B.weight [rows, rank]

and an embedding `.lora_embedding_A` [rank, n_vocab] and `.lora_embedding_B` [n_embd, rank]. Its change is
scale * B A, with scale = lora_alpha / rank, or lora_alpha / sqrt(rank) if `use_rslora` (arXiv:2312.03732). What else a
config can ask for, a GGUF adapter cannot say, and it is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from qrun.formats import FormatError, TensorType, ValueType
from qrun.formats.blocks.layout import F32Array
from qrun.formats.checkpoints.plain import FLOATS, PlainTensor, decode
from qrun.formats.gguf.cursor import quote
from qrun.formats.json_file import read_json
from qrun.formats.safetensors import SafetensorsFolder, StoredTensor
from qrun.formats.tensors import Described, SourceTensor, TensorFile
from qrun.models.adapter import ALPHA_KEY, EMBEDDING, HEAD, PEFT_CONFIG, SUFFIXES
from qrun.models.huggingface.architectures import ARCHITECTURES
from qrun.models.huggingface.changes import scaled_by
from qrun.models.huggingface.checkpoint import FILE_TYPES, read_config
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import Entries
from qrun.models.huggingface.layout import Architecture, Experts, Mapped, Stack, flat
from qrun.models.huggingface.tensors import MappedTensor, Segment, dimensions, is_other_part, short_name
from qrun.models.hyperparameters import MAX_EXPERTS, MAX_HEADS, MAX_LAYERS, Metadata

WEIGHTS_NAME = "adapter_model.safetensors"
MLX_WEIGHTS_NAME = "adapters.safetensors"

# What a config may ask for and a GGUF adapter cannot say: refused where it is given.
REFUSED = {
    "use_dora": "DoRA adapters are not supported: they change more than B A",
    "trainable_token_indices": "it holds rows of the embedding beside its LoRA pairs, which is not supported",
    "target_parameters": "it changes parameters that are no modules (target_parameters), which is not supported",
    "layer_replication": "it repeats layers of its model (layer_replication), which is not supported",
    "lora_bias": "its pairs have biases (lora_bias), which are not supported",
    "use_qalora": "QA-LoRA adapters are not supported: they sum inputs in groups",
    "alora_invocation_tokens": "an adapter that acts from certain tokens on (aLoRA) is not supported",
    "use_bdlora": "adapters of block-diagonal matrices (BD-LoRA) are not supported",
    "arrow_config": "an adapter that chooses among others (Arrow) is not supported",
}
MODULES = "modules_to_save"
WHOLE_MODULES = f"it holds whole modules beside its LoRA pairs ({MODULES}), which is not supported"
# Ways to begin a training that leave the model's weights as they are. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) put
# a part of them into the adapter and take it off the model, or quantise the model.
KEPT_BASES = ("true", "false", "gaussian", "eva", "orthogonal", "mica")

_PAIR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<which>[AB])(?:\.\w+)*")
# Patterns of module names are regular expressions of strangers. Those in which little is left open, and nothing within
# what is open, are matched in little time; others are refused.
_PATTERN = re.compile(r"\^?(?:[\w-]|\\\.|\.\*?|\\d\+?|\((?:[\w|-]|\\\.)+\))+\$?")
_MAX_OPEN = 3


@dataclass(frozen=True)
class Base:
    """The model that an adapter changes, as far as its tensors' names and the order of their rows go.

    heads: of queries and of keys, of each layer. counts: how many layers there are of each stack, by `Stack.count`.
    """

    architecture: Architecture
    heads: Mapping[str, tuple[int, ...]]
    n_experts: int
    counts: Mapping[str, int]

    @classmethod
    def of_folder(cls, folder: Path) -> Base:
        """From config.json."""
        architecture, config = read_config(folder)
        sizes = dimensions(config, architecture)
        heads = {key: (sizes[key],) * sizes["layers"] for key in ("heads", "kv_heads")}
        return cls(architecture, heads, sizes["experts"], sizes)

    @classmethod
    def of_file(cls, file: TensorFile[Described]) -> Base:
        """From the metadata of a GGUF file, or of what looks like one."""
        metadata = Metadata(file)
        n_layer = metadata.integer("block_count", high=MAX_LAYERS)
        heads = metadata.per_layer("attention.head_count", n_layer, high=MAX_HEADS)
        kv_heads = metadata.per_layer("attention.head_count_kv", n_layer, default=heads, high=MAX_HEADS)
        n_experts = metadata.integer("expert_count", 0, low=0, high=MAX_EXPERTS)
        n_decoder = metadata.integer("decoder_block_count", 0, low=0, high=MAX_LAYERS) or n_layer
        counts = {"layers": n_layer, "decoder_layers": n_decoder}
        for architecture in ARCHITECTURES.values():
            if architecture.name == metadata.architecture and architecture.has_experts == bool(n_experts):
                return cls(architecture, {"heads": heads, "kv_heads": kv_heads}, n_experts, counts)
        raise FormatError(file.path, f"adapters for the architecture {quote(metadata.architecture)} are not supported")

    def targets(self) -> dict[str, _Target]:
        """What an adapter may change, by the names of modules without "model." and the like: the matrices that files
        have as checkpoints do, but for the order of rows in heads."""
        architecture = self.architecture
        found: dict[str, _Target] = {}
        if architecture.embedding_change is None:
            found[architecture.embedding] = _Target(EMBEDDING)
        if architecture.head_change is None:
            found[architecture.head] = _Target(HEAD)
        unsure: set[str] = set()  # which tensor they become depends on what else there is
        for layer, hf, gguf, parts in self._layers():
            for part in parts:
                name = f"{gguf}.{layer}.{part.gguf}"
                module = f"{hf}.{layer}.{part.hf}".removesuffix(".weight")
                if isinstance(part, Experts):
                    for expert in range(self.n_experts if part.count == "experts" else 0):
                        found[module.format(expert)] = _Target(name, expert=expert)
                elif len(part.shape) == 2 and part.change is None:
                    target = _Target(name, self.heads[part.heads][layer] if part.heads else 0)
                    if found.setdefault(module, target) != target:
                        unsure.add(module)
        return {module: target for module, target in found.items() if module not in unsure}

    def _layers(self) -> Iterator[tuple[int, str, str, list[Mapped | Experts]]]:
        """Each layer's number, what names begin with on both sides, and its tensors."""
        architecture = self.architecture
        own = Stack(architecture.layers, "blk", architecture.layer, "")
        for stack in (own, *architecture.stacks):
            parts = list(flat(stack.layer))
            for layer in range(self.counts[stack.count] if stack.count else len(self.heads["heads"])):
                yield layer, stack.hf, stack.gguf, parts


@dataclass(frozen=True)
class _Target:
    """The tensor of a GGUF file that a module is. heads: of which the rows change places, see MappedTensor."""

    name: str
    heads: int = 0
    expert: int | None = None


def adapter_type(name: str) -> TensorType:
    """What an adapter's matrices are to be written as, by its name in any case. Raises ValueError if they cannot be."""
    type = next((type for type in FILE_TYPES if type.name == name.upper()), None)
    if type is None:
        known = ", ".join(type.name for type in FILE_TYPES)
        raise ValueError(f"an adapter is written as {known}, not {name.upper()}")
    return type


class PeftSource:
    """A folder of PEFT as a `Source` of the converter: metadata and tensors are those of a GGUF adapter.

    type: of all its tensors, one of floats. Raises FormatError, one line, if a file is damaged, if the adapter is of
    another model than `base`, or if it does what a GGUF adapter cannot say.
    """

    def __init__(self, folder: str | os.PathLike[str], base: Base, type: TensorType = TensorType.F16) -> None:
        self.path = Path(folder)
        self._base, self._type = base, type
        self._config = read_adapter_config(self.path)
        if (self.path / MLX_WEIGHTS_NAME).is_file() and not (self.path / WEIGHTS_NAME).is_file():
            raise FormatError(self.path, f"this is an adapter of MLX ({MLX_WEIGHTS_NAME}), which is not supported")
        self._folder = SafetensorsFolder(self.path, WEIGHTS_NAME)
        try:
            # What is not used: tensors of norms, which engines leave out of GGUF adapters too, and of the parts of a
            # model that see or hear.
            self._norms: list[str] = []
            self._others: list[str] = []
            pairs = list(self._pairs())
            if not pairs:
                raise FormatError(self.path, "the adapter changes nothing: it has no pairs of lora_A and lora_B")
            # As an engine reads it, the scale is alpha / rank: alpha is that of the first pair, and where the scale of
            # another one differs, its B makes up for that.
            alpha = self._scale(pairs[0]) * pairs[0].rank
            self.tensors: Mapping[str, SourceTensor] = dict(self._tensors(pairs, alpha))
        except BaseException:
            self._folder.close()
            raise
        entries = self._entries(alpha)
        self.metadata: Mapping[str, Any] = entries.values
        self.metadata_types: Mapping[str, tuple[ValueType, ValueType | None]] = entries.types
        self.writer = entries.writer

    @property
    def files(self) -> Sequence[Path]:
        return [*self._folder.files, self._config.path]

    @property
    def notices(self) -> Sequence[str]:
        """Lines about what of it is not used, or may be wrong."""
        found = []
        start = str(self._config.get("init_lora_weights", True))
        if start.lower() not in KEPT_BASES:
            found.append(f"the adapter began as {quote(start)}: it fits the model only as that changed it")
        if self._norms:
            found.append(f"the norms in the adapter ({len(self._norms)}) are left out")
        if self._others:
            found.append(f"the adapter's changes of what sees or hears ({len(self._others)} tensors) are left out")
        return [f"{self.path}: {text}" for text in found]

    def close(self) -> None:
        """Unmap the file. The tensors cannot be read any more."""
        self.tensors = {}
        self._folder.close()

    def _entries(self, alpha: float) -> Entries:
        entries = Entries()
        entries.text("general.architecture", self._base.architecture.name)
        entries.text("general.type", "adapter")
        entries.text("general.name", self.path.resolve().name)
        if name := base_name(self._config):
            entries.count("general.base_model.count", 1)
            entries.text("general.base_model.0.name", name)
        entries.count("general.file_type", FILE_TYPES[self._type])
        entries.text("adapter.type", "lora")
        entries.real(ALPHA_KEY, alpha)
        return entries

    def _pairs(self) -> Iterator[_Pair]:
        """Both matrices of each module, in the order of the file."""
        targets = self._base.targets()
        found: dict[str, dict[str, StoredTensor]] = {}
        for name, stored in self._folder.tensors.items():
            match = _PAIR.fullmatch(name)
            module = match["module"] if match else name.removeprefix("base_model.model.")
            if is_other_part(module):
                self._others.append(name)
                continue
            if match is None:
                if name.endswith(".base_layer.weight"):  # the embedding as it was, saved because it has a pair
                    continue
                if _is_of_norm(name) and len(stored.shape) == 1:
                    self._norms.append(name)
                    continue
                raise stored.error(_why_not(name))
            if stored.dtype not in FLOATS or len(stored.shape) != 2 or not all(stored.shape):
                raise stored.error(f"has type {stored.dtype} and shape {stored.shape}: it is no matrix of floats")
            both = found.setdefault(match["module"], {})
            if match["which"] in both:
                raise stored.error("is there twice")
            both[match["which"]] = stored
        for module, matrices in found.items():
            first = next(iter(matrices.values()))
            target = targets.get(short_name(module))
            if target is None:
                architecture = self._base.architecture.name
                raise first.error(f"is of a module that is no matrix of models of architecture {quote(architecture)}")
            if len(matrices) != 2:
                raise first.error("is there without the other one of its pair")
            pair = _Pair(module, target, matrices["A"], matrices["B"])
            if pair.a.shape[0] != pair.rank:
                raise pair.b.error(f"has shape {pair.b.shape}, which does not go with {pair.a.shape}")
            yield pair

    def _scale(self, pair: _Pair) -> float:
        """By which the product of a pair is multiplied."""
        alpha = self._config.real("lora_alpha", low=-1e6, high=1e6)
        patterns = self._config.get("alpha_pattern", {})
        if not isinstance(patterns, dict):
            raise self._config.error("alpha_pattern", "is not an object")
        for pattern in patterns:
            if _matches(pattern, pair.module, self._config):
                alpha = Config(self._config.path, patterns, prefix="alpha_pattern.").real(pattern, low=-1e6, high=1e6)
                break
        if not alpha:
            raise self._config.error("lora_alpha", f"is 0 for {quote(pair.module)}: the adapter would do nothing there")
        return alpha / (sqrt(pair.rank) if self._config.flag("use_rslora") else pair.rank)

    def _tensors(self, pairs: Sequence[_Pair], alpha: float) -> Iterator[tuple[str, SourceTensor]]:
        groups: dict[str, list[_Pair]] = {}
        for pair in pairs:
            groups.setdefault(pair.target.name, []).append(pair)
        for name, group in groups.items():
            if group[0].target.expert is not None:
                group = self._all_experts(group)
            elif len(group) > 1:
                raise group[1].a.error(f"changes the same matrix as {quote(group[0].a.name)}")
            first = group[0]
            experts = () if first.target.expert is None else (len(group),)
            a: list[SourceTensor] = [PlainTensor.of(pair.a) for pair in group]
            if name == EMBEDDING:
                a = [_Transposed(first.a.name, FLOATS[first.a.dtype], first.a.shape[::-1], first.a)]
            b = [scaled_by(PlainTensor.of(pair.b), self._scale(pair) * pair.rank / alpha) for pair in group]
            for suffix, matrices, heads in ((SUFFIXES[0], a, 0), (SUFFIXES[1], b, first.target.heads)):
                shape = (*experts, *matrices[0].shape)
                if heads and shape[-2] % (2 * heads):
                    raise first.b.error(f"has {shape[-2]} rows, which are not those of {heads} heads")
                segments = tuple(Segment(matrix, 0, matrix.n_rows) for matrix in matrices)
                yield name + suffix, _FactorTensor(name + suffix, self._type, shape, segments, heads)

    def _all_experts(self, group: list[_Pair]) -> list[_Pair]:
        """In their order. In a GGUF file the matrices of all experts are one tensor."""
        by_expert = {pair.target.expert: pair for pair in group}
        if len(by_expert) != self._base.n_experts or len(group) != len(by_expert):
            reason = f"{len(by_expert)} of {self._base.n_experts} experts have pairs of {quote(group[0].target.name)}"
            raise FormatError(self.path, f"{reason}: only adapters that change all of them are supported")
        ordered = [by_expert[expert] for expert in range(self._base.n_experts)]
        for pair in ordered:
            if (pair.a.shape, pair.b.shape) != (ordered[0].a.shape, ordered[0].b.shape):
                raise pair.a.error(f"has shape {pair.a.shape}, and that of the first expert {ordered[0].a.shape}")
        return ordered


@dataclass(frozen=True)
class _Pair:
    module: str
    target: _Target
    a: StoredTensor
    b: StoredTensor

    @property
    def rank(self) -> int:
        return self.b.shape[1]


@dataclass(frozen=True, eq=False)
class _FactorTensor(MappedTensor):
    @property
    def copyable(self) -> bool:
        return False  # so that weights are checked to be finite, and to fit their type


@dataclass(frozen=True, eq=False)
class _Transposed(SourceTensor):
    """Columns of a matrix in a file as rows."""

    matrix: StoredTensor

    def rows(self, start: int, end: int) -> F32Array:
        columns = np.ascontiguousarray(self.matrix.array()[:, start:end].T)
        return decode(self.matrix, columns.reshape(-1).view(np.uint8)).reshape(end - start, self.row)

    def forget(self) -> None:
        self.matrix.forget()

    def error(self, reason: str) -> FormatError:
        return self.matrix.error(reason)


def read_adapter_config(folder: Path) -> Config:
    """adapter_config.json. Raises FormatError for an adapter that is no LoRA, or of a kind that cannot be converted."""
    path = folder / PEFT_CONFIG
    config = Config(path, read_json(path))
    kind = config.text("peft_type", "LORA")
    if kind != "LORA":
        raise FormatError(folder, f"adapters of type {quote(kind)} are not supported, only 'LORA'")
    for key, reason in REFUSED.items():
        if config.get(key):
            raise FormatError(folder, reason)
    modules = config.get(MODULES) or []
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise config.error(MODULES, "is not a list of names")
    for module in modules:
        short = short_name(module)
        if not short.endswith("norm") and not is_other_part(module):
            raise FormatError(folder, WHOLE_MODULES)
    if config.text("bias", "none") != "none":
        raise FormatError(folder, "it changes biases too (bias), which is not supported")
    return config


def base_name(config: Config) -> str:
    """The model that the adapter was trained for, as its config calls it: a folder, or a name at Hugging Face."""
    return config.text("base_model_name_or_path", "")


def find_base(folder: Path) -> Base:
    """The base of an adapter whose config names a folder that is there. FormatError if it names anything else."""
    name = base_name(read_adapter_config(folder))
    if name and (Path(name) / "config.json").is_file():
        return Base.of_folder(Path(name))
    says = f": its config says {quote(name)}" if name else ""
    raise FormatError(folder, f"the model that it was trained for has to be named with --base{says}")


def _is_of_norm(name: str) -> bool:
    return name.endswith(".weight") and any(part.endswith("norm") for part in name.split("."))


def _why_not(name: str) -> str:
    if "lora_magnitude_vector" in name:
        return "is of a DoRA adapter, which is not supported"
    return "is no part of a LoRA pair: adapters that hold whole weights are not supported"


def _matches(pattern: str, module: str, config: Config) -> bool:
    """Is it the module, or a module of this name within another one? As PEFT decides (`get_pattern_key`)."""
    n_open = sum(pattern.count(part) for part in (".*", "+", "("))
    if len(pattern) > 256 or n_open > _MAX_OPEN or not _PATTERN.fullmatch(pattern):
        raise config.error("alpha_pattern", f"has {quote(pattern)}, which is no pattern that is supported")
    return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
