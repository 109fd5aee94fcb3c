"""Converting a model by what texts show of it: importance, and a mix whose types lose least at a size.

What is found on the way is kept in a folder beside the result until that is complete: the model in Q8_0, by which all
is measured, the importance matrix, and what each tensor's errors do. A run that was broken off goes on from there.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qrun.engine.native.compiler import Progress as Compiling
from qrun.engine.native.compiler import default_target
from qrun.engine.native.cpu_count import available_cores
from qrun.engine.program.observing import Observation
from qrun.engine.program.runtime import Runtime
from qrun.engine.quantize import sensitivity
from qrun.engine.quantize.allocation import Option, allocate, least_bytes
from qrun.engine.quantize.awq import ScaledSource, Search, foldings
from qrun.engine.quantize.convert import Metadata, Plan, PlannedTensor, convert, file_bytes, plan
from qrun.engine.quantize.encoder import Encoder
from qrun.engine.quantize.gptq import GPTQ_TYPES, Gptq, factor
from qrun.engine.quantize.imatrix import Imatrix, read_imatrix, unused_experts, write_imatrix
from qrun.engine.quantize.importance import observe
from qrun.engine.quantize.measure_folder import SCALED, MeasureFolder
from qrun.engine.quantize.mixes import FILE_TYPES, FLOATS, Choice, Facts, layer_of
from qrun.engine.quantize.moments import Moments, MomentsMaker
from qrun.engine.quantize.samples import Samples
from qrun.engine.quantize.source import Source
from qrun.engine.quantize.stretches import Relay, starts
from qrun.formats import GGUFReader, TensorType
from qrun.formats.blocks import dequantize
from qrun.formats.errors import QrunError
from qrun.formats.gguf.file import ALIGNMENT_KEY, DEFAULT_ALIGNMENT, align
from qrun.formats.samples import samples as file_samples
from qrun.formats.whole_file import write_whole
from qrun.models import build_graph, check_goes_on
from qrun.models.graph import Graph, Linear

F32Array = NDArray[np.float32]

# Samples by which slopes are measured, at most: each of some seventy probes reads them all.
PROBE_SAMPLES = 4
WORKING_TYPE = "Q8_0"
# Of the second moments that are held at a time, where layers are taken together.
MOMENT_BYTES = 1 << 30
# What it takes to round the matrices of a layer, in passes of the samples through it.
PASSES = 2

Stage = Callable[[str], "Reporter"]
Reporter = Callable[[int, int], None]


class TooSmall(QrunError, ValueError):
    """No file has so few bytes."""


def silent(stage: str) -> Reporter:
    """Reports nothing."""
    return lambda done, total: None


def check_not_quantised(source: Source, allow_requantize: bool) -> None:
    """Raises ValueError, naming a tensor, if the source is quantised already and that is not allowed."""
    for name in sensitivity.quantised_names(source):
        type = source.tensors[name].type
        if type not in FLOATS and not allow_requantize:
            raise ValueError(
                f"{source.path}: {name} is quantised already ({type.name}), and quantising again loses more; "
                "calibrate the original, or allow it with --allow-requantize"
            )


@dataclass(frozen=True)
class Calibration:
    """Where it is done, and with what.

    stage(name) gives a function that is told how far that stage is. variant: what else the source is than its files,
    the scales of adapters that are merged into it, say.
    """

    source: Source
    samples: Samples
    folder: Path
    threads: int | None = None
    allow_requantize: bool = False
    stage: Stage = silent
    compiling: Compiling | None = None
    notice: Callable[[str], None] = lambda text: None
    variant: str = ""

    @classmethod
    def folder_for(cls, out: Path) -> Path:
        """Where the work on a result lies until that is complete."""
        return out.with_name(f".{out.name}.calibration")

    @property
    def key(self) -> str:
        """Of all that is measured: the source and the texts."""
        digest = hashlib.sha256((self.samples.digest + self.variant).encode())
        for file in self.source.files:
            for part in file_samples(file):
                digest.update(part)
        return digest.hexdigest()[:16]

    @cached_property
    def measures(self) -> MeasureFolder:
        """Its folder."""
        return MeasureFolder(self.folder, self.key)

    @property
    def working(self) -> Path:
        """The model in Q8_0, made if it is not there."""
        path = self.folder / "working.gguf"
        if not path.is_file():
            planned = plan(self.source, Choice(WORKING_TYPE, pure=True), allow_requantize=True)
            report = self.stage("preparing")
            convert(planned, path, threads=self.threads, progress=report, compiling=self.compiling)
        return path

    @contextmanager
    def runtime(self, path: Path, *, observing: bool = False) -> Iterator[tuple[Runtime, GGUFReader]]:
        """A model at work, on samples. observing: see `Runtime`."""
        with GGUFReader(path) as reader:
            graph = build_graph(reader, self.samples.taken.size)
            check_goes_on(graph, path)
            with self._at_work(graph, observing=observing) as runtime:
                yield runtime, reader

    @contextmanager
    def _at_work(
        self, graph: Graph, keep: Callable[[str], bool] | None = None, *, observing: bool = False
    ) -> Iterator[Runtime]:
        runtime = Runtime(
            graph, threads=self.threads or available_cores(), context=graph.context, progress=self.compiling,
            target=default_target(folded=True), observe=observing or keep is not None, keep=keep,
        )  # fmt: skip
        try:
            yield runtime
        finally:
            runtime.close()

    def imatrix(self) -> Imatrix:
        """The importance of inputs on the samples that were taken. ValueError if inputs are not finite numbers."""
        path = self.folder / "imatrix.gguf"
        if not path.is_file():
            taken = self.samples.taken
            with self.runtime(self.working, observing=True) as (runtime, _):
                sums = observe(runtime, taken, self.stage("importance"))
            write_imatrix(path, sums, dataset=", ".join(self.samples.names), chunks=len(taken), chunk_size=taken.size)
            if unused := unused_experts(sums):
                self.notice(f"{unused} of the experts' matrices were never used: rounded as if all inputs were alike")
        return read_imatrix(path)

    def slopes(self, imatrix: Imatrix) -> dict[str, float]:
        """What errors of each tensor do: KL for each unit (see `sensitivity`)."""
        journal = sensitivity.Journal(self.folder / "slopes", self.key)
        groups = sensitivity.groups(self.source, Facts.of(self.source.metadata, True).n_layers)
        if all(name in journal.found for names in groups for name in names):
            return journal.found
        taken = self.samples.taken
        few = type(taken)(taken.tokens, taken.size, min(PROBE_SAMPLES, len(taken)), taken.bos)
        report = self.stage("sensitivity")
        with self.runtime(self.working) as (runtime, reader), self._probing():
            predictions = sensitivity.Predictions(runtime, few)
            rows = {self.source.tensors[name].row for names in groups for name in names}
            types = {sensitivity.probe_type(row) for row in rows} | {info.type for info in reader.tensors.values()}
            encoder = Encoder(types, progress=self.compiling)
            prober = sensitivity.Prober(self.source, imatrix, self.working, reader, predictions, encoder)
            for done, names in enumerate(groups):
                report(done, len(groups))
                if not all(name in journal.found for name in names):
                    slope = prober.slope(names)
                    for name in names:
                        journal.add(name, slope)
            report(len(groups), len(groups))
        return journal.found

    @contextmanager
    def _probing(self) -> Iterator[None]:
        """Within it the working file changes: a mark says so, and stays where that was broken off."""
        mark = self.folder / "probing"
        mark.touch()
        yield
        mark.unlink()

    def rounded(self, planned: Plan) -> Plan:
        """The plan with matrices of layers rounded by GPTQ, where their types and the memory allow that.

        Layers are taken one by one, or in bands (see `_bands`); inputs are those that the model has with all bands
        before rounded. Experts are left to plain rounding.
        """
        todo = {
            tensor.source.name: tensor for tensor in planned.tensors
            if tensor.changes and tensor.type in GPTQ_TYPES and len(tensor.source.shape) == 2
            and layer_of(tensor.source.name) >= 0
        }  # fmt: skip
        widest = max((tensor.source.row for tensor in todo.values()), default=0)
        if (n_tokens := len(self.samples.taken) * self.samples.taken.size) < widest:
            self.notice(
                f"{n_tokens} tokens of text are few for matrices of {widest} inputs: of what it does not show, inputs "
                "count as independent of each other; more text would help"
            )
        what = "tokens balanced", [(name, tensor.type) for name, tensor in todo.items()]
        digest = hashlib.sha256(repr(what).encode()).hexdigest()[:8]
        files = {name: self.folder / f"rounded-{digest}-{i}" for i, name in enumerate(todo)}
        copy = self.folder / "rounded.gguf"
        copy.unlink(missing_ok=True)
        importance = planned.imatrix.values if planned.imatrix else {}
        sizes = {name: float(values.sum(dtype=np.float64)) for name, values in importance.items()}
        with self._banded(self.working, todo, digest) as (_, relay):
            self._check_room(planned, relay, [path for path in files.values() if path.is_file()])
        shutil.copyfile(self.working, copy)
        gptq = Gptq({tensor.type for tensor in todo.values()}, progress=self.compiling)
        writer = RowWriter(copy, Encoder([TensorType.Q8_0], progress=self.compiling))
        kept: set[str] = set()
        with self._banded(copy, todo, digest) as (bands, relay):
            progress = Steps(self.stage("rounding"), (2 + PASSES) * len(bands) * len(self.samples.taken))
            for number, band in enumerate(bands):
                missing = [name for name in band if not files[name].is_file()]
                if missing:
                    relay.reach(number, progress.step)
                    for sharing, moments in self._moments(relay, number, missing, progress, sizes):
                        factors = factor(moments)
                        if factors is None:
                            self.notice(f"{sharing[0]}: nothing is known of its inputs: weights are rounded one by one")
                            continue
                        for name in sharing:
                            tensor = todo[name]
                            with ThreadPoolExecutor(self.threads or available_cores(), "qrun-round") as pool:
                                rows, n_rows = tensor.source.rows, tensor.source.n_rows
                                raw = gptq.round(rows, n_rows, tensor.type, moments, factors, pool)
                            write_whole(files[name], raw.tobytes())
                            tensor.source.forget()
                            progress.step(PASSES * len(self.samples.taken) / len(missing))
                for name in band:
                    if files[name].is_file():
                        kept.add(name)
                        writer.write(name, files[name], todo[name].type)
                progress.reach((2 + PASSES) * (number + 1) * len(self.samples.taken))
            relay.clean()
        copy.unlink()

        def as_made(tensor: PlannedTensor) -> PlannedTensor:
            name = tensor.source.name
            return replace(tensor, made=files[name]) if name in kept else tensor

        return replace(planned, parts=[[as_made(tensor) for tensor in part] for part in planned.parts])

    def _check_room(self, planned: Plan, relay: Relay, there: Collection[Path]) -> None:
        """Raises OSError if the disk is too small for rounding what the relay is for, and for two results. there: what
        is rounded already."""
        # What goes into a band is made from what went into one before.
        needed = self.working.stat().st_size + 2 * relay.largest_file + 3 * planned.n_bytes
        needed -= sum(path.stat().st_size for path in there)
        if (free := shutil.disk_usage(self.folder).free) < needed:
            raise OSError(
                f"{self.folder}: the disk has {free / 1e9:.1f} GB free, and rounding needs {needed / 1e9:.1f} GB"
            )

    @contextmanager
    def _banded(self, path: Path, names: Collection[str], digest: str) -> Iterator[tuple[list[list[str]], Relay]]:
        """Some matrices in bands, and the samples on their way through the model that lies at `path`.

        digest: of what is done with the matrices. The files for what goes into the bands are named by it; those of
        something else go: they are large, and it may never be asked for again.
        """
        self.measures.forget_entering(digest)
        with GGUFReader(path) as reader:
            graph = build_graph(reader, self.samples.taken.size)
            bands = self._bands(graph, names)
            yield bands, Relay(graph, bands, self.samples.taken, self.folder / f"entering-{digest}", self._at_work)

    def _bands(self, graph: Graph, names: Collection[str]) -> list[list[str]]:
        """Names of matrices that the graph uses once, in the order of the layers. Each layer is a band; but those
        between which the graph cannot be cut, so that all before them is computed again, are one as long as their
        moments fit into MOMENT_BYTES."""
        used = Counter(each.weight.name for each in graph.operations if isinstance(each, Linear))
        inputs = {each.weight.name: each.x.id for each in graph.operations if isinstance(each, Linear)}
        layers: dict[int, list[str]] = {}
        for name in inputs:
            if name in names and used[name] == 1:
                layers.setdefault(layer_of(name), []).append(name)
        alone = list(layers.values())
        begin = starts(graph, alone)
        bands: list[list[str]] = []
        for i, layer in enumerate(alone):
            together = [*bands[-1], *layer] if i and begin[i] is begin[i - 1] else layer
            widths = {inputs[name]: self.source.tensors[name].row for name in together}
            if together is not layer and sum(map(Moments.bytes_for, widths.values())) <= MOMENT_BYTES:
                bands[-1] = together
            else:
                bands.append(layer)
        return bands

    def _moments(
        self, relay: Relay, band: int, names: Collection[str], progress: Steps,
        sizes: Mapping[str, float] | None = None,
    ) -> Iterator[tuple[list[str], F32Array]]:  # fmt: skip
        """The second moments of some tensors' inputs, each with those that share it. ValueError if they are not finite.

        sizes: of a token's inputs, the mean of their squares' sum; then tokens are `balanced` by it.
        """
        seen: list[tuple[list[str], Moments]] = []

        with closing(MomentsMaker(self.threads, self.compiling)) as maker:

            def take(observations: Sequence[Observation]) -> None:
                if not seen:
                    seen.extend((each.names, maker.sums(each.sums.shape[1])) for each in observations)
                for observation, (sharing, sums) in zip(observations, seen, strict=True):
                    rows = observation.sums[: int(observation.counts[0])]
                    sums.add(rows if sizes is None else balanced(rows, sizes.get(sharing[0], 0.0)))

            relay.observe(band, names, take, progress.step)
            for _, sums in seen:
                sums.flush()
        while seen:
            sharing, sums = seen.pop(0)  # and its memory goes with it
            matrix = sums.matrix()
            del sums
            if not np.isfinite(matrix).all():
                raise ValueError(f"the inputs of {sharing[0]} are not finite numbers: the model is broken")
            yield sharing, matrix

    def scaled(self, planned: Plan) -> ScaledSource:
        """The source with scales for the inputs of matrices, each where the graph allows it (see `awq`).

        Inputs are those of the model as it is. Bands are those of `rounded`.
        """
        types = {
            tensor.source.name: tensor.type for tensor in planned.tensors
            if tensor.changes and tensor.type not in FLOATS and len(tensor.source.shape) == 2
            and layer_of(tensor.source.name) >= 0
        }  # fmt: skip
        with GGUFReader(self.working) as reader:
            graph = build_graph(reader, self.samples.taken.size)
            places = [place for place in foldings(graph, self.source.tensors) if types.keys() & set(place.columns)]
        # Not that of `rounded` for the same types: what goes into a layer is the original's here.
        digest = hashlib.sha256(repr(("scales", sorted(types.items()))).encode()).hexdigest()[:8]
        files = {place: self.folder / f"scales-{digest}-{i}" for i, place in enumerate(places)}
        firsts = {next(name for name in place.columns if name in types): place for place in places}
        search = Search(types, Encoder(set(types.values()), progress=self.compiling), self.source)
        with self._banded(self.working, firsts, digest) as (bands, relay):
            progress = Steps(self.stage("scales"), (2 + PASSES) * len(bands) * len(self.samples.taken))
            for number, band in enumerate(bands):
                missing = [name for name in band if not files[firsts[name]].is_file()]
                if missing:
                    relay.reach(number, progress.step)
                    for sharing, moments in self._moments(relay, number, missing, progress):
                        for name in sharing:
                            place = firsts[name]
                            found = search.scales(place, moments)
                            write_whole(files[place], b"" if found is None else found.tobytes())
                            progress.step(PASSES * len(self.samples.taken) / len(missing))
                progress.reach((2 + PASSES) * (number + 1) * len(self.samples.taken))
            relay.clean()
        kept = [(place, np.fromfile(path, np.float32)) for place, path in files.items() if path.is_file()]
        return ScaledSource(self.source, [(place, scales) for place, scales in kept if len(scales)])

    def of_scaled(self, source: ScaledSource) -> Calibration:
        """Where the model with these scales is rounded column by column."""
        digest = hashlib.sha256(b"".join(name.encode() + source.columns[name].tobytes() for name in source.columns))
        result = replace(self, source=source, folder=self.folder / SCALED, variant=self.variant + digest.hexdigest())
        result.folder.mkdir(exist_ok=True)
        result.measures.prepare()
        return result

    def mix(
        self, imatrix: Imatrix, n_bytes: int, types: Sequence[TensorType], metadata: Metadata = ()
    ) -> Choice:
        """The types that lose least in a file of so many bytes. Raises TooSmall if no file is as small."""
        errors = self._errors(imatrix, types)
        kept = {name: tensor.type for name, tensor in self.source.tensors.items() if name not in errors}
        # The header says the types, in as many bytes whichever they are.
        first = {name: options[0] for name, options in errors.items()}
        rest = self._bytes_of(kept, first, imatrix, metadata)
        rest -= sum(option.n_bytes for option in first.values())
        if (least := least_bytes(errors) + rest) > n_bytes:
            raise TooSmall(
                f"{self.source.path}: with these types the smallest file has {least} bytes, and {n_bytes} are asked for"
            )
        slopes = self.slopes(imatrix)
        losses = {
            name: [replace(option, loss=slopes[name] * option.loss) for option in options]
            for name, options in errors.items()
        }
        return _as_choice(kept, allocate(losses, n_bytes - rest))

    def _errors(self, imatrix: Imatrix, types: Sequence[TensorType]) -> dict[str, list[Option]]:
        """What each tensor can be, with its error in the place of the loss. Tensors begin at multiples of the file's
        alignment, so that their bytes are counted up to there."""
        alignment = self.source.metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        encoder = Encoder(types, progress=self.compiling)
        names = sensitivity.quantised_names(self.source)
        report = self.stage("types")
        result: dict[str, list[Option]] = {}
        for done, name in enumerate(names):
            report(done, len(names))
            tensor = self.source.tensors[name]
            importance = imatrix.importance(name, tensor.shape)
            found = sensitivity.options(tensor, importance, sensitivity.allowed(name, types), encoder)
            if not found:
                found = [Option(TensorType.F16, 2 * tensor.n_rows * tensor.row, 0.0)]
            result[name] = [replace(option, n_bytes=align(option.n_bytes, alignment)) for option in found]
        report(len(names), len(names))
        return result

    def _bytes_of(
        self, kept: Mapping[str, TensorType], chosen: Mapping[str, Option], imatrix: Imatrix, metadata: Metadata
    ) -> int:
        return file_bytes(plan(self.source, _as_choice(kept, chosen), imatrix=imatrix, allow_requantize=True), metadata)


def _as_choice(kept: Mapping[str, TensorType], chosen: Mapping[str, Option]) -> Choice:
    """The file says that it is of the type that most of its bytes are of."""
    types = dict(kept) | {name: option.type for name, option in chosen.items()}
    sizes: dict[TensorType, int] = {}
    for option in chosen.values():
        sizes[option.type] = sizes.get(option.type, 0) + option.n_bytes
    most = max(sizes, key=lambda type: (sizes[type], type)) if sizes else TensorType.F16
    names = [name for name, (base, _) in FILE_TYPES.items() if base == most]
    return Choice(names[0] if names else "F16", types=types)


class Steps:
    """Tells how far something is whose parts take different times."""

    def __init__(self, report: Reporter, total: int) -> None:
        self._report, self._total, self._done = report, total, 0.0

    def step(self, size: float = 1) -> None:
        """So much more is done."""
        self.reach(self._done + size)

    def reach(self, done: float) -> None:
        """So much is done."""
        self._done = done
        self._report(min(int(done), self._total), self._total)


class RowWriter:
    """Puts rounded tensors into a working file."""

    def __init__(self, path: Path, encoder: Encoder) -> None:
        self._path, self._encoder = path, encoder
        with GGUFReader(path) as reader:
            self._places = {name: (info.offset, info.type, info.shape) for name, info in reader.tensors.items()}

    def write(self, name: str, rounded: Path, type: TensorType) -> None:
        """rounded: a file of the tensor's bytes in `type`."""
        offset, working_type, shape = self._places[name]
        rows = dequantize(np.fromfile(rounded, np.uint8), type, shape)
        with open(self._path, "r+b") as file:
            file.seek(offset)
            file.write(self._encoder.encode(rows, working_type).raw.data)


def nearest_mix(source: Source, imatrix: Imatrix, n_bytes: int, allow_requantize: bool) -> Plan | None:
    """The plan of the largest named mix that takes no more bytes: what a result is measured against."""
    best: Plan | None = None
    for name in FILE_TYPES:
        try:
            planned = plan(source, Choice(name), imatrix=imatrix, allow_requantize=allow_requantize)
        except ValueError:  # it needs importance where there is none
            continue
        if planned.n_bytes <= n_bytes and (best is None or planned.n_bytes > best.n_bytes):
            best = planned
    return best


def balanced(rows: F32Array, mean_size: float) -> F32Array:
    """Rows [n, width] such that half of what they weigh goes by the square of their length, as the error that an input
    leaves does, and half to every row alike. mean_size: the mean square of the length; 0 if it is not known.

    In some models the inputs of a text's first token are thousands of times as large as all others' (see
    docs/quantising.md): by itself that token would decide how the matrix is rounded, and alike to others it would not
    count, though much depends on it. SmolLM2 in Q4_0, KL on 2,040 tokens: 0.143 by the squares alone, 0.123 all alike,
    0.110 balanced (standard errors of the differences 0.003), 0.162 rounded by importance.
    """
    squares = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
    weights = np.where(squares > 0, 1 / np.where(squares > 0, squares, 1), 0) + (1 / mean_size if mean_size > 0 else 0)
    return (rows * np.sqrt(weights)[:, None]).astype(np.float32)
