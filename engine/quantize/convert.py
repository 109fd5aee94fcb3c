"""Making a GGUF file out of a source: every tensor in the type that a mix gives it, in bounded memory.

Rows are taken in chunks. Threads decode and quantise chunks while the one that called writes those that are done, in
order; blocks do not depend on each other, so the bytes are the same for any number of threads.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from errno import EINVAL
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrun.engine.native.cpu_count import available_cores
from qrun.engine.quantize.encoder import Encoded, Encoder
from qrun.engine.quantize.imatrix import Imatrix
from qrun.engine.quantize.mixes import COPY, FILE_TYPES, FLOATS, Choice, Facts, choose_types, needs_importance
from qrun.engine.quantize.source import Source, SourceTensor
from qrun.formats import FormatError, GGUFWriter, TensorType, ValueType
from qrun.formats.blocks import BLOCK_FORMATS, BLOCK_SIZES, dequantize
from qrun.formats.gguf.file import ALIGNMENT_KEY, DEFAULT_ALIGNMENT
from qrun.formats.gguf.split import SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS, part_name
from qrun.formats.tensors import n_weights
from qrun.formats.whole_file import check_place

# Weights in a chunk: 1 MB as they are mostly stored, so that what a thread works on stays in its cache.
CHUNK_WEIGHTS = 1 << 19
# Bytes that are copied at a time.
COPY_BYTES = 1 << 23
# Bytes of a source that may stay in memory after they were read: an embedding alone can have gigabytes.
FORGET_BYTES = 1 << 26
QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION

Progress = Callable[[int, int], None]
Metadata = Sequence[tuple[str, Any, ValueType]]  # key, value, type


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor and what becomes of it. importance: float32 [experts, row], or None. made: a file that has its bytes."""

    source: SourceTensor
    type: TensorType
    importance: NDArray[np.float32] | None = None
    made: Path | None = None

    @property
    def n_bytes(self) -> int:
        block_size, block_bytes = BLOCK_SIZES[self.type]
        return prod(self.source.shape) // block_size * block_bytes

    @property
    def changes(self) -> bool:
        """Has it to be encoded? A tensor that was made while reading has no bytes yet, whatever its type."""
        return self.type != self.source.type or not self.source.copyable


@dataclass(frozen=True)
class Plan:
    """All tensors, in the order of the source, in the files that they go to."""

    source: Source
    choice: Choice
    parts: list[list[PlannedTensor]]
    imatrix: Imatrix | None

    @property
    def tensors(self) -> list[PlannedTensor]:
        return [tensor for part in self.parts for tensor in part]

    @property
    def n_weights(self) -> int:
        return n_weights(tensor.source for tensor in self.tensors)

    @property
    def source_bytes(self) -> int:
        return sum(tensor.source.n_bytes for tensor in self.tensors)

    @property
    def n_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors)

    def bits_per_weight(self, n_bytes: int) -> float:
        return 8 * n_bytes / self.n_weights if self.n_weights else 0.0


@dataclass
class Loss:
    """What quantising to one type has cost: sums over the weights of (x - y)^2 and x^2, plain and times importance."""

    tensors: int = 0
    n_bytes: int = 0
    error: float = 0.0
    energy: float = 0.0
    weighted_error: float = 0.0
    weighted_energy: float = 0.0

    @property
    def relative_rmse(self) -> float:
        """Root of the mean squared error, as a part of the root of the mean square."""
        return float(np.sqrt(self.error / self.energy)) if self.energy > 0 else 0.0

    @property
    def weighted_rmse(self) -> float:
        """`relative_rmse` with every weight counted by its importance (by 1 where there is none): what has been
        minimised."""
        return float(np.sqrt(self.weighted_error / self.weighted_energy)) if self.weighted_energy > 0 else 0.0


@dataclass
class Result:
    """What was written. losses: of the tensors that changed, by their new type."""

    paths: list[Path] = field(default_factory=list)
    losses: dict[TensorType, Loss] = field(default_factory=dict)


def plan(
    source: Source,
    choice: Choice,
    *,
    imatrix: Imatrix | None = None,
    allow_requantize: bool = False,
    split_max_bytes: int | None = None,
) -> Plan:
    """Decide about every tensor, and check that it can be done.

    Raises FormatError if the imatrix is of another model or a tensor cannot be decoded, ValueError if a tensor is
    quantised already and that is not allowed, or the type needs an importance matrix that there is not.
    """
    if imatrix and not any(name in imatrix.values for name in source.tensors):
        raise FormatError(imatrix.path, f"it has nothing of the tensors of {source.path.name}: it is of another model")
    layout = {name: (tensor.type, tensor.shape) for name, tensor in source.tensors.items()}
    types = choose_types(layout, Facts.of(source.metadata, imatrix is not None), choice)
    planned = []
    for name, tensor in source.tensors.items():
        entry = PlannedTensor(tensor, types[name])
        if entry.changes:
            _check_convertible(source, tensor, entry.type, allow_requantize)
            importance = imatrix.importance(name, tensor.shape) if imatrix else None
            if importance is None and needs_importance(name, entry.type, choice):
                base, _ = FILE_TYPES[choice.file_type]
                needs = choice.file_type if entry.type == base else f"{name} as {entry.type.name}"
                raise ValueError(
                    f"{source.path}: {needs} needs an importance matrix"
                    + (f", and {imatrix.path.name} has nothing of {name}" if imatrix else " (--imatrix)")
                )
            entry = PlannedTensor(tensor, entry.type, importance)
        planned.append(entry)
    parts: list[list[PlannedTensor]] = [[]]
    size = 0
    for entry in planned:
        if split_max_bytes is not None and parts[-1] and size + entry.n_bytes > split_max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += entry.n_bytes
    return Plan(source, choice, parts, imatrix)


def check_target(source: Source, path: Path) -> None:
    """Raises ValueError or OSError if a result cannot take this place: the source lies there, a folder, or a device."""
    if path.exists() and any(path.samefile(file) for file in source.files):
        raise ValueError(f"{path}: this is the source itself: name another file")
    check_place(path)
    if path.exists() and not path.is_file():
        raise OSError(EINVAL, "is a device: name a file to write", str(path))


def _check_convertible(source: Source, tensor: SourceTensor, type: TensorType, allow_requantize: bool) -> None:
    if tensor.type not in BLOCK_FORMATS:
        raise tensor.error(f"is of type {tensor.type.name}, which cannot be decoded")
    if tensor.type not in FLOATS and not allow_requantize:
        raise ValueError(
            f"{source.path}: {tensor.name} is quantised already ({tensor.type.name}), and quantising again loses more; "
            "convert the original, or allow it with --allow-requantize"
        )
    block_format = BLOCK_FORMATS.get(type)
    if block_format is None or block_format.quantize is None:
        raise ValueError(f"tensors of type {type.name} cannot be encoded")


def convert(
    plan: Plan,
    out: Path,
    *,
    threads: int | None = None,
    metadata: Metadata = (),
    progress: Progress | None = None,
    compiling: Progress | None = None,
) -> Result:
    """Write what was planned to `out`, or if it is split to files named after it. They appear when all are complete.

    metadata: values to set. progress: called with bytes of the source done, and all of them. compiling: called while
    kernels are compiled. Raises OSError if the disk is too small, FormatError if weights are not finite numbers.
    """
    paths = _paths(out, len(plan.parts))
    for path in paths:
        check_target(plan.source, path)
    free = shutil.disk_usage(out.absolute().parent).free
    if free < plan.n_bytes:
        raise OSError(f"{out}: the disk has {free / 1e9:.1f} GB free, and {plan.n_bytes / 1e9:.1f} GB are needed")
    encoder = Encoder({tensor.type for tensor in plan.tensors if tensor.changes}, progress=compiling)
    result = Result(paths)
    total, done, forgotten = plan.source_bytes, 0, 0
    threads = threads or available_cores()
    with ExitStack() as stack:
        # The pool is left last, so that no thread works on when the files are taken away.
        writers = [stack.enter_context(writer) for writer in _writers(plan, paths, metadata)]
        pool = stack.enter_context(ThreadPoolExecutor(threads, "qrun-quantize"))
        stack.callback(pool.shutdown, cancel_futures=True)
        for part, writer in zip(plan.parts, writers, strict=True):
            for tensor in part:
                for n_source_bytes, encoded in _encode(tensor, encoder, pool, threads):
                    writer.write_tensor(tensor.source.name, encoded.raw)
                    if tensor.changes:
                        _count(result, tensor, encoded)
                    done += n_source_bytes
                    if done - forgotten > FORGET_BYTES:
                        tensor.source.forget()
                        forgotten = done
                    if progress:
                        progress(done, total)
                if tensor.changes:
                    loss = result.losses.setdefault(tensor.type, Loss())
                    loss.tensors, loss.n_bytes = loss.tensors + 1, loss.n_bytes + tensor.n_bytes
                tensor.source.forget()
        _complete(writers)
    return result


def file_bytes(plan: Plan, metadata: Metadata = ()) -> int:
    """What the file of a plan that is not split will have, header and all."""
    (writer,) = _writers(plan, [plan.source.path.with_name("never-written")], metadata)
    return writer.n_bytes


def _complete(writers: Sequence[GGUFWriter]) -> None:
    """Give all files their names, or none of them."""
    complete: list[Path] = []
    try:
        for writer in writers:
            writer.close()
            complete.append(writer.path)
    except BaseException:
        for path in complete:
            path.unlink(missing_ok=True)
        raise


def _paths(out: Path, n_parts: int) -> list[Path]:
    if n_parts == 1:
        return [out]
    prefix = str(out.with_suffix("")) if out.suffix == ".gguf" else str(out)
    return [Path(part_name(prefix, no, n_parts)) for no in range(n_parts)]


def _writers(plan: Plan, paths: Sequence[Path], metadata: Metadata) -> list[GGUFWriter]:
    """One for each part, all their tensors described. All metadata is in the first."""
    first = _first_writer(plan, paths[0], metadata)
    writers = [first, *(GGUFWriter(path, first.version) for path in paths[1:])]
    for no, (writer, part) in enumerate(zip(writers, plan.parts, strict=True)):
        if no > 0 and first.alignment != DEFAULT_ALIGNMENT:
            writer.set_metadata(ALIGNMENT_KEY, first.alignment, ValueType.UINT32)
        if len(writers) > 1:
            writer.set_metadata(SPLIT_NO, no, ValueType.UINT16)
            writer.set_metadata(SPLIT_COUNT, len(writers), ValueType.UINT16)
            writer.set_metadata(SPLIT_TENSORS, len(plan.tensors), ValueType.INT32)
        for tensor in part:
            writer.add_tensor(tensor.source.name, tensor.type, tensor.source.shape)
    return writers


def _first_writer(plan: Plan, path: Path, metadata: Metadata) -> GGUFWriter:
    """The metadata of the source, of what is done to it, and what the user sets."""
    writer = plan.source.writer(path)
    if plan.choice.file_type != COPY:
        _, file_type = FILE_TYPES[plan.choice.file_type]
        writer.set_metadata("general.file_type", file_type, ValueType.UINT32)
        writer.set_metadata("general.quantization_version", QUANTIZATION_VERSION, ValueType.UINT32)
    if plan.imatrix:
        writer.set_metadata("quantize.imatrix.file", plan.imatrix.path.name, ValueType.STRING)
        if plan.imatrix.datasets:
            writer.set_metadata("quantize.imatrix.dataset", plan.imatrix.datasets[0], ValueType.STRING)
        writer.set_metadata("quantize.imatrix.entries_count", len(plan.imatrix.values), ValueType.UINT32)
        writer.set_metadata("quantize.imatrix.chunks_count", max(plan.imatrix.chunks, 0), ValueType.UINT32)
    for key, value, type in metadata:
        writer.set_metadata(key, value, type)
    return writer


def _encode(
    tensor: PlannedTensor, encoder: Encoder, pool: ThreadPoolExecutor, threads: int
) -> Iterator[tuple[int, Encoded]]:
    """A tensor's bytes, chunk by chunk, each with the number of bytes that it was made from."""
    source = tensor.source
    if not source.n_bytes:
        return
    chunk_rows = max(1, CHUNK_WEIGHTS // source.row)
    if not tensor.changes:
        chunk_rows = max(1, COPY_BYTES * source.n_rows // source.n_bytes)
    experts = 1 if tensor.importance is None else len(tensor.importance)
    expert_rows = source.n_rows // experts

    def work(start: int, end: int, expert: int) -> tuple[int, Encoded]:
        n_bytes = source.n_bytes // source.n_rows * (end - start)
        if not tensor.changes:
            return n_bytes, Encoded(source.raw(start, end))
        importance = None if tensor.importance is None else tensor.importance[expert]
        if tensor.made is not None:
            return n_bytes, _made(tensor, tensor.made, importance, start, end)
        return n_bytes, encoder.encode(source.floats(start, end), tensor.type, importance)

    waiting: deque[Future[tuple[int, Encoded]]] = deque()
    for expert in range(experts):
        first, last = expert * expert_rows, (expert + 1) * expert_rows
        for start in range(first, last, chunk_rows):
            waiting.append(pool.submit(work, start, min(start + chunk_rows, last), expert))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _made(
    tensor: PlannedTensor, path: Path, importance: NDArray[np.float32] | None, start: int, end: int
) -> Encoded:
    """Rows that were rounded before, and what that has cost."""
    row_bytes = tensor.n_bytes // tensor.source.n_rows
    raw = np.fromfile(path, np.uint8, (end - start) * row_bytes, offset=start * row_bytes)
    weights = tensor.source.rows(start, end)
    error, energy = np.square(weights - dequantize(raw, tensor.type, weights.shape)), np.square(weights)
    matters = np.float32(1) if importance is None else importance
    sums = [part.sum(dtype=np.float64) for part in (error, energy, error * matters, energy * matters)]
    return Encoded(raw, *map(float, sums))


def _count(result: Result, tensor: PlannedTensor, encoded: Encoded) -> None:
    if not np.isfinite(encoded.error) or not np.isfinite(encoded.energy):
        raise tensor.source.error(f"has weights that are not finite, or too large for {tensor.type.name}")
    loss = result.losses.setdefault(tensor.type, Loss())
    loss.error += encoded.error
    loss.energy += encoded.energy
    loss.weighted_error += encoded.weighted_error
    loss.weighted_energy += encoded.weighted_energy

