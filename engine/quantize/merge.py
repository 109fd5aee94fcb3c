"""Adapters merged into a model while it is converted: every row gets its share of scale * B A before it is quantised.

Nothing is held but the factors of the tensor that is being written, as float32; rows are made as they are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrun.engine.quantize.source import GGUFSource, Source
from qrun.formats import FormatError, GGUFReader, GGUFWriter, TensorType, ValueType
from qrun.formats.blocks.floats import Floats
from qrun.formats.tensors import SourceTensor, TensorFile, text_of
from qrun.models.adapter import EMBEDDING, HEAD, RESCALED, Adapter, Lora, LowRank, is_peft
from qrun.models.huggingface.peft import Base, PeftSource

F32Array = NDArray[np.float32]

# OpenBLAS takes threads of its own for products of more than 2^18 multiplications, and those get in the way of the
# threads that quantise. Smaller pieces are computed by the thread that asks: so merging rank 16 into 1.2 billion
# weights, and quantising them on two cores, takes 8 seconds instead of 16.
PIECE_ROWS = 8
PIECE_SIZE = 1 << 18


@contextmanager
def open_sources(
    loras: Iterable[Lora], base: Source, notice: Callable[[str], None] = lambda text: None
) -> Iterator[list[Adapter[SourceTensor]]]:
    """All of these adapters (GGUF files, or folders of PEFT) of a model, open until the end of the `with` statement.

    notice: called with a line about what of an adapter is not used, or may be wrong. FormatError if one is no adapter.
    """
    with ExitStack() as stack:
        adapters: list[Adapter[SourceTensor]] = []
        for lora in loras:
            source: GGUFSource | PeftSource
            if is_peft(lora.path):
                source = PeftSource(lora.path, Base.of_file(base), TensorType.F32)
            else:
                source = GGUFSource(GGUFReader(lora.path))
            stack.callback(source.close)
            file: TensorFile[SourceTensor] = source
            adapters.append(Adapter(file, lora.scale))
            for text in (*source.notices, *filter(None, [adapters[-1].notice])):
                notice(text)
        yield adapters


class MergedSource:
    """A model with adapters merged into it: a source like the one that it is made of, which it does not close.

    Where an adapter changes the embedding or the head of a model that uses one matrix for both, the head becomes a
    tensor of its own, so that each has its own change. Raises FormatError if an adapter is of another model.
    """

    def __init__(self, base: Source, adapters: Sequence[Adapter[SourceTensor]]) -> None:
        self.base = base
        self.path = base.path
        self.files: Sequence[Path] = [*base.files, *(path for adapter in adapters for path in adapter.file.files)]
        self.notices = base.notices
        self.metadata: Mapping[str, Any] = base.metadata
        self.metadata_types: Mapping[str, tuple[ValueType, ValueType | None]] = base.metadata_types
        tensors = dict(base.tensors)
        if HEAD not in tensors and EMBEDDING in tensors:
            head = _MergedTensor(HEAD, tensors[EMBEDDING].type, tensors[EMBEDDING].shape, tensors[EMBEDDING])
            if any(adapter.changes.keys() & {EMBEDDING, HEAD} for adapter in adapters):
                tensors[HEAD] = head
        matrices = {name: tensor.shape for name, tensor in tensors.items() if len(tensor.shape) > 1}
        for adapter in adapters:
            adapter.check(text_of(base, "general.architecture"), matrices, base.metadata.get(RESCALED) is True)
        acting = [adapter for adapter in adapters if adapter.scale != 0]
        for name, tensor in tensors.items():
            changes = [_Change(a.changes[name], a.scale) for a in acting if name in a.changes]
            if changes:
                tensors[name] = _MergedTensor(name, tensor.type, tensor.shape, tensor, changes)
        self.tensors: Mapping[str, SourceTensor] = tensors

    def writer(self, path: str | os.PathLike[str]) -> GGUFWriter:
        """Has the metadata of the model."""
        return self.base.writer(path)

    def close(self) -> None:
        """Let the tensors go."""
        self.tensors = {}


class _Change:
    """Rows of scale * factor * B A, [experts * rows, columns]. Its factors are decoded when they are first needed."""

    def __init__(self, change: LowRank[SourceTensor], scale: float) -> None:
        self._scale = np.float32(scale * change.factor)
        # Rows of the product come from rows of the one on the left; of the embedding's pair, that is A.
        self._left, self._right = (change.a, change.b) if change.name == EMBEDDING else (change.b, change.a)
        self._transposed = change.name == EMBEDDING
        self._expert_rows = self._left.shape[-2]
        self._matrices: F32Array | None = None  # [experts, rank, columns]

    def add_to(self, rows: F32Array, start: int) -> None:
        """Add the rows from `start` on to float32 [n, columns]."""
        end = start + len(rows)
        left = self._left.rows(start, end)
        right = self._matrices  # may be forgotten meanwhile; two threads that find nothing decode the same
        if right is None:
            right = self._matrices = self._decoded()
        for expert in range(start // self._expert_rows, -(-end // self._expert_rows)):
            first = max(expert * self._expert_rows, start) - start
            last = min((expert + 1) * self._expert_rows, end) - start
            _add_product(rows[first:last], self._scale * left[first:last], right[expert])

    def _decoded(self) -> F32Array:
        right = self._right.rows(0, self._right.n_rows)
        return right.T[None] if self._transposed else right.reshape(-1, *self._right.shape[-2:])

    def forget(self) -> None:
        """Let the decoded factors go, and what of the file is in memory."""
        self._matrices = None
        self._left.forget()
        self._right.forget()


def _add_product(out: F32Array, left: F32Array, right: F32Array) -> None:
    """out += left @ right, piece by piece."""
    width = max(1, PIECE_SIZE // (PIECE_ROWS * left.shape[1]))
    for i in range(0, len(out), PIECE_ROWS):
        for j in range(0, out.shape[1], width):
            out[i : i + PIECE_ROWS, j : j + width] += left[i : i + PIECE_ROWS] @ right[:, j : j + width]


@dataclass(frozen=True, eq=False)
class _MergedTensor(SourceTensor):
    """The rows of another tensor, under this name, with some changes (or none: then its bytes are those of `base`)."""

    base: SourceTensor
    changes: Sequence[_Change] = field(default=())

    @property
    def copyable(self) -> bool:
        return not self.changes and self.base.copyable

    def rows(self, start: int, end: int) -> F32Array:
        rows = self.base.rows(start, end)
        if not self.changes:
            return rows
        rows = rows.copy() if not rows.flags.writeable else rows
        with np.errstate(over="ignore", invalid="ignore"):  # found, and named, when they are encoded
            for change in self.changes:
                change.add_to(rows, start)
        return rows

    def floats(self, start: int, end: int) -> Floats:
        return self.rows(start, end) if self.changes else self.base.floats(start, end)

    def raw(self, start: int, end: int) -> NDArray[np.uint8]:
        return super().raw(start, end) if self.changes else self.base.raw(start, end)

    def forget(self) -> None:
        self.base.forget()
        for change in self.changes:
            change.forget()

    def error(self, reason: str) -> FormatError:
        return self.base.error(reason if not self.changes else f"{reason}, with the adapters merged into it")
