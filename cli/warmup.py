"""`qrun warmup`: what the first run of a model would compile, compiled ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from qrun.cli.console import echo
from qrun.cli.options import cache_type_option, lora_option, model_argument, type_option

if TYPE_CHECKING:
    from qrun.models.adapter import Lora


@click.command()
@model_argument(required=False)
@cache_type_option()
@lora_option()
@type_option()
def command(model: str | None, cache_type: str, loras: tuple[Lora, ...], type_name: str | None) -> None:
    """Compile kernels ahead, so that the first run of MODEL need not.

    Without MODEL, all kernels that any supported model may need, for all types of the cache. They are kept in the
    user's cache folder (or in QRUN_CACHE) and belong to this kind of CPU and this version of qrun.

    \b
    Examples:
      qrun warmup model.gguf
      qrun warmup model.gguf --cache-type q8_0
      qrun warmup model.gguf --lora adapter.gguf
      qrun warmup
    """
    from qrun.cli.console import CompileProgress
    from qrun.engine.program.needs import warm_up

    if model is None:
        if loras:
            raise click.UsageError("--lora needs MODEL.")
        compiled, present = warm_up(progress=CompileProgress())
    else:
        from qrun.cli.loading import find_model
        from qrun.formats import GGUFReader
        from qrun.models import build_graph
        from qrun.models.adapter import open_adapters

        with GGUFReader(find_model(model, type_name)) as reader, open_adapters(loras) as adapters:
            graph = build_graph(reader, adapters=adapters)
            compiled, present = warm_up(graph, cache_type, progress=CompileProgress())
    echo(f"{compiled} kernels compiled, {present} were there")
