"""`qrun embed`: vectors of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qrun.cli.console import echo
from qrun.cli.options import lora_option, model_argument, threads_option, type_option

if TYPE_CHECKING:
    import numpy as np

    from qrun.models.adapter import Lora

POOLINGS = ("none", "mean", "cls", "last", "rank")
AT_A_TIME = 64
"""Texts between two steps of the progress bar."""


@click.command()
@model_argument()
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option("-f", "--file", type=click.Path(path_type=Path), metavar="FILE",
              help="Take the lines of FILE as texts (- is standard input); those of a .jsonl file are JSON: texts, or "
                   "objects with a text.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="FILE.npy",
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

    if output is not None and output.suffix != ".npy":
        raise click.UsageError("--output is a NumPy file: its name ends in .npy.")
    if query is not None and (pooling, dimensions, instruction) != (None, None, None):
        raise click.UsageError("--query goes with no --pooling, --dimensions or --instruction.")
    wanted = [*texts, *(lines_of(file) if file is not None else ())]
    if not wanted:
        raise click.UsageError("There are no texts: name some, or --file.")
    options: dict[str, Any] = {"pooling": pooling, "normalize": normalize, "dimensions": dimensions,
                               "instruction": instruction, "truncate": truncate}  # fmt: skip
    loading = {"threads": threads, "context": ctx, "loras": loras, "type": type_name}
    with load_model(model, loading) as loaded, step_bar("embedding") as progress:
        with_tokenizer(loaded)
        parts: list[np.ndarray] = []
        for start in range(0, len(wanted), AT_A_TIME):
            progress(start, len(wanted))
            some = wanted[start : start + AT_A_TIME]
            try:
                ranked = None if query is None else loaded.rerank(query, some, truncate=truncate)
                part = loaded.embed(some, **options) if ranked is None else ranked
            except ValueError as error:
                raise _counted(error, start, len(wanted)) from None
            parts.append(part)
            if output is None:
                show(part)
    if output is not None:
        write(output, parts)


def _counted(error: ValueError, start: int, total: int) -> ValueError:
    """The error, whose number of a text counts from the first of all."""
    import re

    words = re.sub(r"^text (\d+) of \d+", lambda found: f"text {start + int(found[1])} of {total}", str(error))
    return ValueError(words)


def show(vectors: np.ndarray) -> None:
    """Prints lines: vectors, or the numbers of a ranking."""
    from qrun.engine.embedding.embedder import numbers

    if vectors.ndim == 1:
        for number in numbers(vectors):
            echo(json.dumps(number))
        return
    for vector in vectors:
        echo(json.dumps(numbers(vector)))


def write(output: Path, parts: list[np.ndarray]) -> None:
    """Writes a NumPy file, whole or not at all."""
    import io

    import numpy as np

    from qrun.formats.whole_file import write_whole

    buffer = io.BytesIO()
    np.save(buffer, np.concatenate(parts))
    write_whole(output, buffer.getvalue())


def lines_of(file: Path) -> list[str]:
    """The texts in a file, one a line; empty lines are none."""
    from qrun.cli.console import read_stdin

    text = read_stdin() if str(file) == "-" else file.read_bytes().decode("utf-8", "replace")
    lines = [line for line in text.splitlines() if line.strip()]
    if file.suffix != ".jsonl":
        return lines
    found = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError:
            raise ValueError(f"{file}: line {number} is not JSON") from None
        value = value.get("text") if isinstance(value, dict) else value
        if not isinstance(value, str):
            raise ValueError(f'{file}: line {number} is neither a text nor an object with a "text"')
        found.append(value)
    return found
