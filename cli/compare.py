"""`qrun compare`: what each type of file would save of a model, and what it would lose."""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from qrun.cli.comparison import Comparison, Measured
from qrun.cli.console import echo
from qrun.cli.options import ModelName, Names, cache_type_option, chunk_options, threads_option

if TYPE_CHECKING:
    from qrun.engine.judging.divergence import Divergence
    from qrun.engine.judging.scoring import Chunks, Score
    from qrun.engine.quantize.convert import Plan

DEFAULT_TYPES = "q8_0,q6_k,q5_k_m,q4_k_m,q3_k_m,q2_k"


@click.command()
@click.argument("source", type=ModelName())
@click.option("--text", "file", required=True, type=click.Path(path_type=Path), metavar="FILE",
              help="The text that the models are to predict.")  # fmt: skip
@click.option("--types", type=Names(), default=DEFAULT_TYPES, show_default=True,
              help="The types to compare: those of `qrun convert --type`.")  # fmt: skip
@click.option("--imatrix", type=click.Path(path_type=Path), metavar="FILE",
              help="Importance of the inputs, from `qrun imatrix`.")  # fmt: skip
@click.option("--allow-requantize", is_flag=True, help="Also take a source that is quantised already.")
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER",
              help="Keep the models that are made, in this folder.")  # fmt: skip
@click.option("--plot", type=click.Path(dir_okay=False), metavar="FILE",
              help="Draw size against loss, as PNG or SVG by the file's ending (needs matplotlib).")  # fmt: skip
@chunk_options(16)
@threads_option()
@cache_type_option()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    source: str, file: Path, types: tuple[str, ...], imatrix: Path | None, allow_requantize: bool, keep: Path | None,
    plot: str | None, ctx: int, chunks: int, threads: int | None, cache_type: str, as_json: bool,
) -> None:  # fmt: skip
    """Compare what types cost and save.

    SOURCE, best in F16 or BF16, is converted to each type in turn. Of each are measured: its size, the error of its
    weights, its perplexity on a text, and the Kullback-Leibler divergence of its predictions from SOURCE's, which shows
    losses long before perplexity does. The converted models, and the logits of SOURCE, lie in the folder for temporary
    files meanwhile.

    \b
    Examples:
      qrun compare model-f16.gguf --text wiki.test.raw
      qrun compare model-f16.gguf --text wiki.test.raw --types q4_k_m,iq4_xs,q4_0 --imatrix imatrix.gguf --plot loss.svg
      qrun compare model-f16.gguf --text wiki.test.raw --chunks 64 --keep models --json
    """
    from qrun.cli.loading import check_predicts, find_original, load_tokenizer, text_chunks
    from qrun.engine.quantize.convert import plan
    from qrun.engine.quantize.imatrix import read_imatrix
    from qrun.engine.quantize.mixes import COPY, Choice, file_type_name
    from qrun.engine.quantize.source import open_source

    if plot:
        from qrun.cli.plot import check_plot

        check_plot(plot)
    names = list(dict.fromkeys(file_type_name(name) for name in types))
    if COPY in names:
        raise ValueError("--types: COPY is no type to compare")
    path = find_original(source)
    check_predicts(path)
    text = text_chunks(file, load_tokenizer(path), ctx, chunks)
    importance = read_imatrix(imatrix) if imatrix else None
    with closing(open_source(path)) as opened:
        plans = [plan(opened, Choice(name), imatrix=importance, allow_requantize=allow_requantize) for name in names]
        with tempfile.TemporaryDirectory(prefix="qrun-compare-") as folder:
            comparison = compare(path, file.name, text, plans, Path(folder), keep, threads, cache_type)
    if plot:
        from qrun.cli.compare_plot import draw

        draw(comparison, plot)
    echo(json.dumps(as_object(comparison)) if as_json else table(comparison))


def compare(
    path: Path, text_name: str, text: Chunks, plans: list[Plan], folder: Path, keep: Path | None,
    threads: int | None, cache_type: str,
) -> Comparison:  # fmt: skip
    """Makes a model of each plan, and measures it against the source. One lies in the folder at a time."""
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
    with open(folder / "logits", "w+b") as logits:
        score = write_logits(path, text, logits, threads, cache_type)
        measured = []
        for plan in plans:
            out = (keep or folder) / f"{path.stem}-{plan.choice.file_type}.gguf"
            measured.append(measure(plan, out, text, logits, threads, cache_type))
            if not keep:
                out.unlink()
    measured.sort(key=lambda each: each.n_bytes)
    first = plans[0]
    size = sum(file.stat().st_size for file in first.source.files)
    return Comparison(path.name, text_name, size, first.bits_per_weight(first.source_bytes), score, measured)


def measure(
    plan: Plan, out: Path, text: Chunks, logits: IO[bytes], threads: int | None, cache_type: str
) -> Measured:
    """Converts, and scores the result against the source's logits."""
    import numpy as np

    from qrun.cli.conversion import write

    result = write(plan, out, threads)
    error = sum(loss.error for loss in result.losses.values())
    energy = sum(loss.energy for loss in result.losses.values())
    relative_rmse = float(np.sqrt(error / energy)) if energy else 0.0
    divergence = score_against(out, text, logits, plan.choice.file_type, threads, cache_type)
    return Measured(
        plan.choice.file_type, out.stat().st_size, plan.bits_per_weight(plan.n_bytes), relative_rmse, divergence
    )


def write_logits(path: Path, text: Chunks, out: IO[bytes], threads: int | None, cache_type: str) -> Score:
    """Keeps the logits by which a text is scored, one float32 [n_vocab] after the other: a model is run once, however
    many are measured against it. Returns how well it predicts the text."""
    from qrun.cli.console import human_bytes, step_bar
    from qrun.cli.loading import open_runtime
    from qrun.cli.perplexity import so_far
    from qrun.engine.judging.scoring import Score, scored_logits

    score = Score()
    with ExitStack() as stack:
        runtime = stack.enter_context(
            open_runtime(path, threads=threads, context=text.size, cache_type=cache_type)
        )
        needed = len(text) * text.scored * runtime.n_vocab * 4
        folder = Path(out.name).parent
        free = shutil.disk_usage(folder).free
        if free < needed:
            sizes = f"{human_bytes(needed)} of logits, and {human_bytes(free)} are free"
            raise OSError(f"{folder}: {len(text)} chunks take {sizes} (see --chunks, or set TMPDIR to another folder)")
        progress = stack.enter_context(step_bar("source"))
        progress(0, len(text))
        for done, chunk in enumerate(text, 1):
            for logits, targets in scored_logits(runtime, chunk, text.bos):
                score.add(logits, targets)
                out.write(logits.data)
            progress(done, len(text), so_far(score))
    return score


def score_against(
    path: Path, text: Chunks, expected: IO[bytes], name: str, threads: int | None, cache_type: str
) -> Divergence:
    """How far a model is from the one whose logits were kept, on the same text."""
    import numpy as np

    from qrun.cli.console import step_bar
    from qrun.cli.loading import open_runtime
    from qrun.engine.judging.divergence import Divergence
    from qrun.engine.judging.scoring import scored_logits

    divergence = Divergence()
    expected.seek(0)
    with (
        open_runtime(path, threads=threads, context=text.size, cache_type=cache_type) as runtime,
        step_bar(name) as progress,
    ):
        progress(0, len(text))
        for done, chunk in enumerate(text, 1):
            for logits, targets in scored_logits(runtime, chunk, text.bos):
                reference = np.frombuffer(expected.read(logits.nbytes), np.float32).reshape(logits.shape)
                divergence.add(reference, logits, targets)
            progress(done, len(text), f"KL {divergence.mean_kl.value:.4g} so far")
    return divergence


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
                "relative_rmse": each.relative_rmse} | summary(each.divergence))
        for each in comparison.types
    ]  # fmt: skip
    return found


def table(comparison: Comparison) -> str:
    """The comparison as text: a line for each type."""
    from qrun.cli.console import human_bytes
    from qrun.cli.perplexity import percent, plus_minus

    rows = [("", "size", "bits/weight", "RMSE", "perplexity", "KL divergence", "same top token")]
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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        for row in rows
    ]
    lines = ["  ".join(row) for row in aligned]
    lines.append(f"{comparison.source}; {comparison.score.count} tokens of {comparison.text} scored")
    return "\n".join(line.rstrip() for line in lines)
