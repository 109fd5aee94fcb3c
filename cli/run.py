"""`qrun run`: one completion."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

from qrun.cli.console import echo
from qrun.cli.options import loading_options, model_argument, sampling_options

if TYPE_CHECKING:
    from qrun.engine import Generation


@click.command()
@model_argument()
@click.argument("prompt")
@click.option("--chat", is_flag=True, help="Take PROMPT as a user's turn: put it into the model's chat template.")
@click.option("--system", metavar="TEXT", help="The system prompt, with --chat.")
@click.option("--special", is_flag=True, help="Read special tokens in PROMPT, such as <|im_start|>, as such.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: text, tokens, timings, stop_reason.")
@loading_options
@sampling_options
def command(
    model: str,
    prompt: str,
    chat: bool,
    system: str | None,
    special: bool,
    as_json: bool,
    loading: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Complete PROMPT (- reads it from standard input) and print what follows it.

    It goes on until the model stops, the context is full, or --max-tokens.

    \b
    Examples:
      qrun run model.gguf "The capital of France is" --max-tokens 8 --temperature 0
      qrun run model.gguf --chat "Why is the sky blue?"
      qrun run model.gguf - --json < prompt.txt
      qrun run model.gguf "One, two," --stop "." --logit-bias 1234=-5
      qrun run model.gguf --lora style.gguf --lora topic.gguf=0.5 "Once upon a time"
    """
    from qrun.cli.console import read_stdin
    from qrun.cli.loading import load_model, with_tokenizer

    if system and not chat:
        raise click.UsageError("--system needs --chat.")
    if prompt == "-":
        prompt = read_stdin()
    with load_model(model, loading) as loaded:
        with_tokenizer(loaded)
        if chat:
            messages = [] if system is None else [{"role": "system", "content": system}]
            messages.append({"role": "user", "content": prompt})
            generation = loaded.chat(messages, special_tokens_in_messages=special, **sampling)
        elif special:
            generation = loaded.generate(loaded.tokenize(prompt, parse_special=True), **sampling)
        else:
            generation = loaded.generate(prompt, **sampling)
        stream(generation, quiet=as_json)
        if as_json:
            echo(json.dumps(result(generation), ensure_ascii=False))


def stream(generation: Generation, quiet: bool) -> None:
    """Runs a generation to its end, printing its pieces as they come unless `quiet`."""
    from qrun.cli.console import while_reading

    with while_reading(lambda: generation.prompt_progress) as begun:
        for piece in generation:
            if piece:
                begun()
                if not quiet:
                    echo(piece, nl=False)
    if not quiet:
        echo()


def result(generation: Generation) -> dict[str, Any]:
    """What --json prints of a finished generation."""
    stats = generation.stats
    speeds = ("prompt_tokens_per_second", "generated_tokens_per_second")
    timings = dataclasses.asdict(stats) | {name: round(getattr(stats, name), 2) for name in speeds}
    return {
        "text": generation.text,
        "tokens": list(generation.tokens),
        "stop_reason": generation.stop_reason,
        "timings": timings,
    }
