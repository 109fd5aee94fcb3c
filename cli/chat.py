"""`qrun chat`: a conversation, at a terminal or through a pipe."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from qrun.cli.answer import NO_ANSWER, Display, answer_options
from qrun.cli.options import loading_options, model_argument, sampling_options

if TYPE_CHECKING:
    from qrun.engine.conversation import Conversation


@click.command()
@model_argument(required=False)
@click.option("--system", metavar="TEXT", help="The system prompt: what the model is to be or to do.")
@click.option("--special", is_flag=True, help="Read special tokens in what you say, such as <|im_start|>, as such.")
@answer_options
@loading_options
@sampling_options
def command(
    model: str | None,
    system: str | None,
    special: bool,
    think: bool | None,
    show_thoughts: bool | None,
    plain: bool,
    loading: dict[str, Any],
    sampling: dict[str, Any],
) -> None:
    """Talk with a model.

    Without MODEL, with the default one, which is fetched when it is first needed. At a terminal, /help lists the
    commands and Ctrl-C stops an answer. Where standard input or output is not a terminal, each line is a turn and only
    the answers are printed.

    What is not given comes from the catalog for its models (a system prompt and sampling that suit them), however
    their file is named, else from the file's metadata, else it is as shown below.

    What a model thinks before it answers is dim at a terminal and left out elsewhere. Thoughts of earlier turns are
    given back to the model where its template shows them.

    \b
    Examples:
      qrun chat
      qrun chat model.gguf --system "You answer in one sentence."
      qrun chat model.gguf --temperature 0 --seed 1 --ctx 8192 --cache-type q8_0
      qrun chat model.gguf --lora adapter.gguf=0.8
      qrun chat model.gguf --think --reasoning-budget 500
      echo "What is the capital of France?" | qrun chat
    """
    from qrun.cli.answer import check_thinking
    from qrun.cli.console import notice
    from qrun.cli.loading import default_model, load_model, with_tokenizer
    from qrun.engine.conversation import Conversation

    display = Display(plain, show_thoughts)
    with load_model(default_model() if model is None else model, loading) as loaded:
        check_thinking(with_tokenizer(loaded), think)
        system = loaded.chat_system if system is None else system
        sampling = {**loaded.chat_sampling, **sampling}
        if text := loaded.chat_notice:
            notice(text)

        def on_forget(n_messages: int) -> None:
            if sys.stderr.isatty():
                display.make_way()
            oldest = f"{n_messages} messages are" if n_messages > 1 else "message is"
            notice(f"the context of {loaded.context} tokens is full: the oldest {oldest} forgotten")

        with closing(Conversation(loaded, system, sampling, on_forget)) as conversation:
            conversation.special_tokens_in_messages = special
            conversation.think = think
            if sys.stdin.isatty() and sys.stdout.isatty():
                from qrun.cli.repl import Repl

                Repl(conversation, display).run()
            else:
                if sys.stdin.isatty():
                    notice("standard output is no terminal: each line that you type is a turn, and Ctrl-D ends")
                answer_lines(conversation, display)


def answer_lines(conversation: Conversation, display: Display) -> None:
    """Takes each line of standard input as a turn; prints the answers."""
    from qrun.cli.console import notice, stdin_lines

    for line in stdin_lines():
        if not line.strip():
            continue
        with display.answer() as answer:
            for piece in conversation.answer(line):
                if piece:
                    answer.push(piece)
        if conversation.only_thought:
            notice(NO_ANSWER)
