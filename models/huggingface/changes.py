"""What becomes of a tensor on its way into a GGUF file, where that is more than a name.

A change takes the tensor of the checkpoint and the sizes of the model, and returns another tensor: rows in another
order, columns in another order, matrices turned about, or, of what is small, anything that NumPy computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isclose, prod
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from qrun.formats import FormatError, TensorType
from qrun.formats.blocks.layout import F32Array, U8Array
from qrun.formats.checkpoints import PlainTensor
from qrun.formats.tensors import SourceTensor
from qrun.models.huggingface.layout import Change, Mapped, Sizes

Order = NDArray[np.int64]
T = TypeVar("T", bound=np.generic)
FLOATS = (TensorType.F32, TensorType.F16, TensorType.BF16)
MAX_GAP = 64  # rows that are read for nothing rather than in two pieces


@dataclass(frozen=True, eq=False)
class ChangedTensor(SourceTensor):
    """What has become of another tensor."""

    base: SourceTensor

    @property
    def tensor_scale(self) -> np.float32:
        return self.base.tensor_scale if self.type == self.base.type and self.type not in FLOATS else np.float32(1)

    def forget(self) -> None:
        self.base.forget()

    def error(self, reason: str) -> FormatError:
        return self.base.error(reason)


@dataclass(frozen=True, eq=False)
class OrderedTensor(ChangedTensor):
    """Row i is row order[i] of another tensor."""

    order: Order

    def rows(self, start: int, end: int) -> F32Array:
        return self._gather(start, end, self.base.rows, np.empty((end - start, self.row), np.float32))

    def raw(self, start: int, end: int) -> U8Array:
        n_bytes = self.base.n_bytes // max(self.base.n_rows, 1)
        read = lambda first, last: self.base.raw(first, last).reshape(-1, n_bytes)  # noqa: E731
        return self._gather(start, end, read, np.empty((end - start, n_bytes), np.uint8)).reshape(-1)

    def _gather(self, start: int, end: int, read: Callable[[int, int], NDArray[T]], out: NDArray[T]) -> NDArray[T]:
        wanted = self.order[start:end]
        places = np.argsort(wanted, kind="stable")
        ordered = wanted[places]
        for run in np.split(np.arange(len(wanted)), np.flatnonzero(np.diff(ordered) > MAX_GAP) + 1):
            first, last = int(ordered[run[0]]), int(ordered[run[-1]]) + 1
            out[places[run]] = read(first, last)[ordered[run] - first]
        return out


@dataclass(frozen=True, eq=False)
class _ColumnsTensor(ChangedTensor):
    """Column i is column order[i] of another tensor."""

    order: Order

    def rows(self, start: int, end: int) -> F32Array:
        return np.ascontiguousarray(decoded(self.base, start, end)[:, self.order])


@dataclass(frozen=True, eq=False)
class _TransposedTensor(ChangedTensor):
    """Each matrix of another tensor, turned about."""

    def rows(self, start: int, end: int) -> F32Array:
        height, width = self.shape[-2:]
        parts = []
        for matrix in range(start // height, -(-end // height)):
            first, last = max(start - matrix * height, 0), min(end - matrix * height, height)
            parts.append(decoded(self.base, matrix * width, (matrix + 1) * width)[:, first:last].T)
        return np.ascontiguousarray(np.concatenate(parts))


@dataclass(frozen=True, eq=False)
class _ComputedTensor(ChangedTensor):
    """All at once: of what is small."""

    compute: Callable[[F32Array], F32Array]

    def rows(self, start: int, end: int) -> F32Array:
        stored = decoded(self.base, 0, self.base.n_rows).reshape(self.base.shape)
        return np.ascontiguousarray(self.compute(stored), np.float32).reshape(-1, self.row)[start:end]


@dataclass(frozen=True, eq=False)
class _ScaledTensor(ChangedTensor):
    """Row by row, times a number each."""

    factors: F32Array  # [number of factors, rows]: one after the other, each product rounded

    def rows(self, start: int, end: int) -> F32Array:
        values = decoded(self.base, start, end)
        for each in self.factors:
            values = values * each[start:end, None]
        return values


def decoded(base: SourceTensor, start: int, end: int) -> F32Array:
    """Rows with all that they are to be multiplied by."""
    rows = base.rows(start, end)
    return rows if base.tensor_scale == 1 else rows * base.tensor_scale


def floats_of(base: SourceTensor) -> TensorType:
    """The type of what is no longer made of the same rows."""
    return base.type if base.type in FLOATS else TensorType.F32


# Makers of changes.


def ordered(tensor: SourceTensor, order: Order, shape: tuple[int, ...] | None = None) -> SourceTensor:
    """Rows, or the numbers of a tensor of one dimension, in this order."""
    if len(tensor.shape) == 1:
        shape = (len(order),)
        return _ComputedTensor(tensor.name, TensorType.F32, shape, tensor, lambda values: values[order])
    return OrderedTensor(tensor.name, tensor.type, shape or (len(order), tensor.shape[-1]), tensor, order)


def computed(shape: str, compute: Callable[[F32Array], F32Array] = lambda values: values) -> Change:
    """A small tensor. shape: of the result, in names of dimensions."""

    def change(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
        found = tuple(sizes[name] if name in sizes else int(name) for name in shape.split())
        if prod(found) != prod(tensor.shape):
            raise tensor.error(f"has shape {tensor.shape}, which cannot become {found}")
        return _ComputedTensor(tensor.name, TensorType.F32, found, tensor, compute)

    return change


def rows(start: str, count: str) -> Change:
    """Some of the rows. start: dimensions with + between them, or 0."""

    def change(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
        first = sum(sizes[name] for name in start.split("+")) if start != "0" else 0
        order = np.arange(first, first + sizes[count])
        if order[-1] >= tensor.shape[0]:
            raise tensor.error(f"has {tensor.shape[0]} rows, expected at least {order[-1] + 1}")
        return ordered(tensor, order)

    return change


@dataclass(frozen=True, eq=False)
class _PaddedTensor(ChangedTensor):
    """Rows of zeros behind those of another tensor."""

    def rows(self, start: int, end: int) -> F32Array:
        there = min(max(self.base.n_rows, start), end)
        return np.concatenate([decoded(self.base, start, there), np.zeros((end - there, self.row), np.float32)])

    def raw(self, start: int, end: int) -> U8Array:
        if self.type != self.base.type:
            return super().raw(start, end)
        there = min(max(self.base.n_rows, start), end)
        zeros = np.zeros((end - there) * (self.n_bytes // self.n_rows), np.uint8)
        return np.concatenate([self.base.raw(start, there).reshape(-1), zeros])


@dataclass(frozen=True, eq=False)
class _WideTensor(ChangedTensor):
    """Columns of another tensor, and those of a second one beside them."""

    second: SourceTensor

    def rows(self, start: int, end: int) -> F32Array:
        return np.concatenate([decoded(self.base, start, end), decoded(self.second, start, end)], axis=1)

    def forget(self) -> None:
        self.base.forget()
        self.second.forget()


def beside(left: SourceTensor, right: SourceTensor) -> SourceTensor:
    """Two matrices of as many rows as one."""
    type = left.type if left.type == right.type and left.type in FLOATS else TensorType.F32
    return _WideTensor(left.name, type, (left.n_rows, left.row + right.row), left, right)


def padded_rows(count: str) -> Change:
    """As many rows as a dimension says: those that the tensor lacks are zeros."""

    def change(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
        if tensor.n_rows >= sizes[count]:
            return tensor
        return _PaddedTensor(tensor.name, floats_of(tensor), (sizes[count], tensor.row), tensor)

    return change


def part(number: int, parts: int) -> Change:
    """One of several equal parts of the rows of each matrix."""

    def change(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
        height = tensor.shape[0] if len(tensor.shape) == 1 else tensor.shape[-2]
        if height % parts:
            raise tensor.error(f"has {height} rows, which are not {parts} equal parts")
        size = height // parts
        matrices = prod(tensor.shape[:-2])
        order = np.arange(matrices)[:, None] * height + number * size + np.arange(size)
        return ordered(tensor, order.reshape(-1), (*tensor.shape[:-2], size, tensor.shape[-1]))

    return change


def every(number: int, step: int) -> Change:
    """Every step-th row of each matrix, or number of each of some vectors, from the given one on."""

    def change(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
        vectors = tensor.name.endswith("bias") or len(tensor.shape) == 1
        height = tensor.shape[-1] if vectors else tensor.shape[-2]
        if height % step:
            raise tensor.error(f"has {height} rows, which are not {step} equal parts")
        if vectors:
            shape = (*tensor.shape[:-1], height // step)
            return _ComputedTensor(tensor.name, TensorType.F32, shape, tensor, lambda values: values[..., number::step])
        order = np.arange(number, tensor.n_rows, step)
        return ordered(tensor, order, (*tensor.shape[:-2], height // step, tensor.shape[-1]))

    return change


def transposed(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
    shape = (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2])
    return _TransposedTensor(tensor.name, floats_of(tensor), shape, tensor)


def then(*changes: Change) -> Change:
    """One after the other."""

    def change(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
        for step in changes:
            tensor = step(tensor, sizes)
        return tensor

    return change


def by_order(order: Callable[[Sizes], Order]) -> Change:
    """Rows as `order` numbers them."""

    def change(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
        wanted = order(sizes)
        if len(wanted) and int(wanted.max()) >= tensor.shape[0]:
            raise tensor.error(f"has {tensor.shape[0]} rows, expected {int(wanted.max()) + 1}")
        return ordered(tensor, wanted)

    return change


def by_columns(order: Callable[[Sizes], Order]) -> Change:
    def change(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
        wanted = order(sizes)
        if len(wanted) != tensor.row:
            raise tensor.error(f"has {tensor.row} columns, expected {len(wanted)}")
        return _ColumnsTensor(tensor.name, floats_of(tensor), tensor.shape, tensor, wanted)

    return change


def scaled(factors: Callable[[Sizes, int], F32Array]) -> Change:
    """factors: some of each row [number of factors, rows], from the sizes and the number of rows."""

    def change(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
        return _ScaledTensor(tensor.name, floats_of(tensor), tensor.shape, tensor, factors(sizes, tensor.n_rows))

    return change


def scaled_by(tensor: SourceTensor, factor: float) -> SourceTensor:
    """Times one number."""
    if isclose(factor, 1.0, rel_tol=1e-6):
        return tensor
    factors = np.full((1, tensor.n_rows), factor, np.float32)
    return _ScaledTensor(tensor.name, floats_of(tensor), tensor.shape, tensor, factors)


def side_by_side(n_rows: int, heads: int) -> Order:
    """Rows i and i + n/2 of each head of n rows, which rope turns as a pair, come to lie side by side."""
    return np.arange(n_rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def negative_exp(values: F32Array) -> F32Array:
    return -np.exp(values.astype(np.float64)).astype(np.float32)  # the nearest number, on every machine


def upright(rows: str, columns: str) -> Change:
    """Matrices that some files have columns first: those have another shape, or, of square ones, are not packed."""

    def change(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
        wanted = (sizes[rows], sizes[columns])
        if tensor.shape[-2:] == wanted and (wanted[0] != wanted[1] or not isinstance(tensor, PlainTensor)):
            return tensor
        if tensor.shape[-2:] != wanted[::-1]:
            raise tensor.error(f"has shape {tensor.shape}, expected {(tensor.shape[0], *wanted)}")
        return transposed(tensor, sizes)

    return change


def turned_experts(block: str, router: str = "gate", inner: str = "experts", end: str = "") -> tuple[Mapped, ...]:
    """A router and experts that are all in one tensor, in most files columns first."""
    both_ways = upright("twice_expert_ff", "embd")
    both, one = f"{block}.{inner}.gate_up_proj{end}", f"{block}.{inner}.down_proj{end}"
    return (
        Mapped(both, "ffn_gate_exps.weight", ("experts", "*", "*"), change=then(both_ways, part(0, 2))),
        Mapped(both, "ffn_up_exps.weight", ("experts", "*", "*"), change=then(both_ways, part(1, 2))),
        Mapped(one, "ffn_down_exps.weight", ("experts", "*", "*"), change=upright("embd", "expert_ff")),
        Mapped(f"{block}.{router}.weight", "ffn_gate_inp.weight", ("experts", "embd")),
    )


squeezed_conv = computed("conv_channels conv_kernel")


def in_full(tensor: SourceTensor, sizes: Sizes) -> SourceTensor:
    """The same numbers as F32: of what is small, and much depends on it."""
    return _ComputedTensor(tensor.name, TensorType.F32, tensor.shape, tensor, lambda values: values)
