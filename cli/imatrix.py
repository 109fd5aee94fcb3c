"""`qrun imatrix`: which weights of a model matter, from a text that runs through it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qrun.cli.console import echo
from qrun.cli.options import FilePath, chunk_options, lora_option, model_argument, threads_option
from qrun.formats.whole_file import check_place

if TYPE_CHECKING:
    from qrun.models.adapter import Lora


@click.command()
@model_argument()
@click.argument("file", type=FilePath(path_type=Path))
@click.option("-o", "--out", type=FilePath(path_type=Path), default=Path("imatrix.gguf"), show_default=True,
              metavar="OUT", help="The file to write.")  # fmt: skip
@chunk_options()
@threads_option()
@lora_option()
def command(
    model: str, file: Path, out: Path, ctx: int, chunks: int | None, threads: int | None, loras: tuple[Lora, ...]
) -> None:
    """Collect an importance matrix, with which `qrun convert --imatrix` loses less.

    The text in FILE runs through the model. Of each matrix of its layers, the squares of the inputs are summed up,
    column by column: they tell how much an error in that column's weights matters. Some hundred chunks of text like
    that which the model will meet are enough. The file is in llama.cpp's format.

    \b
    Examples:
      qrun imatrix model-f16.gguf calibration.txt
      qrun imatrix model-f16.gguf calibration.txt -o model.imatrix.gguf --chunks 100
      qrun imatrix model-f16.gguf calibration.txt --lora adapter.gguf   # for convert --merge-lora
    """
    from qrun.cli.console import notice, plural, step_bar
    from qrun.cli.loading import (
        RunOptions,
        check_predicts,
        find_original,
        load_tokenizer,
        open_runtime,
        text_chunks,
    )
    from qrun.cli.perplexity import plus_minus, so_far
    from qrun.engine.quantize.imatrix import unused_experts, write_imatrix
    from qrun.engine.quantize.importance import collect

    path = find_original(model)
    check_predicts(path, "importance matrix")
    if out.exists() and out.samefile(path):
        raise ValueError(f"{out}: this is the model itself: name another file")
    check_place(out)
    text = text_chunks(file, load_tokenizer(path), ctx, chunks)
    with (
        open_runtime(path, RunOptions(threads, loras=loras), ctx, observe=True) as runtime,
        step_bar("collecting") as progress,
    ):
        progress(0, len(text))
        sums, score = collect(runtime, text, lambda done, total, score: progress(done, total, so_far(score)))
    write_imatrix(out, sums, dataset=file.name, chunks=len(text), chunk_size=ctx)
    unused = unused_experts(sums)
    if unused:
        notice(f"{unused} of the experts' matrices were never used: a longer text would reach more")
    size = f"{plural(len(sums), 'tensor')}, {plural(len(text), 'chunk')} of {ctx}"
    echo(f"{out}: {size}; perplexity {plus_minus(score.perplexity, 4)}")
