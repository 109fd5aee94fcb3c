"""`qrun compare`: what each type of file would save of a model, and what it would lose."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from qrun.cli.against import score_against, write_logits
from qrun.cli.comparison import Comparison, Measured
from qrun.cli.console import echo
from qrun.cli.options import FilePath, ModelName, Names, cache_type_option, chunk_options, said_options, threads_option

if TYPE_CHECKING:
    from qrun.cli.loading import RunOptions
    from qrun.engine.judging.scoring import Chunks
    from qrun.engine.judging.tasks import Answers, Task
    from qrun.engine.quantize.convert import Plan

# What to do where there is no room for the logits of the source.
MORE_ROOM = "see --chunks, or set TMPDIR to another folder"
# Options that say nothing where there is no text to calibrate by.
CALIBRATING = {"measures": "--measures", "samples": "--samples", "length": "--length"}
DEFAULT_TYPES = "q8_0,q6_k,q5_k_m,q4_k_m,q3_k_m,q2_k"


@click.command()
@click.argument("source", type=ModelName())
@click.option("--text", "file", required=True, type=FilePath(path_type=Path), metavar="FILE",
              help="The text that the models are to predict.")  # fmt: skip
@click.option("--types", type=Names(), default=DEFAULT_TYPES, show_default=True,
              help="The types to compare: those of `qrun convert --type`.")  # fmt: skip
@click.option("--imatrix", type=FilePath(path_type=Path), metavar="FILE",
              help="Importance of the inputs, from `qrun imatrix`.")  # fmt: skip
@click.option("--calibrate", "texts", type=FilePath(path_type=Path), multiple=True, metavar="TEXT",
              help="Find the importance of inputs from this text, as `qrun convert` does, and compare mixes of "
                   "measured sensitivity too: for each type one of its size. May be given several times.")  # fmt: skip
@click.option("--samples", type=click.IntRange(min=2), default=128, show_default=True, metavar="N",
              help="Samples of the texts to calibrate by.")  # fmt: skip
@click.option("--length", type=click.IntRange(min=16), default=512, show_default=True, metavar="TOKENS",
              help="Tokens in a sample.")  # fmt: skip
@click.option("--measures", type=FilePath(path_type=Path, file_okay=False), metavar="FOLDER",
              help="Keep what was found of the model in this folder, for the next time.")  # fmt: skip
@click.option("--tasks", "questions", type=FilePath(path_type=Path), metavar="FILE",
              help="Also ask questions with right and wrong answers, as `qrun perplexity --tasks` does.")  # fmt: skip
@click.option("--allow-requantize", is_flag=True, help="Also take a source that is quantised already.")
@click.option("--keep", type=FilePath(path_type=Path, file_okay=False), metavar="FOLDER",
              help="Keep the models that are made, in this folder.")  # fmt: skip
@click.option("--plot", type=FilePath(dir_okay=False), metavar="FILE",
              help="Draw size against loss, as PNG or SVG by the file's ending (needs matplotlib).")  # fmt: skip
@chunk_options(16)
@threads_option()
@cache_type_option()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    source: str, file: Path, types: tuple[str, ...], imatrix: Path | None, texts: tuple[Path, ...], samples: int,
    length: int, measures: Path | None, questions: Path | None, allow_requantize: bool, keep: Path | None,
    plot: str | None, ctx: int, chunks: int, threads: int | None, cache_type: str, as_json: bool,
) -> None:  # fmt: skip
    """Compare what types cost and save.

    SOURCE, best in F16 or BF16, is converted to each type in turn. Of each are measured: its size, the error of its
    weights, its perplexity on a text, and the Kullback-Leibler divergence of its predictions from SOURCE's, which shows
    losses long before perplexity does. With --calibrate there is for each type a mix of the same size as well, whose
    types are those that lose least by measure; in the picture these are a line of their own. With --tasks it also says
    how many questions each answers. The converted models, and the logits of SOURCE, lie in the folder for temporary
    files meanwhile.

    \b
    Examples:
      qrun compare model-f16.gguf --text wiki.test.raw
      qrun compare model-f16.gguf --text wiki.test.raw --types q4_k_m,iq4_xs,q4_0 --imatrix imatrix.gguf --plot loss.svg
      qrun compare model-f16.gguf --text wiki.test.raw --calibrate texts.txt --plot loss.svg
      qrun compare model-f16.gguf --text wiki.test.raw --tasks questions.jsonl
      qrun compare model-f16.gguf --text wiki.test.raw --chunks 64 --keep models --json
    """
    from qrun.cli.compare_mixes import calibrated_plans
    from qrun.cli.loading import RunOptions, check_predicts, find_original, load_tokenizer, text_chunks
    from qrun.engine.judging.tasks import read_tasks
    from qrun.engine.quantize.convert import plan
    from qrun.engine.quantize.imatrix import read_imatrix
    from qrun.engine.quantize.mixes import COPY, Choice, file_type_name
    from qrun.engine.quantize.source import open_source

    if plot:
        from qrun.cli.plot import check_plot

        check_plot(plot)
    if texts and imatrix:
        raise click.UsageError("--calibrate finds the importance itself: it does not go with --imatrix.")
    if not texts and (said := said_options(CALIBRATING)):
        raise click.UsageError(f"{said[0]} goes with --calibrate.")
    names = list(dict.fromkeys(file_type_name(name) for name in types))
    if COPY in names:
        raise ValueError("--types: COPY is no type to compare")
    path = find_original(source)
    check_predicts(path)
    text = text_chunks(file, load_tokenizer(path), ctx, chunks)
    tasks = read_tasks(questions) if questions else []
    importance = read_imatrix(imatrix) if imatrix else None
    with (
        closing(open_source(path)) as opened,
        tempfile.TemporaryDirectory(prefix="qrun-compare-") as name,
    ):
        folder = Path(name)
        if texts:
            plans = calibrated_plans(
                opened, path, names, texts, samples, length, measures or folder / "measures", threads,
                allow_requantize,
            )  # fmt: skip
        else:
            plans = [
                (name, plan(opened, Choice(name), imatrix=importance, allow_requantize=allow_requantize))
                for name in names
            ]
        comparison = compare(path, file.name, text, plans, folder, keep, RunOptions(threads, cache_type), tasks)
    if plot:
        from qrun.cli.compare_plot import draw

        draw(comparison, plot)
    echo(json.dumps(as_object(comparison)) if as_json else table(comparison))


def compare(
    path: Path, text_name: str, text: Chunks, plans: list[tuple[str, Plan]], folder: Path, keep: Path | None,
    options: RunOptions, tasks: Sequence[Task] = (),
) -> Comparison:  # fmt: skip
    """Makes a model of each plan, and measures it against the source. One lies in the folder at a time."""
    from qrun.cli.loading import load_tokenizer
    from qrun.cli.perplexity import answers_of

    tokenizer = load_tokenizer(path) if tasks else None

    def asked(model: Path) -> Answers | None:
        return answers_of(model, tasks, tokenizer, options) if tokenizer is not None else None

    if keep:
        keep.mkdir(parents=True, exist_ok=True)
    with open(folder / "logits", "w+b") as logits:
        score = write_logits(path, text, logits, options, MORE_ROOM)
        measured = []
        for name, plan in plans:
            out = (keep or folder) / f"{path.stem}-{name.replace(' ', '-')}.gguf"
            found = measure(name, plan, out, text, logits, options)
            measured.append(replace(found, answers=asked(out)))
            if not keep:
                out.unlink()
    measured.sort(key=lambda each: each.n_bytes)
    _, first = plans[0]
    size = sum(file.stat().st_size for file in first.source.files)
    bits = first.bits_per_weight(first.source_bytes)
    return Comparison(path.name, text_name, size, bits, score, measured, asked(path))


def measure(
    name: str, plan: Plan, out: Path, text: Chunks, logits: IO[bytes], options: RunOptions
) -> Measured:
    """Converts, and scores the result against the source's logits. name: for the table."""
    import numpy as np

    from qrun.cli.conversion import write

    result = write(plan, out, options.threads)
    error = sum(loss.error for loss in result.losses.values())
    energy = sum(loss.energy for loss in result.losses.values())
    relative_rmse = float(np.sqrt(error / energy)) if energy else 0.0
    divergence = score_against(out, text, logits, name, options)
    return Measured(
        name, out.stat().st_size, plan.bits_per_weight(plan.n_bytes), relative_rmse, divergence,
        measured=plan.choice.types is not None,
    )  # fmt: skip


def as_object(comparison: Comparison) -> dict[str, Any]:
    """The object of --json."""
    from qrun.cli.perplexity import finite, summary

    found: dict[str, Any] = finite({
        "source": comparison.source, "text": comparison.text, "bytes": comparison.n_bytes,
        "bits_per_weight": comparison.bits_per_weight, "perplexity": comparison.score.perplexity.value,
        "error": comparison.score.perplexity.error, "tokens": comparison.score.count,
    })  # fmt: skip
    found["types"] = [
        finite({"type": each.type, "bytes": each.n_bytes, "bits_per_weight": each.bits_per_weight,
                "relative_rmse": each.relative_rmse} | summary(each.divergence)
               | _answered(each.answers, comparison.answers))
        for each in comparison.types
    ]  # fmt: skip
    return found | finite(_answered(comparison.answers, None))


def _answered(answers: Answers | None, reference: Answers | None) -> dict[str, Any]:
    """The part of the questions that were answered, and answered as the reference does."""
    if answers is None:
        return {}
    share = answers.accuracy
    found: dict[str, Any] = {"count": len(answers.chosen), "answered": share.value, "error": share.error}
    if reference is not None:
        same = answers.agreement(reference)
        found["same_answer"] = {"value": same.value, "error": same.error}
    return {"tasks": found}


def table(comparison: Comparison) -> str:
    """The comparison as text: a line for each type."""
    from qrun.cli.console import human_bytes
    from qrun.cli.perplexity import percent, plus_minus

    rows: list[tuple[str, ...]] = [("", "size", "bits/weight", "RMSE", "perplexity", "KL divergence", "same top token")]
    for each in comparison.types:
        divergence = each.divergence
        rows.append((
            each.type, human_bytes(each.n_bytes), f"{each.bits_per_weight:.2f}", f"{each.relative_rmse:.5f}",
            plus_minus(divergence.model.perplexity, 3), plus_minus(divergence.mean_kl, 5),
            percent(divergence.agreement, 2),
        ))  # fmt: skip
    rows.append((
        "source", human_bytes(comparison.n_bytes), f"{comparison.bits_per_weight:.2f}", "",
        plus_minus(comparison.score.perplexity, 3), "", "",
    ))  # fmt: skip
    if comparison.answers is not None:
        answered = [each.answers.accuracy for each in comparison.types if each.answers is not None]
        shares = ["answered", *(percent(share, 1) for share in (*answered, comparison.answers.accuracy))]
        rows = [(*row, share) for row, share in zip(rows, shares, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        for row in rows
    ]
    lines = ["  ".join(row) for row in aligned]
    questions = f", {len(comparison.answers.chosen)} questions asked" if comparison.answers is not None else ""
    lines.append(f"{comparison.source}; {comparison.score.count} tokens of {comparison.text} scored{questions}")
    return "\n".join(line.rstrip() for line in lines)
