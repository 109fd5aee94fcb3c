"""`qrun chat`: a conversation, at a terminal or through a pipe."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from qrun.cli.console import echo
from qrun.cli.options import loading_options, model_argument, sampling_options

if TYPE_CHECKING:
    from qrun.cli.conversation import Conversation


@click.command()
@model_argument(required=False)
@click.option("--system", metavar="TEXT", help="The system prompt: what the model is to be or to do.")
@click.option("--special", is_flag=True, help="Read special tokens in what you say, such as <|im_start|>, as such.")
@loading_options
@sampling_options
def command(
    model: str | None, system: str | None, special: bool, loading: dict[str, Any], sampling: dict[str, Any]
) -> None:
    """Talk with a model.

    Without MODEL, with the default one, which is fetched when it is first needed. At a terminal, /help lists the
    commands and Ctrl-C stops an answer. Where standard input or output is not a terminal, each line is a turn and only
    the answers are printed.

    What is not given comes from the catalog for its models (a system prompt and sampling that suit them), however
    their file is named, else from the file's metadata, else it is as shown below.

    \b
    Examples:
      qrun chat
      qrun chat model.gguf --system "You answer in one sentence."
      qrun chat model.gguf --temperature 0 --seed 1 --ctx 8192 --cache-type q8_0
      qrun chat model.gguf --lora adapter.gguf=0.8
      echo "What is the capital of France?" | qrun chat
    """
    from qrun.cli.console import notice
    from qrun.cli.conversation import Conversation
    from qrun.cli.loading import default_model, load_model, with_tokenizer

    with load_model(model or default_model(), loading) as loaded:
        system = loaded.chat_system if system is None else system
        sampling = {**loaded.chat_sampling, **sampling}
        if text := with_tokenizer(loaded).chat_notice:
            notice(text)

        def on_forget(n_messages: int) -> None:
            if conversation.answering and sys.stderr.isatty():
                echo(err=True)  # where the text of the answer stands
            notice(f"the context of {loaded.context} tokens is full: the oldest {n_messages} messages are forgotten")

        with closing(Conversation(loaded, system, sampling, on_forget)) as conversation:
            conversation.special_tokens_in_messages = special
            if sys.stdin.isatty() and sys.stdout.isatty():
                from qrun.cli.repl import Repl

                Repl(conversation).run()
            else:
                if sys.stdin.isatty():
                    notice("standard output is no terminal: each line that you type is a turn, and Ctrl-D ends")
                answer_lines(conversation)


def answer_lines(conversation: Conversation) -> None:
    """Takes each line of standard input as a turn; prints the answers."""
    from qrun.cli.console import stdin_lines

    for line in stdin_lines():
        if not line.strip():
            continue
        for piece in conversation.answer(line):
            echo(piece, nl=False)
        echo()
