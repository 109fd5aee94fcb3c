"""LoRA adapters (Hu et al., arXiv:2106.09685): small changes of a model's matrices, in a GGUF file of their own.

An adapter changes a matrix W [rows, columns] into W + scale * alpha / rank * B A, with A [rank, columns] and B
[rows, rank]. Its file has for each tensor NAME of the model that it changes the pair `NAME.lora_a` and `NAME.lora_b`,
and in its metadata:

    general.type = "adapter"    adapter.type = "lora"    general.architecture: the model's    adapter.lora.alpha

The token embedding's pair lies the other way round, A [n_vocab, rank] and B [n_embd, rank], so that a token's row of A
can be looked up like one of W. Here the change of `token_embd.weight` is that of the input alone and the change of
`output.weight` that of the head, also in models that use one matrix for both: so adapters are trained.

`adapt` writes the changes into a graph as operations beside the matrices, which stay as they are in their file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Generic, TypeVar

from qrun.formats import FormatError, GGUFReader, TensorInfo
from qrun.formats.blocks import BLOCK_FORMATS
from qrun.formats.dataclass import dataclass
from qrun.formats.gguf.cursor import quote
from qrun.formats.tensors import Described, TensorFile, text_of
from qrun.models import graph as G
from qrun.models.hyperparameters import shorten

ALPHA_KEY = "adapter.lora.alpha"
ACTIVATION_KEY = "adapter.alora.invocation_tokens"
SUFFIXES = (".lora_a", ".lora_b")
PEFT_CONFIG = "adapter_config.json"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
RESCALED = "qrun.rescaled"
"""A key in the metadata of a model, true where matrices have scales that adapters of the original know nothing of."""


@dataclass(frozen=True)
class Lora:
    """An adapter that is asked for: its file, and how strongly it counts (1: as it was trained, 0: not at all). name:
    by which some texts may ask for it, or ""."""

    path: Path
    scale: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        if not isfinite(self.scale):
            raise ValueError(f"{self.path}: the scale of an adapter is a finite number, not {self.scale}")

    @classmethod
    def of(cls, given: LoraLike) -> Lora:
        """From a path, or a path and a scale."""
        if isinstance(given, Lora):
            return given
        try:
            path, scale = given if isinstance(given, tuple) else (given, 1.0)
            return cls(Path(path), float(scale))
        except (TypeError, ValueError) as error:
            if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], float):
                raise  # a scale that is not finite
            wrong = " ".join(repr(given).split())
            raise ValueError(f"an adapter is a path, or a path and a scale, not {wrong}") from error


LoraLike = Lora | str | os.PathLike[str] | tuple[str | os.PathLike[str], float]
"""What may be given for one: also a path, or a path and a scale."""


T = TypeVar("T", bound=Described)


@dataclass(frozen=True, eq=False)
class LowRank(Generic[T]):
    """The change of one tensor of the model: `factor` * B A, before the adapter's own scale. `name` is the tensor's."""

    name: str
    a: T
    b: T
    factor: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor that it changes."""
        if self.name == EMBEDDING:
            return (self.a.shape[0], self.b.shape[0])
        return (*self.b.shape[:-1], self.a.shape[-1])


class Adapter(Generic[T]):
    """An open adapter. Raises FormatError if its file is no LoRA adapter, or of a kind that is not known.

    changes: by the name of the model's tensor; none any more once it is closed. ignored: tensors of norms, which some
    tools add in full; they are left out, as the reference engine leaves them out. alpha: as in the file, or None; then
    changes count as they are.
    """

    def __init__(self, file: TensorFile[T], scale: float = 1.0) -> None:
        self.file, self.path, self.scale = file, file.path, scale
        metadata = file.metadata
        if not is_adapter(file):
            raise FormatError(self.path, "this is not an adapter: its general.type is not 'adapter'")
        if text_of(file, "adapter.type") != "lora":
            kind = shorten(metadata.get("adapter.type"))
            raise FormatError(self.path, f"adapters of type {kind} are not supported, only 'lora'")
        if ACTIVATION_KEY in metadata:
            raise FormatError(self.path, "an adapter that acts from certain tokens on (aLoRA) is not supported")
        self.architecture = text_of(file, "general.architecture")
        alpha = metadata.get(ALPHA_KEY, 0.0)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not isfinite(alpha):
            raise FormatError(self.path, f"{ALPHA_KEY} is not a finite number: {shorten(alpha)}")
        # The reference engine takes 0 for "not given".
        self.alpha: float | None = float(alpha) or None
        self.ignored = tuple(name for name in file.tensors if name.endswith("_norm.weight"))
        self.changes = {name: self._change(name) for name in self._names()}
        if not self.changes:
            raise FormatError(self.path, "the adapter changes nothing: it has no pairs of tensors .lora_a and .lora_b")

    def _names(self) -> Iterator[str]:
        seen: set[str] = set()
        for name in self.file.tensors:
            if name in self.ignored:
                continue
            if not name.endswith(SUFFIXES):
                raise FormatError(self.path, f"tensor {quote(name)} is neither .lora_a nor .lora_b")
            base = name[: -len(SUFFIXES[0])]
            if base not in seen:
                seen.add(base)
                yield base

    def _change(self, name: str) -> LowRank[T]:
        a, b = (self._matrix(name + suffix) for suffix in SUFFIXES)
        rank = b.shape[-1]
        rank_of_a = a.shape[-1] if name == EMBEDDING else a.shape[-2]
        n_dims = 2 if name == EMBEDDING else len(b.shape)
        if not rank == rank_of_a > 0 or a.shape[:-2] != b.shape[:-2] or len(a.shape) != n_dims:
            reason = f"tensors {quote(a.name)} and {quote(b.name)} have shapes {a.shape} and {b.shape}"
            raise FormatError(self.path, f"{reason}, which do not go together")
        return LowRank(name, a, b, 1.0 if self.alpha is None else self.alpha / rank)

    def _matrix(self, name: str) -> T:
        tensor = self.file.tensors.get(name)
        if tensor is None:
            raise FormatError(self.path, f"tensor {quote(name)} is missing, and the other one of its pair is there")
        if len(tensor.shape) not in (2, 3):
            raise FormatError(self.path, f"tensor {quote(name)} has shape {tensor.shape}: it is no matrix")
        if tensor.type not in BLOCK_FORMATS:
            reason = f"tensor {quote(name)} has type {tensor.type.name}, which is not supported"
            raise FormatError(self.path, reason)
        return tensor

    @property
    def notice(self) -> str | None:
        """A line for whoever uses it, if a part of it is not used."""
        if not self.ignored:
            return None
        return f"{self.path}: the norms in the adapter ({len(self.ignored)}) are left out"

    @property
    def ranks(self) -> list[int]:
        """All ranks that there are, the least first."""
        return sorted({change.b.shape[-1] for change in self.changes.values()})

    def check(self, architecture: object, shapes: Mapping[str, tuple[int, ...]], rescaled: bool) -> None:
        """Raises FormatError if it is of another architecture, or changes what is not among these matrices of a model,
        or has another shape there; and if the model is RESCALED."""
        if self.architecture != architecture:
            reason = f"this is an adapter of architecture {shorten(self.architecture)}, and the model's is "
            raise FormatError(self.path, reason + shorten(architecture))
        for name, change in self.changes.items():
            shape = shapes.get(name)
            if shape is None:
                problem = f"the model has no matrix {quote(name)}"
            elif shape != change.shape:
                problem = f"tensor {quote(name)} has shape {shape} in the model, and {change.shape} in the adapter"
            else:
                continue
            raise FormatError(self.path, f"{problem}: it is an adapter of another model")
        if rescaled:
            reason = "the model was converted with scales (--method awq or both): adapters of the original do not fit"
            raise FormatError(self.path, reason)

    def close(self) -> None:
        """Close the file. Tensors that a graph has keep it mapped as long as they live."""
        self.changes = {}
        self.file.close()


def is_adapter(file: TensorFile[Described]) -> bool:
    """Does this file say that it is an adapter, and so no model?"""
    return text_of(file, "general.type") == "adapter"


@contextmanager
def open_adapters(loras: Iterable[Lora]) -> Iterator[list[Adapter[TensorInfo]]]:
    """All of these GGUF files, open until the end of the `with` statement. FormatError if one is not an adapter."""
    with ExitStack() as stack:
        adapters = []
        for lora in loras:
            if is_peft(lora.path):
                reason = "this is a PEFT adapter: make a GGUF file of it with `qrun convert --lora`"
                raise FormatError(lora.path, reason)
            reader = stack.enter_context(GGUFReader(lora.path))
            adapters.append(adapter := Adapter(reader, lora.scale))
            stack.callback(adapter.close)
        yield adapters


def is_peft(path: Path) -> bool:
    """Is this the folder of an adapter as Hugging Face's PEFT saves it, and not of a model besides?"""
    return (path / PEFT_CONFIG).is_file() and not (path / "config.json").is_file()


def adapt(graph: G.Graph, adapters: Sequence[Adapter[TensorInfo]]) -> G.Graph:
    """The graph with the changes of all adapters; those of one matrix add up. One of scale 0 leaves it as it is.

    Raises FormatError, naming the adapter, if it is of another architecture, or changes a tensor that the model does
    not have, or has in another shape.
    """
    for adapter in adapters:
        _check(graph, adapter)
    acting = [adapter for adapter in adapters if adapter.scale != 0]
    if not acting:
        return graph
    encoder = graph.encoder and replace(graph.encoder, operations=_Transform(graph.encoder, acting).operations)
    return replace(graph, operations=_Transform(graph, acting).operations, encoder=encoder)


def check_switchable(graph: G.Graph, adapter: Adapter[TensorInfo]) -> None:
    """Raises FormatError, naming the adapter, if it is of another model, or changes what can only be changed for all
    texts alike: embeddings and experts."""
    if graph.encoder is not None:
        raise FormatError(adapter.path, "adapters by name are not supported for models with an encoder and a decoder")
    _check(graph, adapter)
    dense = {_target(operation) for operation in graph.operations if isinstance(operation, G.Linear)}
    for name in adapter.changes.keys() - dense:
        reason = f"tensor {quote(name)} is changed, of the {'embedding' if name == EMBEDDING else 'experts'}, which is "
        raise FormatError(adapter.path, reason + "possible for all texts alike only (--lora FILE, without a name)")


def target_of(operation: G.Linear) -> str:
    """The name under which adapters know a matrix."""
    return HEAD if operation.weight.name == EMBEDDING else operation.weight.name


def _target(operation: G.Operation) -> str | None:
    """The name under which adapters know the matrix of an operation. Of embeddings they change that of tokens only."""
    if isinstance(operation, G.Linear):
        return target_of(operation)
    return EMBEDDING if isinstance(operation, G.Embed) and operation.weight.name == EMBEDDING else None


def _matrices(operation: G.MoE) -> tuple[G.Weight, ...]:
    return (operation.router, *operation.matrices)


def _check(graph: G.Graph, adapter: Adapter[TensorInfo]) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    of_encoder = [] if graph.encoder is None else graph.encoder.operations
    for operation in (*of_encoder, *graph.operations):
        name = _target(operation)
        if name is not None and isinstance(operation, G.Linear | G.Embed):
            shapes[name] = operation.weight.shape
        elif isinstance(operation, G.MoE):
            shapes |= {weight.name: weight.shape for weight in _matrices(operation)}
    adapter.check(graph.architecture, shapes, graph.rescaled)


class _Transform:
    """Writes the operations anew: a matrix that is changed gets its changes behind it, and their sum its result."""

    def __init__(self, graph: G.Graph, adapters: Sequence[Adapter[TensorInfo]]) -> None:
        self.adapters = adapters
        self.operations: list[G.Operation] = []
        self._n_values = 1 + max((operation.out.id for operation in graph.operations), default=0)
        for operation in graph.operations:
            changes = self._changes(_target(operation))
            if changes and isinstance(operation, G.Linear | G.Embed):
                self._change(operation, changes)
            elif isinstance(operation, G.MoE):
                self._change_experts(operation)
            else:
                self.operations.append(operation)

    def _changes(self, name: str | None) -> list[tuple[LowRank[TensorInfo], float]]:
        """All changes of a tensor, with the scales of their adapters."""
        return [(a.changes[name], a.scale) for a in self.adapters if name in a.changes]

    def _change(self, operation: G.Linear | G.Embed, changes: list[tuple[LowRank[TensorInfo], float]]) -> None:
        """All A first, then the matrix, then each B: what is small comes where threads need not wait for it."""
        out = operation.out
        inners = [self._value(change.b.shape[-1]) for change, _ in changes]
        for (change, _), inner in zip(changes, inners, strict=True):
            if isinstance(operation, G.Embed):
                self.operations.append(G.Embed(inner, _weight(change.a), 1.0))
            else:
                self.operations.append(G.Linear(inner, operation.x, _weight(change.a), None))
        total = self._value(out.width)
        self.operations.append(replace(operation, out=total))
        for index, ((change, scale), inner) in enumerate(zip(changes, inners, strict=True)):
            delta = self._value(out.width)
            factor = operation.scale * scale * change.factor
            self.operations.append(G.Linear(delta, inner, _weight(change.b), None, factor))
            following = out if index == len(changes) - 1 else self._value(out.width)
            self.operations.append(G.Add(following, total, delta))
            total = following

    def _change_experts(self, operation: G.MoE) -> None:
        changes = [
            G.Change(weight, _weight(change.a), _weight(change.b), scale * change.factor)
            for weight in _matrices(operation)
            for change, scale in self._changes(weight.name)
        ]
        self.operations.append(replace(operation, changes=tuple(changes)))

    def _value(self, width: int) -> G.Value:
        self._n_values += 1
        return G.Value(self._n_values - 1, width)


def _weight(tensor: TensorInfo) -> G.Weight:
    return G.Weight(tensor.name, tensor.type, tensor.shape, tensor.raw)
