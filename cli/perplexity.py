"""`qrun perplexity`: how well a model predicts a text, measured as llama-perplexity does.

The text is cut into chunks of the context's length. In each, the tokens of the second half are scored, each with at
least half a chunk before it; where the model's tokenizer begins texts with a BOS token, it takes the place of the
first token of every chunk.
"""

from __future__ import annotations

import json
import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qrun.cli.options import cache_type_option, lora_option, model_argument, threads_option

if TYPE_CHECKING:
    import numpy as np

    from qrun.engine.runtime import Runtime
    from qrun.models.adapter import Lora

LOGIT_BYTES = 64 << 20  # the logits that are held at a time


@click.command()
@model_argument()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--ctx", type=click.IntRange(min=4), default=512, show_default=True, metavar="TOKENS",
              help="Tokens in a chunk.")  # fmt: skip
@click.option("--chunks", type=click.IntRange(min=1), metavar="N", help="Measure the first N chunks only.")
@threads_option()
@cache_type_option()
@lora_option()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: perplexity, error, tokens, chunks.")
def command(
    model: str, file: Path, ctx: int, chunks: int | None, threads: int | None, cache_type: str,
    loras: tuple[Lora, ...], as_json: bool,
) -> None:  # fmt: skip
    """Measure how well a model predicts the text in FILE: its perplexity, with the standard error.

    \b
    Examples:
      qrun perplexity model.gguf wiki.test.raw
      qrun perplexity model.gguf text.txt --ctx 2048 --chunks 8 --json
      qrun perplexity model.gguf text.txt --lora adapter.gguf=0.5
    """
    from qrun.cli.console import step_bar
    from qrun.cli.loading import open_runtime
    from qrun.engine import Tokenizer
    from qrun.models.catalog import resolve

    path = resolve(model)
    text = file.read_bytes().decode("utf-8", "replace")
    tokenizer = Tokenizer.load(path)
    tokens = tokenizer.encode(text, add_special=True)
    n_chunks = len(tokens) // ctx
    if n_chunks == 0:
        raise ValueError(f"{file}: {len(tokens)} tokens, but one chunk takes {ctx} (see --ctx)")
    n_chunks = min(n_chunks, chunks or n_chunks)
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    score = Score()
    with (
        open_runtime(path, threads=threads, context=ctx, cache_type=cache_type, loras=loras) as runtime,
        step_bar("perplexity") as progress,
    ):
        progress(0, n_chunks)
        for i in range(n_chunks):
            score_chunk(runtime, tokens[i * ctx : (i + 1) * ctx], bos, score)
            progress(i + 1, n_chunks)
    if as_json:
        result = {"perplexity": score.perplexity, "error": score.error, "tokens": score.count}
        click.echo(json.dumps(result | {"chunks": n_chunks, "ctx": ctx}))
    else:
        click.echo(f"perplexity {score.perplexity:.4f} ± {score.error:.4f}")
        click.echo(f"{score.count} tokens scored, {n_chunks} chunks of {ctx}")


@dataclass
class Score:
    """Sums over scored tokens of the negative log likelihood, and of its square."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, negative_log_likelihoods: np.ndarray) -> None:
        """Takes in the scores of some tokens, in nats."""
        self.count += len(negative_log_likelihoods)
        self.total += float(negative_log_likelihoods.sum())
        self.squares += float((negative_log_likelihoods**2).sum())

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood."""
        return math.exp(self.total / self.count)

    @property
    def error(self) -> float:
        """The standard error of the mean, carried over to the perplexity to first order."""
        if self.count < 2:
            return math.inf
        mean = self.total / self.count
        variance = max(self.squares / self.count - mean**2, 0.0)
        return math.sqrt(variance / (self.count - 1)) * self.perplexity


def score_chunk(runtime: Runtime, chunk: list[int], bos: int | None, score: Score) -> None:
    """Evaluates a chunk and scores its second half: token i+1 by the logits of token i, for i from the middle on."""
    first = len(chunk) // 2
    inputs = [bos, *chunk[1:]] if bos is not None else chunk
    rows = max(16, LOGIT_BYTES // (4 * runtime.n_vocab))
    with closing(runtime.sequence()) as sequence:
        runtime.evaluate(sequence, inputs[:first], logits="none")
        for start in range(first, len(chunk) - 1, rows):
            end = min(start + rows, len(chunk) - 1)
            logits = runtime.evaluate(sequence, inputs[start:end], logits="all")
            assert logits is not None
            score.add(negative_log_likelihoods(logits, chunk[start + 1 : end + 1]))


def negative_log_likelihoods(logits: np.ndarray, targets: list[int]) -> np.ndarray:
    """-log softmax(logits)[target] of each row, in nats: float64 [n] from float32 [n, n_vocab]."""
    import numpy as np

    chosen = logits[np.arange(len(targets)), targets].astype(np.float64)
    top = logits.max(axis=1, keepdims=True)
    sums = np.exp(logits - top).sum(axis=1, dtype=np.float64)
    return np.log(sums) + top[:, 0] - chosen
