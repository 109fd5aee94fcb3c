"""`qrun bench`: tokens per second, by the procedure of the common benchmarks of GGUF engines."""

from __future__ import annotations

import json
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from qrun.cli.console import echo
from qrun.cli.options import (
    FilePath,
    cache_type_option,
    draft_option,
    lora_option,
    model_argument,
    threads_option,
    type_option,
)

if TYPE_CHECKING:
    from qrun.engine import Model
    from qrun.engine.program.runtime import Runtime
    from qrun.models.adapter import Lora


@click.command()
@model_argument()
@threads_option()
@click.option("-p", "--prompt", type=click.IntRange(min=0), default=512, show_default=True, metavar="TOKENS",
              help="Tokens of the prompt; 0 leaves prompts out.")  # fmt: skip
@click.option("-n", "--gen", type=click.IntRange(min=0), default=64, show_default=True, metavar="TOKENS",
              help="Tokens to generate one by one; 0 leaves generation out.")  # fmt: skip
@click.option("-r", "--reps", type=click.IntRange(min=1), default=3, show_default=True,
              help="Repetitions; the best counts. One more goes before them as a warm-up.")  # fmt: skip
@click.option("--depth", type=click.IntRange(min=0), default=0, show_default=True, metavar="TOKENS",
              help="Tokens in the cache already.")  # fmt: skip
@click.option("--seqs", type=click.IntRange(1, 4096), default=1, show_default=True, metavar="SEQUENCES",
              help="Also measure so many sequences that are decoded together.")  # fmt: skip
@cache_type_option()
@lora_option()
@type_option()
@draft_option()
@click.option("--bandwidth/--no-bandwidth", default=True, show_default=True,
              help="Also measure how fast memory is read, and how much of that generation makes use of.")  # fmt: skip
@click.option(
    "--compare", "peers", multiple=True, metavar="PEER",
    help="Run another engine in turns with this one, with 1 and 2 threads unless -t says otherwise: a Python that has "
    "ik_llama_cpp or llama_cpp installed, or [NAME=]COMMAND with {model}, {threads}, {prompt}, {gen}, {reps}, {depth} "
    "and {seqs} in it, which prints figures as --json does, or as llama-bench -o json.",
)  # fmt: skip
@click.option(
    "--plot", type=FilePath(dir_okay=False), metavar="FILE",
    help="With --compare: draw the comparison, as PNG or SVG by the file's ending (needs matplotlib).",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help='Print {"pp512": tokens/s, "tg64": tokens/s, ...} last.')
def command(
    model: str,
    threads: int | None,
    prompt: int,
    gen: int,
    reps: int,
    depth: int,
    seqs: int,
    cache_type: str,
    loras: tuple[Lora, ...],
    type_name: str | None,
    draft: str | None,
    bandwidth: bool,
    peers: tuple[str, ...],
    plot: str | None,
    as_json: bool,
) -> None:
    """Measure tokens per second: reading a prompt (pp) and generating (tg), the best of the repetitions.

    Every repetition begins with an empty cache. Sampling and tokenizing are not part of it. Generation needs every
    weight once for each token: its share of the memory's speed says how near it is to what this machine can do.

    With --draft, also how fast a real text comes, with the draft and without, in turns: what a draft gains depends on
    the text.

    \b
    Examples:
      qrun bench model.gguf
      qrun bench model.gguf -t 2 -p 512 -n 64 -r 3 --json
      qrun bench model.gguf --depth 2048 --seqs 4
      qrun bench model.gguf --lora adapter.gguf
      qrun bench model.gguf --draft small.gguf
      qrun bench model.gguf --compare peer-env/bin/python --plot speed.svg
      qrun bench model.gguf --compare "llama-bench -m {model} -t {threads} -p {prompt} -n {gen} -r {reps} -o json"
    """
    from qrun.cli.loading import find_model

    if not prompt and not gen:
        raise click.UsageError("--prompt 0 and --gen 0 leave nothing to measure.")
    path = find_model(model, type_name)
    if peers:
        for given, name in ((loras, "--lora"), (draft, "--draft")):
            if given:
                raise click.UsageError(f"{name} does not go with --compare: other engines would run the model without.")
        from qrun.cli import bench_compare

        task = bench_compare.Task(str(path), prompt, gen, reps, depth, seqs, cache_type)
        others = [bench_compare.Peer(peer) for peer in peers]
        bench_compare.report(task, others, [threads] if threads else [1, 2], plot, as_json)
        return
    if plot:
        raise click.UsageError("--plot needs --compare.")
    from qrun.cli.loading import RunOptions, load_model, open_runtime

    drafted: dict[str, Any] = {}
    if draft is not None and gen:  # first, so that a draft that does not fit costs nobody any time
        loading = {"threads": threads, "cache_type": cache_type, "loras": loras, "draft": draft}
        with load_model(str(path), loading | {"context": TEXT_ROOM + gen}) as loaded:
            drafted = measure_draft(loaded, gen, reps)

    context = depth + max(prompt, gen)
    with open_runtime(path, RunOptions(threads, cache_type, loras), context) as runtime:
        if not runtime.causal:  # a text is computed as a whole there
            if depth:
                raise ValueError(f"{path}: nothing can be read behind a text whose tokens all see each other (--depth)")
            gen = 0
        best = measure(runtime, prompt, gen, reps, depth, seqs)
        n_threads, form = runtime.threads, runtime.simd
        if bandwidth and gen:
            best |= memory_share(runtime, best[f"tg{gen}"], depth + gen / 2)
    best |= drafted
    if as_json:
        echo(json.dumps(best | {"threads": n_threads, "depth": depth, "cache_type": cache_type, "simd": form}))
        return
    for name, speed in best.items():
        if name not in ("memory", "share", "guessed", "accepted"):
            echo(f"{name:<10}{speed:>10.2f} tokens/s")
    if "guessed" in best:
        echo(f"guesses   {best['guessed']:>10} tokens, of which {best['accepted']} were right")
    if "share" in best:
        echo(f"memory    {best['memory']:>10.2f} GB/s, of which tg{gen} uses {best['share']:.0%}")
    echo(f"{n_threads} threads, after {depth} tokens, cache {cache_type}, {form}")


def memory_share(runtime: Runtime, speed: float, position: float) -> dict[str, float]:
    """How fast memory is read, in GB (10^9 bytes) per second, and the share of that which generation at `speed` uses,
    with so many positions in the cache."""
    from qrun.cli.console import CompileProgress
    from qrun.engine.native.bandwidth import read_bandwidth
    from qrun.engine.program.needs import bytes_per_token

    limit = read_bandwidth(runtime.threads, progress=CompileProgress())
    share = bytes_per_token(runtime.graph, runtime.cache_type, position) * speed / limit
    return {"memory": round(limit / 1e9, 2), "share": round(share, 3)}


TEXT = (
    "A bicycle stays upright because its rider steers it, mostly without thinking, under the side to which it begins "
    "to fall. At rest that is hard. The faster it goes, the less it takes, and"
)
"""What is gone on from with a draft."""
TEXT_ROOM = 248
"""Tokens of context for it: a vocabulary may have one for each byte."""


def measure_draft(model: Model, gen: int, reps: int) -> dict[str, Any]:
    """Best tokens per second of a text with a draft ("draft") and without ("text"), and its guesses in one repetition.

    The likeliest text, so that it is the same each time; the session, which learns what pays, goes on.
    """
    tokenizer = model.tokenizer
    prompt = tokenizer.encode(TEXT) if tokenizer is not None else bench_tokens(model.graph.n_vocab, 32)
    ends = dict.fromkeys(tokenizer.stop_ids if tokenizer is not None else (), float("-inf"))
    best: dict[str, Any] = {"text": 0.0, "draft": 0.0}
    with closing(model.session()) as session:
        for repetition in range(reps + 1):
            for name in best if repetition % 2 else reversed(best):
                generation = session.generate(
                    prompt, temperature=0, max_tokens=gen + 1, logit_bias=ends, draft=name == "draft"
                )
                for _ in generation:
                    pass
                if repetition:  # the first is the warm-up
                    best[name] = max(best[name], round(generation.stats.generated_tokens_per_second, 2))
                if name == "draft":
                    stats = generation.stats
    return best | {"guessed": stats.guessed_tokens, "accepted": stats.accepted_tokens}


def bench_tokens(n_vocab: int, count: int) -> list[int]:
    """The token ids that are measured with: spread over the vocabulary, none of them special in common models."""
    usable = min(n_vocab - 300, 40000)
    if usable < 1:  # a toy model
        return [i * 7919 % n_vocab for i in range(count)]
    return [i * 7919 % usable + 100 for i in range(count)]


def measure(runtime: Runtime, prompt: int, gen: int, reps: int, depth: int, seqs: int) -> dict[str, Any]:
    """Best tokens per second over `reps` repetitions after one warm-up, by name: pp512, tg64, tg64x4."""
    tokens = bench_tokens(runtime.n_vocab, max(prompt, gen, depth, 1))
    best: dict[str, Any] = {}

    def keep(name: str, count: int, seconds: float) -> None:
        best[name] = max(best.get(name, 0.0), round(count / seconds, 2))

    for repetition in range(reps + 1):
        counts = repetition > 0  # the first is the warm-up
        if prompt:
            seconds = _time_prompt(runtime, tokens[:prompt], tokens[:depth])
            if counts:
                keep(f"pp{prompt}", prompt, seconds)
        if gen:
            seconds = _time_generation(runtime, tokens[:gen], tokens[:depth])
            if counts:
                keep(f"tg{gen}", gen, seconds)
        if gen and seqs > 1:
            seconds = _time_together(runtime, tokens[:gen], seqs)
            if counts:
                keep(f"tg{gen}x{seqs}", gen * seqs, seconds)
    return best


def _time_prompt(runtime: Runtime, tokens: list[int], before: list[int]) -> float:
    with closing(runtime.sequence()) as sequence:
        if before:
            runtime.evaluate(sequence, before)
        start = time.perf_counter()
        runtime.evaluate(sequence, tokens)
        return time.perf_counter() - start


def _time_generation(runtime: Runtime, tokens: list[int], before: list[int]) -> float:
    with closing(runtime.sequence()) as sequence:
        if before:
            runtime.evaluate(sequence, before)
        start = time.perf_counter()
        for token in tokens:
            runtime.evaluate(sequence, [token])
        return time.perf_counter() - start


def _time_together(runtime: Runtime, tokens: list[int], seqs: int) -> float:
    sequences = [runtime.sequence() for _ in range(seqs)]
    start = time.perf_counter()
    for token in tokens:
        runtime.evaluate_together(sequences, [token] * seqs)
    seconds = time.perf_counter() - start
    for sequence in sequences:
        sequence.close()
    return seconds
