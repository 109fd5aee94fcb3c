"""How much a model's predictions suffer from errors in each of its tensors, measured.

For small errors the Kullback-Leibler divergence of the predictions is quadratic in them, and errors of different
tensors, which have nothing to do with each other, add up. So for each tensor

    KL  =  slope * error        error: sum of importance * (weight - rounded weight)^2

and the slope is found by rounding the tensor coarsely, with all others as they are, and measuring KL. Neighbouring
layers have like slopes: tensors of one kind in a few layers are rounded together where there are many layers.

The model that is measured lies in a working file, mapped by its runtime; rounded rows are written over those in the
file, and afterwards what was there. So nothing is loaded twice, and it works for whatever can be run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from qrun.engine.judging.divergence import Predicted
from qrun.engine.judging.scoring import Chunks
from qrun.engine.program.runtime import Runtime
from qrun.engine.quantize.allocation import Option
from qrun.engine.quantize.encoder import Encoder
from qrun.engine.quantize.imatrix import Imatrix
from qrun.engine.quantize.mixes import NEED_IMPORTANCE, category, fitting_type, is_quantisable, layer_of
from qrun.engine.quantize.source import Source, SourceTensor
from qrun.formats import GGUFReader, TensorInfo, TensorType
from qrun.formats.blocks import BLOCK_SIZES, dequantize

F32Array = NDArray[np.float32]

# What a tensor is rounded to while it is measured: coarse, so that KL stands out of the noise of float arithmetic.
PROBE = TensorType.Q3_K
# Rows are probed alike: groups of layers are made so that there are about so many probes.
PROBES = 72
# Bytes of the probabilities that are held, and tokens that are scored at most.
PROBABILITY_BYTES, SCORED = 1 << 28, 1024
# Weights of a tensor by which the errors of types are estimated.
SAMPLED = 1 << 19
CHUNK = 1 << 20

# The types that a mix is made of, if nobody says otherwise.
CANDIDATES = (
    TensorType.Q2_K, TensorType.Q3_K, TensorType.IQ4_XS, TensorType.IQ4_NL, TensorType.Q4_0, TensorType.Q4_K,
    TensorType.Q4_1, TensorType.Q5_0, TensorType.Q5_K, TensorType.Q5_1, TensorType.Q6_K, TensorType.Q8_0,
)  # fmt: skip
LOW_CANDIDATES = (
    TensorType.IQ2_XXS, TensorType.IQ2_XS, TensorType.IQ2_S, TensorType.IQ3_XXS, TensorType.IQ3_S,
)  # fmt: skip
LOW_BITS = 4.0  # below so many bits a weight on average


def candidates_for(bits_per_weight: float) -> list[TensorType]:
    """The types that a mix of a size is made of; those of few bits, which take longer to run, where they are needed."""
    return [*CANDIDATES, *(LOW_CANDIDATES if bits_per_weight < LOW_BITS else ())]


class Predictions:
    """What a runtime predicts for some samples: kept once, and compared with what it predicts later."""

    def __init__(self, runtime: Runtime, samples: Chunks) -> None:
        most = max(1, min(SCORED, PROBABILITY_BYTES // (4 * runtime.n_vocab)))
        self._samples, self._runtime = samples, runtime
        self._scored = max(1, min(samples.size // 2, most // len(samples)))
        self._kept = [Predicted.of(logits) for logits in self._logits()]

    def _logits(self) -> Iterable[F32Array]:
        for sample in self._samples:
            with closing(self._runtime.sequence()) as sequence:
                self._runtime.evaluate(sequence, sample[: -self._scored], logits="none")
                logits = self._runtime.evaluate(sequence, sample[-self._scored :], logits="all")
                assert logits is not None
                yield logits

    def divergence(self) -> float:
        """The mean KL of what the runtime predicts now from what was kept, in nats."""
        pairs = zip(self._kept, self._logits(), strict=True)
        return float(np.concatenate([kept.divergences(logits) for kept, logits in pairs]).mean())


def quantised_names(source: Source) -> list[str]:
    """The tensors that a mix has a choice for."""
    return [name for name, tensor in source.tensors.items() if is_quantisable(name, tensor.shape, tensor.type)]


def groups(source: Source, n_layers: int) -> list[list[str]]:
    """Tensors that are probed together: of one kind and shape, in neighbouring layers; first and last layers alone."""
    names = quantised_names(source)
    kinds: dict[tuple[str, tuple[int, ...]], dict[int, str]] = {}
    for name in names:
        layer = layer_of(name)
        kind = name if layer < 0 else name.split(".", 2)[2]
        kinds.setdefault((kind, source.tensors[name].shape), {})[layer] = name
    spare = max(1, PROBES // max(1, len(kinds)) - 2)
    band = max(1, -(-max(n_layers - 2, 1) // spare))
    result: list[list[str]] = []
    for by_layer in kinds.values():
        bands: dict[int, list[str]] = {}
        for layer, name in sorted(by_layer.items()):
            edge = layer <= 0 or layer >= n_layers - 1
            bands.setdefault(-1 - layer if edge else (layer - 1) // band, []).append(name)
        result += bands.values()
    return result


def probe_type(row: int) -> TensorType:
    return fitting_type(PROBE, row)


def rounded(
    tensor: SourceTensor, type: TensorType, importance: F32Array | None, encoder: Encoder, start: int, end: int
) -> tuple[F32Array, float]:
    """Rows of a tensor as they come back from `type`, and their error."""
    experts = 1 if importance is None else len(importance)
    per_expert = tensor.n_rows // experts
    parts: list[F32Array] = []
    error = 0.0
    while start < end:
        expert = start // per_expert
        stop = min(end, (expert + 1) * per_expert)
        encoded = encoder.encode(tensor.floats(start, stop), type, None if importance is None else importance[expert])
        parts.append(dequantize(encoded.raw, type, (stop - start, tensor.row)))
        error += encoded.weighted_error
        start = stop
    return np.concatenate(parts), error


class Prober:
    """Measures one group of tensors after the other, in a working file that a runtime has mapped."""

    def __init__(
        self, source: Source, imatrix: Imatrix, working: Path, reader: GGUFReader, predictions: Predictions,
        encoder: Encoder,
    ) -> None:  # fmt: skip
        self._source, self._imatrix, self._encoder = source, imatrix, encoder
        self._working, self._infos, self._predictions = working, reader.tensors, predictions

    def slope(self, names: Sequence[str]) -> float:
        """KL for each unit of error of some tensors. They are as they were afterwards."""
        error = 0.0
        before = {name: self._infos[name].raw.tobytes() for name in names}
        with open(self._working, "r+b") as file:
            try:
                for name in names:
                    error += self._round(file, self._source.tensors[name], self._infos[name])
                file.flush()
                divergence = self._predictions.divergence()
            finally:
                for name in names:
                    file.seek(self._infos[name].offset)
                    file.write(before[name])
                file.flush()
        if not np.isfinite(divergence):
            raise ValueError(f"{self._source.path}: with {names[0]} rounded, its predictions are not finite numbers")
        return divergence / error if error > 0 else 0.0

    def _round(self, file: BinaryIO, tensor: SourceTensor, info: TensorInfo) -> float:
        importance = self._imatrix.importance(tensor.name, tensor.shape)
        type, error = probe_type(tensor.row), 0.0
        for start, end in pieces(tensor):
            rows, part = rounded(tensor, type, importance, self._encoder, start, end)
            error += part
            self._write(file, info, start, rows)
        return error

    def _write(self, file: BinaryIO, info: TensorInfo, start: int, rows: F32Array) -> None:
        block_size, block_bytes = BLOCK_SIZES[info.type]
        file.seek(info.offset + start * (rows.shape[1] // block_size * block_bytes))
        file.write(self._encoder.encode(rows, info.type).raw.data)


def pieces(tensor: SourceTensor) -> Iterable[tuple[int, int]]:
    step = max(1, CHUNK // tensor.row)
    return ((start, min(start + step, tensor.n_rows)) for start in range(0, tensor.n_rows, step))


def options(
    tensor: SourceTensor, importance: F32Array | None, types: Sequence[TensorType], encoder: Encoder
) -> list[Option]:
    """The types that fit, with their bytes and errors: those of some rows, evenly spread, times their share."""
    chosen: list[Option] = []
    n_weights = tensor.n_rows * tensor.row
    blocks = max(1, min(tensor.n_rows, SAMPLED // tensor.row) // 8)
    starts = np.unique(np.linspace(0, max(0, tensor.n_rows - 8), blocks).astype(int))
    for type in types:
        block_size, block_bytes = BLOCK_SIZES[type]
        if tensor.row % block_size or (importance is None and type in NEED_IMPORTANCE):
            continue
        error, seen = 0.0, 0
        for start in starts:
            end = min(int(start) + 8, tensor.n_rows)
            error += rounded(tensor, type, importance, encoder, int(start), end)[1]
            seen += end - int(start)
        n_bytes = n_weights // block_size * block_bytes
        chosen.append(Option(type, n_bytes, error * tensor.n_rows / max(seen, 1)))
    return chosen


def allowed(name: str, types: Sequence[TensorType]) -> list[TensorType]:
    """Those of the types that a tensor may have: embeddings and heads get no importance, and no less than two bits."""
    if category(name) in ("embedding", "output"):
        return [type for type in types if type not in NEED_IMPORTANCE]
    return list(types)


class Journal:
    """Slopes that have been measured, kept line by line in a file, so that a broken run goes on where it stopped."""

    def __init__(self, path: Path, key: str) -> None:
        """key: of all that a slope depends on; lines of another are not used."""
        self._path, self._key = path, key
        self.found: dict[str, float] = {}
        if path.is_file():
            for line in path.read_text("utf-8", "replace").splitlines():
                self._take(line)

    def _take(self, line: str) -> None:
        try:
            entry: Any = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            return
        if isinstance(entry, dict) and entry.get("key") == self._key:
            self.found[str(entry["name"])] = float(entry["slope"])

    def add(self, name: str, slope: float) -> None:
        self.found[name] = slope
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"key": self._key, "name": name, "slope": slope}) + "\n")
            file.flush()
            os.fsync(file.fileno())
