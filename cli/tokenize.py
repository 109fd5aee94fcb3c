"""`qrun tokenize`: a text's token ids and pieces."""

from __future__ import annotations

import json

import click

from qrun.cli.console import echo
from qrun.cli.options import model_argument, type_option


@click.command()
@model_argument()
@click.argument("text")
@click.option("--special", is_flag=True, help="Read special tokens in TEXT, such as <|im_start|>, as such.")
@click.option("--no-bos", is_flag=True, help="Add no special tokens of the model's own at the ends.")
@type_option()
@click.option("--json", "as_json", is_flag=True, help='Print {"tokens": [ids], "pieces": [texts]}.')
def command(model: str, text: str, special: bool, no_bos: bool, type_name: str | None, as_json: bool) -> None:
    """Show the tokens of TEXT (- reads it from standard input): id and piece, one a line.

    \b
    Examples:
      qrun tokenize model.gguf "Hello, world"
      qrun tokenize model.gguf --special --no-bos "<|im_start|>user"
      qrun tokenize model.gguf - --json < text.txt
    """
    from qrun.cli.console import read_stdin
    from qrun.cli.loading import find_model, load_tokenizer

    if text == "-":
        text = read_stdin()
    tokenizer = load_tokenizer(find_model(model, type_name))
    ids = tokenizer.encode(text, add_special=not no_bos, parse_special=special)
    pieces = [tokenizer.token_bytes(token) for token in ids]
    if as_json:
        echo(json.dumps({"tokens": ids, "pieces": [readable(piece) for piece in pieces]}, ensure_ascii=False))
        return
    for token, piece in zip(ids, pieces, strict=True):
        echo(f"{token:>8}  {readable(piece)!r}")


def readable(piece: bytes) -> str:
    """A piece as text; bytes that are no whole characters as \\xNN."""
    return piece.decode("utf-8", "backslashreplace")
