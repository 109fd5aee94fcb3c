"""`qrun perplexity`: how well a model predicts a text, and how far it is from another model that predicts the same."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qrun.cli.console import echo, plural
from qrun.cli.options import (
    FilePath,
    ModelName,
    cache_type_option,
    chunk_options,
    lora_option,
    model_argument,
    threads_option,
    type_option,
)

if TYPE_CHECKING:
    from qrun.cli.loading import RunOptions
    from qrun.engine import Tokenizer
    from qrun.engine.judging.divergence import Divergence
    from qrun.engine.judging.scoring import Chunks, Estimate, Score
    from qrun.engine.judging.tasks import Answers, Task
    from qrun.models.adapter import Lora


@click.command()
@model_argument()
@click.argument("file", type=FilePath(path_type=Path))
@chunk_options()
@click.option("--against", type=ModelName(), metavar="REFERENCE",
              help="Another model with the same vocabulary, the original of this one, say: also measure how far MODEL "
                   "is from it.")  # fmt: skip
@click.option("--tasks", type=FilePath(path_type=Path), metavar="FILE",
              help="Also ask the questions in FILE, JSON lines with \"question\", \"right\" and \"wrong\" answers: how "
                   "often is a right one the likeliest?")  # fmt: skip
@threads_option()
@cache_type_option()
@lora_option()
@type_option()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: perplexity, error, tokens, chunks, ...")
def command(
    model: str, file: Path, ctx: int, chunks: int | None, against: str | None, tasks: Path | None,
    threads: int | None, cache_type: str, loras: tuple[Lora, ...], type_name: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure how well a model predicts the text in FILE: its perplexity, with the standard error.

    With --against, both models read the text, and what is printed besides tells how much of REFERENCE is lost: the
    Kullback-Leibler divergence of MODEL from REFERENCE (in nats for each token), how often both hold the same token to
    be the likeliest, and how the probability of the token that came has changed.

    \b
    Examples:
      qrun perplexity model.gguf wiki.test.raw
      qrun perplexity model.gguf text.txt --ctx 2048 --chunks 8 --json
      qrun perplexity model-q4_k_m.gguf text.txt --against model-f16.gguf
      qrun perplexity model.gguf text.txt --lora adapter.gguf=0.5
      qrun perplexity model-q4_k_m.gguf text.txt --against model-f16.gguf --tasks questions.jsonl
    """
    from qrun.cli.loading import RunOptions, check_predicts, find_model, find_original, load_tokenizer, text_chunks
    from qrun.engine.judging.tasks import read_tasks

    path = find_model(model, type_name)
    check_predicts(path)
    tokenizer = load_tokenizer(path)
    text = text_chunks(file, tokenizer, ctx, chunks)
    questions = read_tasks(tasks) if tasks else []
    options = RunOptions(threads, cache_type, loras)
    counts: dict[str, Any] = {"chunks": len(text), "ctx": ctx}
    if against is None:
        score = measure(path, text, options)
        estimate = score.perplexity
        asked = ask(path, None, questions, tokenizer, options)
        if as_json:
            result = {"perplexity": estimate.value, "error": estimate.error, "tokens": score.count}
            echo(json.dumps(finite(result | counts | (asked.as_object() if asked else {}))))
        else:
            echo(f"perplexity {plus_minus(estimate, 4)}")
            show_answers(asked)
            echo(f"{plural(score.count, 'token')} scored, {plural(len(text), 'chunk')} of {ctx}")
        return
    reference = find_original(against)
    check_vocabulary(reference, tokenizer)
    divergence = measure_against(path, reference, text, options)
    asked = ask(path, reference, questions, tokenizer, options)
    if as_json:
        echo(json.dumps(finite(summary(divergence) | counts | (asked.as_object() if asked else {}))))
    else:
        echo(report(divergence))
        show_answers(asked)
        echo(f"{plural(divergence.model.count, 'token')} scored, {plural(len(text), 'chunk')} of {ctx}")


def measure(path: Path, text: Chunks, options: RunOptions) -> Score:
    """How well the model predicts the text."""
    from qrun.cli.console import step_bar
    from qrun.cli.loading import open_runtime
    from qrun.engine.judging.scoring import Score, scored_logits

    score = Score()
    with open_runtime(path, options, text.size) as runtime, step_bar("perplexity") as progress:
        progress(0, len(text))
        for done, chunk in enumerate(text, 1):
            for logits, targets in scored_logits(runtime, chunk, text.bos):
                score.add(logits, targets)
            progress(done, len(text), so_far(score))
    return score


def measure_against(path: Path, reference: Path, text: Chunks, options: RunOptions) -> Divergence:
    """How far the model is from the reference: both go through the text side by side, some rows at a time."""
    from qrun.cli.console import step_bar
    from qrun.cli.loading import open_runtime
    from qrun.engine.judging.divergence import Divergence
    from qrun.engine.judging.scoring import scored_logits

    divergence = Divergence()
    with ExitStack() as stack:
        runtimes = [
            stack.enter_context(open_runtime(reference, replace(options, loras=()), text.size)),
            stack.enter_context(open_runtime(path, options, text.size)),
        ]
        if runtimes[0].n_vocab != runtimes[1].n_vocab:
            raise ValueError(
                f"{reference}: it computes logits of {runtimes[0].n_vocab} tokens, the model of {runtimes[1].n_vocab}"
            )
        progress = stack.enter_context(step_bar("perplexity"))
        progress(0, len(text))
        for done, chunk in enumerate(text, 1):
            both = [scored_logits(runtime, chunk, text.bos) for runtime in runtimes]
            for (expected, targets), (logits, _) in zip(*both, strict=True):
                divergence.add(expected, logits, targets)
            progress(done, len(text), so_far(divergence.model))
    return divergence


@dataclass(frozen=True)
class Asked:
    """How many questions there are, what part of them the model has answered, and if there is a reference what part
    that has, and to what part both give the same answer."""

    count: int
    answered: Estimate
    by_reference: Estimate | None = None
    same_answer: Estimate | None = None

    def as_object(self) -> dict[str, Any]:
        """For --json."""
        found: dict[str, Any] = {"count": self.count, "answered": self.answered.value, "error": self.answered.error}
        if self.by_reference and self.same_answer:
            found["reference"] = {"answered": self.by_reference.value, "error": self.by_reference.error}
            found["same_answer"] = as_pair(self.same_answer)
        return {"tasks": found}


def ask(
    path: Path, reference: Path | None, questions: Sequence[Task], tokenizer: Tokenizer, options: RunOptions
) -> Asked | None:
    """How many questions the model answers, and if there is one its reference. None if there are no questions."""
    if not questions:
        return None
    mine = answers_of(path, questions, tokenizer, options)
    if reference is None:
        return Asked(len(questions), mine.accuracy)
    theirs = answers_of(reference, questions, tokenizer, replace(options, loras=()))
    return Asked(len(questions), mine.accuracy, theirs.accuracy, mine.agreement(theirs))


def answers_of(path: Path, questions: Sequence[Task], tokenizer: Tokenizer, options: RunOptions) -> Answers:
    """What a model answers to the questions."""
    from qrun.cli.console import step_bar
    from qrun.cli.loading import open_runtime
    from qrun.engine.judging.tasks import answer, context_needed

    context = context_needed(tokenizer, questions)
    with open_runtime(path, options, context) as runtime, step_bar("tasks") as progress:
        return answer(runtime, tokenizer, questions, progress)


def show_answers(asked: Asked | None) -> None:
    """A line on the questions, if some were asked."""
    if asked is None:
        return
    text = f"{percent(asked.answered, 1)} of {plural(asked.count, 'question')} answered"
    if asked.by_reference and asked.same_answer:
        text += f", by the reference {percent(asked.by_reference, 1)}; the same answer to "
        text += percent(asked.same_answer, 1)
    echo(text)


def check_vocabulary(reference: Path, tokenizer: Any) -> None:
    """Raises ValueError, naming the reference, if its vocabulary is not this tokenizer's."""
    from qrun.cli.loading import load_tokenizer
    from qrun.engine.judging.divergence import check_same_vocabulary

    other = load_tokenizer(reference)
    try:
        check_same_vocabulary(tokenizer, other)
    except ValueError as error:
        raise ValueError(f"{reference}: {error}") from None


def so_far(score: Score) -> str:
    """What a progress bar says of it."""
    return f"{score.perplexity.value:.4g} so far"


def plus_minus(estimate: Estimate, digits: int) -> str:
    """A value with its standard error."""
    return _with_error(estimate.value, estimate.error, digits)


def percent(estimate: Estimate, digits: int = 3) -> str:
    """A part with its standard error, in percent."""
    return _with_error(100 * estimate.value, 100 * estimate.error, digits, "%")


def _with_error(value: float, error: float, digits: int, unit: str = "") -> str:
    """Of a single value nobody knows the error."""
    return f"{value:.{digits}f}{unit}" + (f" ± {error:.{digits}f}{unit}" if math.isfinite(error) else "")


def as_pair(estimate: Estimate) -> dict[str, float]:
    """For --json."""
    return {"value": estimate.value, "error": estimate.error}


def summary(divergence: Divergence) -> dict[str, Any]:
    """All that is known, as numbers: the object of --json."""
    import numpy as np

    kl, model, reference = divergence.kl, divergence.model.perplexity, divergence.reference.perplexity
    median, p99 = np.percentile(kl, (50, 99))
    change, rms = divergence.probability_change, divergence.rms_probability_change
    pairs = {
        "reference": reference, "ratio": divergence.perplexity_ratio, "top1_agreement": divergence.agreement,
        "probability_change": change, "probability_change_rms": rms,
    }  # fmt: skip
    mean = divergence.mean_kl
    return {
        "perplexity": model.value, "error": model.error,
        **{name: as_pair(estimate) for name, estimate in pairs.items()},
        "kl_divergence": {"mean": mean.value, "error": mean.error, "median": float(median), "p99": float(p99),
                          "max": float(kl.max())},
        "tokens": divergence.model.count,
    }  # fmt: skip


def finite(value: Any) -> Any:
    """JSON has no infinities and no NaN: null takes their place."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report(divergence: Divergence) -> str:
    """The same as text."""
    found = summary(divergence)["kl_divergence"]
    rows = [
        ("perplexity", plus_minus(divergence.model.perplexity, 4)),
        ("of the reference", plus_minus(divergence.reference.perplexity, 4)),
        ("ratio", plus_minus(divergence.perplexity_ratio, 5)),
        ("KL divergence", plus_minus(divergence.mean_kl, 6)),
        ("", f"median {found['median']:.6f}, 99% below {found['p99']:.6f}, at most {found['max']:.6f}"),
        ("same top token", percent(divergence.agreement)),
        ("probability of the token that came", percent(divergence.probability_change) + " on average"),
        ("", percent(divergence.rms_probability_change) + " root mean square"),
    ]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:{width}}  {value}" for label, value in rows)
