"""The part of `qrun convert` that calibrates: importance from one's own texts, and a mix for a size."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click

from qrun.cli.console import CompileProgress, echo, human_bytes, notice, step_bar
from qrun.cli.conversion import default_out, show_plan, show_result, tensor_type, write
from qrun.cli.options import FilePath, Names, Size, said_options
from qrun.formats.whole_file import remove_unfinished

if TYPE_CHECKING:
    from qrun.engine.judging.divergence import Divergence
    from qrun.engine.judging.scoring import Chunks
    from qrun.engine.quantize.calibrated import Calibration
    from qrun.engine.quantize.convert import Metadata, Plan, Result
    from qrun.engine.quantize.imatrix import Imatrix
    from qrun.engine.quantize.mixes import Choice
    from qrun.engine.quantize.samples import Samples
    from qrun.engine.quantize.source import Source
    from qrun.formats import TensorType
    from qrun.models.adapter import Lora

METHODS = ("auto", "gptq", "awq", "both", "imatrix")
SCALED = ("awq", "both")

# Options that say nothing where there is no text.
CALIBRATING = {"keep": "--measures", "method": "--method", "samples": "--samples", "length": "--length",
               "seed": "--seed", "judge": "--judge"}  # fmt: skip

# What to do where there is no room for the logits by which a result is judged.
MORE_ROOM = "give fewer --samples, another folder as --measures, or --no-judge"

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class Wishes:
    """What was asked for: texts, how they are cut, and a size in one of three ways."""

    texts: tuple[Path, ...]
    samples: int
    length: int
    seed: int
    bits_per_weight: float | None
    size: int | None
    fit: int | None
    candidates: tuple[str, ...] | None
    keep: Path | None
    method: str
    judge: bool

    @property
    def sized(self) -> bool:
        """Is a size given, instead of a type?"""
        return any(value is not None for value in (self.bits_per_weight, self.size, self.fit))

    def check(
        self, type_name: str | None, imatrix: Path | None, split: int | None, recipe: Sequence[object]
    ) -> None:
        """Raises click.UsageError for what does not go together."""
        sizes = {"--bpw": self.bits_per_weight, "--size": self.size, "--fit": self.fit}
        given = [name for name, value in sizes.items() if value is not None]
        if len(given) > 1:
            raise click.UsageError(f"{' and '.join(given)} do not go together.")
        if given and not self.texts:
            raise click.UsageError(f"{given[0]} needs --calibrate: a text by which tensors are measured.")
        if given and (type_name or any(recipe)):
            raise click.UsageError(f"{given[0]} chooses the types itself.")
        if self.texts and split:
            raise click.UsageError("--calibrate makes one file: it does not go with --split-max-size.")
        if self.texts and imatrix:
            raise click.UsageError("--calibrate finds the importance itself: it does not go with --imatrix.")
        if self.candidates is not None and not given:
            raise click.UsageError("--candidates goes with --bpw, --size or --fit.")
        if not self.texts and (said := said_options(CALIBRATING)):
            raise click.UsageError(f"{said[0]} goes with --calibrate.")


def calibration_options(function: Command) -> Command:
    """Adds --calibrate and what goes with it; the command gets all of it as `calibration`."""

    @functools.wraps(function)
    def gather(*args: Any, **kwargs: Any) -> Any:
        names = [field.name for field in fields(Wishes)]
        return function(*args, calibration=Wishes(**{name: kwargs.pop(name) for name in names}), **kwargs)

    command: Any = gather
    for option in reversed((
        click.option("--calibrate", "texts", type=FilePath(path_type=Path), multiple=True, metavar="TEXT",
                     help="Find the importance of inputs from this text: plain, or JSON lines with \"text\" or "
                          "\"messages\" (.jsonl). May be given several times."),
        click.option("--samples", type=click.IntRange(min=2), default=128, show_default=True, metavar="N",
                     help="Samples of the texts to calibrate by; an eighth as many are held out, to judge by."),
        click.option("--length", type=click.IntRange(min=16), default=512, show_default=True, metavar="TOKENS",
                     help="Tokens in a sample."),
        click.option("--seed", type=int, default=1, show_default=True, help="Which samples are taken."),
        click.option("--method", type=click.Choice(METHODS), default="auto", show_default=True,
                     help="With --calibrate, how weights are rounded: each by itself, its error weighed by the inputs' "
                          "mean squares (imatrix); column by column, each error made good by the columns after it "
                          "(gptq); each by itself, the inputs that matter most with finer steps (awq); or the last two "
                          "together (both). auto is gptq, unless more is lost by it on what is held out."),
        click.option("--bpw", "bits_per_weight", type=click.FloatRange(min=0, min_open=True), metavar="BITS",
                     help="Choose the type of each tensor: what loses least with so many bits for a weight, on "
                          "average."),
        click.option("--size", type=Size(), help="The same for a file of this size at most."),
        click.option("--fit", type=click.IntRange(min=1), metavar="TOKENS",
                     help="The same for the memory that this machine has free, with a context of so many tokens."),
        click.option("--candidates", type=Names(), show_default="K types, legacy types, IQ4_NL and IQ4_XS; those of "
                     "less than four bits too where the size asks for them",
                     help="The types of tensors to choose from."),
        click.option("--measures", "keep", type=FilePath(path_type=Path, file_okay=False), metavar="FOLDER",
                     help="Keep what was found of the model in this folder, for other sizes and types.",
                     show_default="a folder beside OUT, until that is complete"),
        click.option("--judge/--no-judge", default=True, show_default=True,
                     help="With --calibrate, measure at the end what is lost on the samples that were held out."),
    )):  # fmt: skip
        command = option(command)
    result: Command = command
    return result


def convert_calibrated(
    source: Source, path: Path, out: Path, wishes: Wishes, choice: Choice, values: Metadata, *,
    allow_requantize: bool, dry_run: bool, threads: int | None, named: bool, merged: Sequence[Lora],
) -> None:  # fmt: skip
    """Calibrates, converts, and judges. path: of the source. out: the result, or if it was not `named` the source,
    beside which it is to lie. merged: adapters, by which the source is more than what lies at `path`."""
    from qrun.cli.loading import find_original
    from qrun.engine.quantize.calibrated import Calibration, check_not_quantised
    from qrun.engine.quantize.convert import check_target, plan

    check_not_quantised(source, allow_requantize)
    if not named:
        out = default_out(out, label(wishes) if wishes.sized else choice.file_type)
    check_target(source, out)
    samples = read(path, source, wishes.texts, length=wishes.length, samples=wishes.samples, seed=wishes.seed)
    say_samples(samples)
    if dry_run and not wishes.sized:
        show_plan(plan(source, choice, imatrix=unmeasured(source), allow_requantize=allow_requantize))
        return
    calibration = Calibration(
        source, samples, wishes.keep or Calibration.folder_for(out), threads, allow_requantize,
        compiling=CompileProgress(), notice=notice, variant="".join(f"{lora.path}={lora.scale}" for lora in merged),
    )  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(calibration.measures.opened())
        if not wishes.keep:
            stack.enter_context(saying_what_stays(calibration))
        remove_unfinished(out)  # of a run that was killed
        with stage_bars() as stage:
            choice, imatrix = measure(replace(calibration, stage=stage), wishes, choice, values)
        planned = plan(source, choice, imatrix=imatrix, allow_requantize=allow_requantize)
        if dry_run:
            show_plan(planned)
            return
        # What the source is judged by; an adapter that is merged into it is in the working file alone.
        reference = calibration.working if merged else find_original(str(path))
        planned, result, judged = make(calibration, wishes, planned, imatrix, reference, out, values)
        if wishes.keep:
            calibration.measures.clean_up()
        else:
            calibration.measures.clean()
    show_result(planned, result)
    for line in judged:
        echo(line)


def measure(calibration: Calibration, wishes: Wishes, choice: Choice, values: Metadata) -> tuple[Choice, Imatrix]:
    """The importance of inputs, and by it the types for the size that is wished for, if one is. Raises OSError if there
    is no room for what the judging needs."""
    from qrun.cli.against import check_room
    from qrun.formats import GGUFReader, ValueType
    from qrun.formats.tensors import n_weights
    from qrun.models import build_graph
    from qrun.models.adapter import RESCALED

    if wishes.judge:
        held_out, logits = calibration.samples.held_out, calibration.folder / "logits"
        logits.unlink(missing_ok=True)
        with GGUFReader(calibration.working) as reader:
            n_vocab = build_graph(reader, held_out.size).n_vocab
        check_room(calibration.folder, held_out, n_vocab, MORE_ROOM)
    imatrix = calibration.imatrix()
    if wishes.sized:
        if wishes.method in SCALED:
            values = [*values, (RESCALED, True, ValueType.BOOL)]  # which the file will have besides
        budget = budget_of(wishes, calibration.source, calibration, imatrix, values)
        types = candidates(wishes, 8 * budget / max(1, n_weights(calibration.source.tensors.values())))
        choice = calibration.mix(imatrix, budget, types, values)
    return choice, imatrix


def make(
    calibration: Calibration, wishes: Wishes, plain: Plan, imatrix: Imatrix, reference: Path, out: Path,
    values: Metadata,
) -> tuple[Plan, Result, list[str]]:  # fmt: skip
    """Rounds by the method that is wished for, and judges. `out` gets what is best once that is known. Returns its
    plan, what was written, and the lines of a table."""
    from qrun.engine.quantize.calibrated import nearest_mix
    from qrun.engine.quantize.convert import plan
    from qrun.formats.whole_file import move_whole

    planned, threads, allow_requantize = plain, calibration.threads, calibration.allow_requantize
    with stage_bars() as stage:
        calibration = replace(calibration, stage=stage)
        rounding = calibration
        if wishes.method in SCALED:
            scaled = calibration.scaled(planned)
            importance = scaled.importance(imatrix)
            planned = plan(scaled, plain.choice, imatrix=importance, allow_requantize=allow_requantize)
            if wishes.method == "both":
                rounding = calibration.of_scaled(scaled)
        if wishes.method not in ("awq", "imatrix"):
            planned = rounding.rounded(planned)
    name = label(wishes) if wishes.sized else None
    made, beside, kept = (calibration.folder / file for file in ("result.gguf", "named.gguf", "logits"))
    result = write(planned, made, threads, values, name)
    judged: list[str] = []
    if wishes.judge:
        with open(kept, "w+b") as logits:
            judge = Judge(reference, calibration.samples.held_out, logits, threads)
            rows = [judge.row(out.name, planned, made)]
            if wishes.method != "imatrix":
                plainly = write(plain, beside, threads, values, name)
                rows.append(judge.row("rounded plainly", plain, beside))
                if wishes.method == "auto" and rows[1].loss < rows[0].loss:
                    notice("column by column more is lost here: weights are rounded each by itself")
                    move_whole(beside, made)
                    planned, result = plain, plainly
                    rows = [replace(rows[1], name=out.name), replace(rows[0], name="column by column")]
            if wishes.sized and (mix := nearest_mix(plain.source, imatrix, planned.n_bytes, allow_requantize)):
                write(mix, beside, threads, (), mix.choice.file_type)
                rows.append(judge.row(f"{mix.choice.file_type}, rounded plainly", mix, beside))
        judged = table(rows, judge.perplexity)
        beside.unlink(missing_ok=True)
        kept.unlink()
    move_whole(made, out)
    return planned, replace(result, paths=[out]), judged


def unmeasured(source: Source) -> Imatrix:
    """An importance matrix that has all inputs alike. The types of a named mix depend only on whether there is one."""
    import numpy as np

    from qrun.engine.quantize.imatrix import Imatrix

    sizes = {name: math.prod(tensor.shape[:-2]) * tensor.row for name, tensor in source.tensors.items()}
    return Imatrix(source.path, {name: np.ones(size, np.float32) for name, size in sizes.items()})


@contextmanager
def saying_what_stays(calibration: Calibration) -> Iterator[None]:
    """Says at the end where the measures are, if they are there still. A folder without any goes."""
    try:
        yield
    finally:
        folder = calibration.folder
        if folder.is_dir() and not calibration.measures.has_any:
            calibration.measures.clean()
        elif folder.is_dir():
            notice(f"what was measured stays in {folder}, for another run with this result: else remove it")


def label(wishes: Wishes) -> str:
    """What a result is called by its size."""
    if wishes.bits_per_weight is not None:
        return f"{wishes.bits_per_weight:g}bpw"
    return f"{human_bytes(wishes.size).replace(' ', '')}" if wishes.size is not None else f"fit{wishes.fit}"


def read(path: Path, source: Source, texts: Sequence[Path], *, length: int, samples: int, seed: int) -> Samples:
    """The samples, by the model's own tokenizer and template, none longer than what the model was trained for. Raises
    ValueError for a model that predicts nothing."""
    from qrun.cli.loading import check_predicting, find_original
    from qrun.engine import Tokenizer
    from qrun.engine.quantize.samples import read_samples
    from qrun.engine.text.chat_template import ChatTemplate
    from qrun.formats import GGUFReader

    check_predicting(path, source, "by which --calibrate measures: convert it with --type alone")
    trained = source.metadata.get(f"{source.metadata.get('general.architecture')}.context_length")
    if isinstance(trained, int) and 1 < trained < length:
        notice(f"samples have {trained} tokens: the model was not trained for {length}")
        length = trained
    with GGUFReader(find_original(str(path))) as reader:
        tokenizer = Tokenizer.load(reader)
        template = ChatTemplate.from_reader(reader, tokenizer, tokenizer.special_spellings)
        return read_samples(texts, tokenizer, template, length=length, limit=samples, seed=seed)


def say_samples(samples: Samples) -> None:
    """How much text there is, and what of it is not used."""
    taken, held_out = samples.taken, samples.held_out
    notice(f"calibrating by {len(taken)} samples of {taken.size} tokens; {len(held_out)} are held out to judge by")
    if samples.repeated:
        notice(f"{samples.repeated} samples repeat others, and were left out")


@contextmanager
def stage_bars() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """The bars of stages, by name: each takes the place of the one before."""
    with ExitStack() as bars:

        def stage(name: str) -> Callable[[int, int], None]:
            bars.close()
            update = bars.enter_context(step_bar(name))
            return lambda done, total: update(done, total)

        yield stage


def budget_of(wishes: Wishes, source: Source, calibration: Calibration, imatrix: Imatrix, values: Metadata) -> int:
    """Bytes of the whole file. Bits are those of the tensors alone: the header comes on top."""
    from qrun.engine.quantize.convert import file_bytes, plan
    from qrun.engine.quantize.mixes import Choice

    if wishes.size is not None:
        return wishes.size
    if wishes.fit is not None:
        return room_for_file(calibration, wishes.fit)
    assert wishes.bits_per_weight is not None
    planned = plan(source, Choice("Q8_0", pure=True), imatrix=imatrix, allow_requantize=True)
    header = file_bytes(planned, values) - planned.n_bytes
    return int(wishes.bits_per_weight * planned.n_weights / 8) + header


def room_for_file(calibration: Calibration, context: int) -> int:
    """What is left of this machine's free memory for a file, beside keys, values and all else. ValueError if nothing
    is."""
    from qrun.engine.native.machine import MemoryNeed, memory
    from qrun.engine.program.kv_cache import context_bytes
    from qrun.formats import GGUFReader
    from qrun.models import build_graph

    with GGUFReader(calibration.working) as reader:
        graph = build_graph(reader, context)
        cache = context_bytes(graph, "f16", context)
    room = memory().room
    if room is None:
        raise ValueError("this system does not say how much memory is free: give --size instead of --fit")
    left = room - MemoryNeed(0, cache).total
    if left <= 0:
        raise ValueError(
            f"{human_bytes(room)} of memory are free, and a context of {context} tokens takes {human_bytes(cache)}"
        )
    notice(f"{human_bytes(left)} for the file: {human_bytes(room)} of memory are free, the cache takes "
           f"{human_bytes(cache)}")  # fmt: skip
    return left


def candidates(wishes: Wishes, bits_per_weight: float) -> list[TensorType]:
    """The types to choose from."""
    from qrun.engine.quantize.sensitivity import candidates_for

    if wishes.candidates is not None:
        found = [tensor_type(name) for name in wishes.candidates]
        return [type for type in found if type is not None]
    return candidates_for(bits_per_weight)


class Judge:
    """Measures what files have lost of their reference on the samples that were held out. logits: a file for what the
    reference predicts. perplexity: of the reference."""

    def __init__(self, reference: Path, text: Chunks, logits: IO[bytes], threads: int | None) -> None:
        from qrun.cli.against import write_logits
        from qrun.cli.loading import RunOptions

        self._text, self._logits, self._options = text, logits, RunOptions(threads)
        self.perplexity = write_logits(reference, text, logits, self._options, MORE_ROOM).perplexity.value

    def row(self, name: str, plan: Plan, file: Path) -> Judged:
        """Of the file of a plan."""
        from qrun.cli.against import score_against

        return Judged(name, plan.n_bytes, score_against(file, self._text, self._logits, name, self._options))


@dataclass(frozen=True)
class Judged:
    """A file, what it is called in the table, and how far it is from the source."""

    name: str
    n_bytes: int
    divergence: Divergence

    @property
    def loss(self) -> float:
        """KL in nats."""
        return self.divergence.mean_kl.value


def table(rows: Sequence[Judged], source_perplexity: float) -> list[str]:
    """A line for each model, and one for what was measured."""
    from qrun.cli.perplexity import percent, plus_minus

    width = max(len(row.name) for row in rows)
    lines = [f"{'':{width}}  {'size':>8}  {'KL divergence':>19}  {'same top token':>15}  {'perplexity':>18}"]
    for row in rows:
        divergence = row.divergence
        lines.append(
            f"{row.name:{width}}  {human_bytes(row.n_bytes):>8}  {plus_minus(divergence.mean_kl, 5):>19}  "
            f"{percent(divergence.agreement, 2):>15}  {plus_minus(divergence.model.perplexity, 3):>18}"
        )
    n_tokens = len(rows[0].divergence.kl)
    lines.append(f"on {n_tokens} tokens that were held out; perplexity of the source {source_perplexity:.3f}")
    return lines
