"""`qrun rm`: models out of the store."""

from __future__ import annotations

import click

from qrun.cli.console import echo
from qrun.cli.options import ModelName


@click.command()
@click.argument("names", metavar="NAME...", nargs=-1, type=ModelName())
@click.option("--partial", is_flag=True, help="Delete what unfinished downloads left.")
@click.option("--converted", is_flag=True, help="Delete what was made of folders with checkpoints to run them.")
def command(names: tuple[str, ...], partial: bool, converted: bool) -> None:
    """Delete models from the store. Files elsewhere are never touched.

    \b
    Examples:
      qrun rm SmolLM2-135M-Instruct
      qrun rm --partial
      qrun rm --converted
    """
    from qrun.cli.console import human_bytes
    from qrun.models.catalog import stored_model
    from qrun.models.store import NotPulled, StoredModel, remove, remove_partial

    if not names and not partial and not converted:
        raise click.UsageError("Name a model (qrun list shows them), or give --partial or --converted.")
    models: list[StoredModel] = []
    for name in names:
        model = stored_model(name)
        if model is None:
            raise NotPulled(f"{name}: no such model in the store (see: qrun list)")
        models.append(model)
    for model in dict.fromkeys(models):
        echo(f"deleted {model.name}, {human_bytes(remove(model))}")
    if partial:
        echo(f"deleted {human_bytes(remove_partial())} of unfinished downloads")
    if converted:
        from qrun.engine.quantize.on_load import remove_converted

        echo(f"deleted {human_bytes(remove_converted())} of converted checkpoints")
