"""`qrun embed`: vectors of texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qrun.cli.console import echo
from qrun.cli.options import FilePath, lora_option, model_argument, threads_option, type_option

if TYPE_CHECKING:
    import numpy as np

    from qrun.models.adapter import Lora

POOLINGS = ("none", "mean", "cls", "last", "rank")
AT_A_TIME = 64
"""Texts between two steps of the progress bar."""


@click.command()
@model_argument()
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option("-f", "--file", type=FilePath(path_type=Path), metavar="FILE",
              help="Take the lines of FILE as texts (- is standard input); those of a .jsonl file are JSON: texts, or "
                   "objects with a text.")  # fmt: skip
@click.option("-o", "--output", type=FilePath(path_type=Path), metavar="FILE.npy",
              help="Write a NumPy file, float32 [texts, width], in place of lines.")  # fmt: skip
@click.option("--query", metavar="TEXT", help="Say of each text how well it answers this one, with a model that ranks.")
@click.option("--pooling", type=click.Choice(POOLINGS), help="How a text's rows become one vector: their mean, the "
              "first (cls) or the last; none writes all rows.", show_default="as the file says")  # fmt: skip
@click.option("--normalize/--no-normalize", default=True, help="Make vectors as long as 1.", show_default=True)
@click.option("--dimensions", type=click.IntRange(min=1), metavar="N", help="Only the first N numbers of each vector.")
@click.option("--instruction", metavar="TEXT",
              help="What the model wants before each text, or around it, with {text} in its place.")  # fmt: skip
@click.option("--truncate", is_flag=True, help="Take the beginning of a text that is too long.")
@threads_option()
@click.option("--ctx", type=click.IntRange(min=1), metavar="TOKENS", help="The most tokens of a text.",
              show_default="the model's, at most 8192")  # fmt: skip
@lora_option()
@type_option()
def command(
    model: str, texts: tuple[str, ...], file: Path | None, output: Path | None, query: str | None,
    pooling: str | None, normalize: bool, dimensions: int | None, instruction: str | None, truncate: bool,
    threads: int | None, ctx: int | None, loras: tuple[Lora, ...], type_name: str | None,
) -> None:  # fmt: skip
    """Print vectors of texts, a line each, as JSON: with a model that was made for that, or any that writes.

    With --query and a model that ranks, the lines are numbers: the higher, the better a text answers the query.

    \b
    Examples:
      qrun embed nomic-embed-text.gguf "search_document: Water boils at 100 degrees."
      qrun embed embeddinggemma.gguf --file texts.txt --output vectors.npy
      qrun embed qwen3-embedding.gguf "Where is Paris?" --dimensions 256 \\
          --instruction "Instruct: Find what answers the question\\nQuery: {text}"
      qrun embed bge-reranker.gguf --query "What do pandas eat?" "Bamboo, mostly." "It rains."
    """
    from qrun.cli.console import step_bar
    from qrun.cli.loading import load_model, with_tokenizer
    from qrun.engine.embedding.embedder import names_of

    if output is not None and output.suffix != ".npy":
        raise click.UsageError("--output is a NumPy file: its name ends in .npy.")
    if query is not None and (pooling, dimensions, instruction) != (None, None, None):
        raise click.UsageError("--query goes with no --pooling, --dimensions or --instruction.")
    wanted = [*zip(names_of(len(texts)), texts, strict=True), *(lines_of(file) if file is not None else ())]
    if not wanted:
        raise click.UsageError("There are no texts: name some, or --file.")
    options: dict[str, Any] = {"pooling": pooling, "normalize": normalize, "dimensions": dimensions,
                               "instruction": instruction, "truncate": truncate}  # fmt: skip
    loading = {"threads": threads, "context": ctx, "loras": loras, "type": type_name}
    with (
        nullcontext(show) if output is None else written(output, len(wanted)) as take,
        load_model(model, loading) as loaded,
        step_bar("embedding") as progress,
    ):
        with_tokenizer(loaded)
        for start in range(0, len(wanted), AT_A_TIME):
            progress(start, len(wanted))
            names, some = zip(*wanted[start : start + AT_A_TIME], strict=True)
            if query is None:
                take(loaded.embed(some, **options, names=names))
            else:
                take(loaded.rerank(query, some, truncate=truncate, names=names))


def show(vectors: np.ndarray) -> None:
    """Prints lines: vectors, or the numbers of a ranking."""
    from qrun.engine.embedding.embedder import numbers

    if vectors.ndim == 1:
        for number in numbers(vectors):
            echo(json.dumps(number))
        return
    for vector in vectors:
        echo(json.dumps(numbers(vector)))


@contextmanager
def written(output: Path, expected: int) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that takes some vectors after the other, for a NumPy file that appears when all are there. None is
    kept in memory. expected: how many there will be, if each text has one."""
    import numpy as np
    from numpy.lib.format import write_array_header_1_0

    from qrun.formats.whole_file import whole_file

    shape: list[int] = []

    with whole_file(output) as file:

        def begin(*shape: int) -> None:
            """NumPy leaves room for another number of rows in what a file begins with."""
            write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})

        def take(vectors: np.ndarray) -> None:
            if not shape:
                shape[:] = 0, *vectors.shape[1:]
                begin(expected, *shape[1:])
            shape[0] += len(vectors)
            file.write(np.ascontiguousarray(vectors, "<f4").data)

        yield take
        if shape[0] != expected:
            file.seek(0)
            begin(*shape)


def lines_of(file: Path) -> Iterator[tuple[str, str]]:
    """The texts in a file, one a line, and where they stand; empty lines are none."""
    from qrun.cli.console import read_stdin
    from qrun.formats.json_file import JSON_LINES, json_lines
    from qrun.formats.mapping import read_text

    if file.suffix.lower() in JSON_LINES:
        for where, value in json_lines(file):
            text = value.get("text") if isinstance(value, dict) else value
            if not isinstance(text, str):
                raise ValueError(f'{where}: it is neither a text nor an object with a "text"')
            yield where, text
        return
    is_stdin = str(file) == "-"
    for number, line in enumerate((read_stdin() if is_stdin else read_text(file)).split("\n"), 1):
        if line.strip():
            yield f"{'standard input' if is_stdin else file}, line {number}", line.removesuffix("\r")
