"""What is made of the rows that a model gives for a text: one vector, or how well two texts go together."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, cast, get_args

import numpy as np

from qrun.formats import FormatError, GGUFReader
from qrun.formats.dataclass import dataclass
from qrun.models import graph as G
from qrun.models.graph import Constant, GraphBuilder
from qrun.models.hyperparameters import Hyperparameters, Metadata

PoolingKind = Literal["none", "mean", "cls", "last", "rank"]
"""One vector of all rows: their mean, the first, or the last; "rank" gives numbers that say how well two texts go
together. In the order of their numbers (`support.PoolingType`)."""
POOLINGS: tuple[PoolingKind, ...] = get_args(PoolingKind)
UNSAID = (1 << 32) - 1
"""A -1 without a sign: the file does not say."""


@dataclass(frozen=True, eq=False)
class Step:
    """A matrix [rows, columns] and a bias that a vector goes through, and then an activation, or "softmax"."""

    weight: Constant
    bias: Constant | None = None
    activation: Literal["", "tanh", "gelu", "softmax"] = ""
    norm: Constant | None = None
    """Weights of a layer norm behind that."""
    eps: float = 0.0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x float32 [columns]."""
        y = self.weight @ x
        if self.bias is not None:
            y = y + self.bias
        if self.activation == "tanh":
            y = np.tanh(y)
        elif self.activation == "gelu":
            y = 0.5 * y * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * y * (1.0 + 0.044715 * y * y)))
        elif self.activation == "softmax":
            y = np.exp(y - y.max())
            y = y / y.sum()
        if self.norm is not None:
            y = (y - y.mean()) / np.sqrt(y.var() + self.eps) * self.norm
        return cast(np.ndarray, y.astype(np.float32))


@dataclass(frozen=True)
class Pooling:
    """How a model's embeddings are made.

    kind: what the file asks for, or None. Where it is "rank", `rank_row` is the kind of vector that goes through
    `rank_steps`. steps: what vectors go through otherwise. labels: the names of the numbers of a ranking.
    """

    kind: PoolingKind | None
    rank_row: PoolingKind
    steps: tuple[Step, ...]
    rank_steps: tuple[Step, ...]
    labels: tuple[str, ...]

    def row_of(self, kind: PoolingKind) -> PoolingKind:
        """Which rows a kind wants."""
        return self.rank_row if kind == "rank" else kind

    def vector(self, rows: np.ndarray, kind: PoolingKind) -> np.ndarray:
        """float32 [width] of rows [n, n_embd]: all of a text's, or of "cls" and "last" the one that counts."""
        is_mean = self.row_of(kind) == "mean"
        x = rows.mean(axis=0, dtype=np.float64).astype(np.float32) if is_mean else rows[-1].copy()
        for step in self.rank_steps if kind == "rank" else self.steps:
            x = step(x)
        return cast(np.ndarray, x)


def read_pooling(reader: GGUFReader) -> Pooling:
    """From the file. Raises `FormatError` for a number or a tensor that makes no sense."""
    metadata = Metadata(reader)
    h = Hyperparameters.read(metadata)
    builder = GraphBuilder(reader)
    return Pooling(_kind(metadata, "pooling_type"), _rank_row(metadata, h), _dense(builder, h),
                   _classifier(builder, h), _labels(metadata))  # fmt: skip


def _kind(metadata: Metadata, key: str) -> PoolingKind | None:
    number = metadata.integer(key, UNSAID, low=-1, high=UNSAID)
    if number in (-1, UNSAID):
        return None
    if number >= len(POOLINGS):
        raise metadata.error(key, f"is {number}, expected 0 to {len(POOLINGS) - 1}")
    return POOLINGS[number]


def _rank_row(metadata: Metadata, h: Hyperparameters) -> PoolingKind:
    kind = _kind(metadata, "classifier.pooling_type")
    if kind is None and metadata.architecture == "modern-bert":
        return "mean"
    if kind == "mean":
        return "mean"
    return "last" if h.causal else "cls"


def _dense(builder: GraphBuilder, h: Hyperparameters) -> tuple[Step, ...]:
    """The matrices that some models have behind their mean."""
    steps, width = [], h.n_embd
    for name in ("dense_2", "dense_3"):
        if builder.has(f"{name}.weight"):
            rows = builder.n_rows(f"{name}.weight")
            weight = builder.constant(f"{name}.weight", rows, width)
            steps.append(Step(weight, builder.optional_constant(f"{name}.bias", rows)))
            width = rows
    return tuple(steps)


def _classifier(builder: GraphBuilder, h: Hyperparameters) -> tuple[Step, ...]:
    """What makes numbers of the vector that stands for two texts."""
    steps, width = [], h.n_embd
    if builder.has("cls.weight"):
        weight = builder.rows_constant("cls.weight", width)
        rows = len(weight)
        is_modern = h.metadata.architecture == "modern-bert"
        norm = builder.optional_constant("cls.norm.weight", rows)
        steps.append(Step(weight, builder.optional_constant("cls.bias", rows), "gelu" if is_modern else "tanh", norm,
                          0.0 if norm is None else h.norm_eps))  # fmt: skip
        width = rows
    if builder.has("cls.output.weight"):
        weight = builder.rows_constant("cls.output.weight", width)
        rows = len(weight)
        softmax = h.metadata.architecture in ("qwen3", "qwen3vl")
        steps.append(
            Step(weight, builder.optional_constant("cls.output.bias", rows), "softmax" if softmax else "")
        )
    if any(not len(step.weight) for step in steps):
        raise builder.error("a tensor of the classifier (cls) is empty or of the wrong shape")
    return tuple(steps)


def _labels(metadata: Metadata) -> tuple[str, ...]:
    labels = metadata.reader.metadata.get(f"{metadata.architecture}.classifier.output_labels", ())
    return tuple(str(label) for label in labels) if isinstance(labels, (list, tuple, np.ndarray)) else ()


def rows_graph(graph: G.Graph, reader: GGUFReader) -> G.Graph:
    """The graph of a model that writes, up to the rows that its output matrix takes.

    Raises `FormatError` if no matrix makes its logits of such rows.
    """
    for index in range(len(graph.operations) - 1, -1, -1):
        operation = graph.operations[index]
        if isinstance(operation, G.Linear) and (operation.out.width, operation.x.width) == (
            graph.logits.width, graph.n_embd,
        ):  # fmt: skip
            before = graph.operations[:index]
            last = next(i for i, other in enumerate(before) if other.out is operation.x)
            return replace(graph, operations=before[: last + 1], logits=operation.x, hidden=None, embeds=True)
    raise FormatError(reader.path, f"embeddings of architecture {graph.architecture} are not supported")
