"""`qrun list`: what is in the store."""

from __future__ import annotations

import json

import click

from qrun.cli.console import echo
from qrun.models.store import StoredModel


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of objects: name, size, type, path.")
def command(as_json: bool) -> None:
    """List the models in the store: name, size, type, path.

    \b
    Examples:
      qrun list
      qrun list --json
    """
    from qrun.cli.console import human_bytes, notice
    from qrun.engine.quantize.on_load import converted_bytes
    from qrun.models.catalog import CATALOG
    from qrun.models.store import models_folder, partial_bytes, stored_models

    names = {entry.path: entry.name for entry in CATALOG.values()}
    rows = [(names.get(model.path, model.name), model.size, model_type(model), model.path) for model in stored_models()]
    if as_json:
        fields = ("name", "size", "type", "path")
        echo(json.dumps([dict(zip(fields, (*row[:3], str(row[3])), strict=True)) for row in rows]))
        return
    if not rows:
        notice(f"no models in {models_folder()} yet; fetch one with: qrun pull {next(iter(CATALOG))}")
    width = max((len(row[0]) for row in rows), default=0)
    for name, size, kind, path in rows:
        echo(f"{name:<{width}}  {human_bytes(size):>8}  {kind:<16}  {path}")
    if unfinished := partial_bytes():
        notice(f"{human_bytes(unfinished)} of unfinished downloads; delete them with: qrun rm --partial")
    if made := converted_bytes():
        notice(f"{human_bytes(made)} of converted checkpoints; delete them with: qrun rm --converted")


def model_type(model: StoredModel) -> str:
    """Architecture and quantization, as in 'llama Q4_K_M'."""
    from qrun.cli.info import describe
    from qrun.formats import FormatError, GGUFReader

    try:
        with GGUFReader(model.path) as reader:
            facts = describe(reader, with_tensors=False)
    except (FormatError, OSError):
        return "damaged"
    return " ".join([facts["architecture"], *filter(None, [facts["quantization"]])])
