"""`qrun run`: one completion."""

from __future__ import annotations

import dataclasses
import json
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from qrun.cli.answer import NO_ANSWER, Display, answer_options
from qrun.cli.console import echo
from qrun.cli.options import grammar_options, loading_options, model_argument, sampling_options

if TYPE_CHECKING:
    from qrun.engine import Generation, Model


@click.command()
@model_argument()
@click.argument("prompt")
@click.option("--chat", is_flag=True, help="Take PROMPT as a user's turn: put it into the model's chat template.")
@click.option("--system", metavar="TEXT", help="The system prompt, with --chat.")
@click.option("--special", is_flag=True, help="Read special tokens in PROMPT, such as <|im_start|>, as such.")
@grammar_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: text, tokens, timings, stop_reason.")
@answer_options
@loading_options
@sampling_options
def command(
    model: str,
    prompt: str,
    chat: bool,
    system: str | None,
    special: bool,
    as_json: bool,
    wanted: dict[str, Any],
    think: bool | None,
    show_thoughts: bool | None,
    plain: bool,
    loading: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Complete PROMPT (- reads it from standard input) and print what follows it.

    It goes on until the model stops, the context is full, or --max-tokens. With --chat, what a model thinks before it
    answers is dim at a terminal and left out elsewhere; --json has it under "reasoning".

    \b
    Examples:
      qrun run model.gguf "The capital of France is" --max-tokens 8 --temperature 0
      qrun run model.gguf --chat "Why is the sky blue?"
      qrun run model.gguf --chat --think --reasoning-budget 500 "How many r are in strawberry?"
      qrun run model.gguf - --json < prompt.txt
      qrun run model.gguf "One, two," --stop "." --logit-bias 1234=-5
      qrun run model.gguf --chat "Name three rivers." --schema rivers.json
      qrun run model.gguf --chat "Is water wet?" --regex "(yes|no)"
      qrun run model.gguf --lora style.gguf --lora topic.gguf=0.5 "Once upon a time"
    """
    from qrun.cli.answer import check_thinking
    from qrun.cli.console import notice, read_stdin
    from qrun.cli.loading import load_model, with_tokenizer

    if system and not chat:
        raise click.UsageError("--system needs --chat.")
    if (think is not None or sampling.get("reasoning_budget") is not None) and not chat:
        raise click.UsageError(f"{'--reasoning-budget' if think is None else '--think'} needs --chat.")
    if prompt == "-":
        prompt = read_stdin()
    # What goes on from a text that is no turn is shown as it comes, whatever it may be.
    display = Display(plain or not chat or as_json, show_thoughts)
    with load_model(model, loading) as loaded:
        check_thinking(with_tokenizer(loaded), think)
        if wanted:
            prepare_constraints(loaded)
        if chat:
            messages = [] if system is None else [{"role": "system", "content": system}]
            messages.append({"role": "user", "content": prompt})
            generation = loaded.chat(messages, special_tokens_in_messages=special, think=think, **wanted, **sampling)
        elif special:
            generation = loaded.generate(loaded.tokenize(prompt, parse_special=True), **wanted, **sampling)
        else:
            generation = loaded.generate(prompt, **wanted, **sampling)
        stream(generation, None if as_json else display)
        if as_json:
            echo(json.dumps(result(generation), ensure_ascii=False))
        elif chat and generation.reasoning and not generation.text:
            notice(NO_ANSWER)


def prepare_constraints(model: Model) -> None:
    """What a schema or grammar needs of the vocabulary, which takes seconds for a large one."""
    from qrun.cli.console import rewritable, status_line

    watched = rewritable(sys.stderr)
    if watched:
        status_line("Preparing the vocabulary for a grammar...")
    try:
        model.prepare_constraints()
    finally:
        if watched:
            status_line("")


def stream(generation: Generation, display: Display | None) -> None:
    """Runs a generation to its end, with its pieces shown as they come if there is a display."""
    from qrun.cli.console import while_reading

    with (
        display.answer() if display else nullcontext() as answer,
        while_reading(lambda: generation.prompt_progress, fills_in=generation.fills_in) as begun,
    ):
        for piece in generation:
            if piece:
                begun()
                if answer is not None:
                    answer.push(piece)


def result(generation: Generation) -> dict[str, Any]:
    """What --json prints of a finished generation."""
    stats = generation.stats
    speeds = ("prompt_tokens_per_second", "generated_tokens_per_second")
    timings = dataclasses.asdict(stats) | {name: round(getattr(stats, name), 2) for name in speeds}
    return {
        "text": generation.text,
        "reasoning": generation.reasoning,
        "tokens": list(generation.tokens),
        "stop_reason": generation.stop_reason,
        "timings": timings,
    }
