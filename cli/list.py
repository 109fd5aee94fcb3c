"""`qrun list`: what is in the store."""

from __future__ import annotations

import json
from typing import Any

import click

from qrun.cli.console import echo
from qrun.models.store import StoredModel

CACHED_TOKENS = 4096
"""The context for which the catalog says how large keys and values are."""


@click.command()
@click.option("--remote", is_flag=True, help="List the models that can be fetched by name instead.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of objects: name, size, type, problem (why it "
              "does not run, or null), path. With --remote: name, names, description, parameters, size, licence, "
              "source, fits, problem, path.")  # fmt: skip
def command(remote: bool, as_json: bool) -> None:
    """List the models in the store: name, size, type, path.

    With --remote the catalog: the name, what it is, its parameters, the size of the download, whether it fits into the
    memory that is available now, and its licence. A name's family and tags mean what they mean in Ollama's library, and
    another quant may follow: llama3.1:8b-q8_0. Nothing is asked over the network.

    \b
    Examples:
      qrun list
      qrun list --json
      qrun list --remote
    """
    from qrun.cli.console import human_bytes, notice
    from qrun.engine.quantize.on_load import converted_bytes
    from qrun.models.catalog import CATALOG, named_files
    from qrun.models.store import models_folder, partial_bytes, stored_models

    if remote:
        list_catalog(as_json)
        return
    names = named_files()
    rows = [(names.get(model.path, model.name), model.size, *looked_at(model), model.path) for model in stored_models()]
    if as_json:
        fields = ("name", "size", "type", "problem", "path")
        echo(json.dumps([dict(zip(fields, (*row[:4], str(row[4])), strict=True)) for row in rows]))
        return
    if not rows:
        notice(f"no models in {models_folder()} yet; fetch one with: qrun pull {next(iter(CATALOG))}")
    width = max((len(row[0]) for row in rows), default=0)
    for name, size, kind, _, path in rows:
        echo(f"{name:<{width}}  {human_bytes(size):>8}  {kind:<16}  {path}")
    for name, _, _, problem, _ in rows:
        if problem:
            notice(f"{name} does not run here: {problem}")
    if unfinished := partial_bytes():
        notice(f"{human_bytes(unfinished)} of unfinished downloads; delete them with: qrun rm --partial")
    if made := converted_bytes():
        notice(f"{human_bytes(made)} of converted checkpoints; delete them with: qrun rm --converted")


def list_catalog(as_json: bool) -> None:
    """Prints what can be fetched by name."""
    from qrun.cli.console import human_bytes, human_parameters, notice
    from qrun.engine.native.machine import WORKING_BYTES, memory

    room = memory().room
    rows = catalog_rows(room)
    if as_json:
        echo(json.dumps(rows, ensure_ascii=False))
        return
    width = max(len(row["name"]) for row in rows)
    longest = max(len(row["description"]) for row in rows)
    for row in rows:
        fits = {True: "fits", False: "too large", None: ""}[row["fits"]]
        if row["path"]:
            fits = "pulled"
        elif row["problem"]:
            fits = "not yet"
        numbers = f"{human_parameters(row['parameters']):>6}  {human_bytes(row['size']):>8}"
        echo(f"{row['name']:<{width}}  {numbers}  {fits:<9}  {row['description']:<{longest}}  {row['licence']}")
    if any(row["problem"] for row in rows):
        notice("not yet: its architecture is not supported by this version")
    if room is not None:
        needs = f"its file, keys and values of {CACHED_TOKENS} tokens in F16, and {human_bytes(WORKING_BYTES)} more"
        notice(f"a model fits if {needs} are at most the {human_bytes(room)} of memory that are available now")


def catalog_rows(room: int | None) -> list[dict[str, Any]]:
    """The catalog, ready for JSON. room: bytes of memory, if that is known; of what fits there, see `list_catalog`."""
    from qrun.engine.native.machine import MemoryNeed
    from qrun.models.catalog import HubEntry, known_models

    rows = []
    for entry in known_models():
        path = entry.stored()
        rows.append({
            "name": entry.name,
            "names": list(entry.names) if isinstance(entry, HubEntry) else [entry.name],
            "description": entry.description,
            "parameters": entry.parameters,
            "size": entry.size,
            "licence": entry.licence,
            "source": entry.spec if isinstance(entry, HubEntry) else "package index",
            "fits": None if room is None else MemoryNeed(entry.size or 0, entry.cache).total <= room,
            "problem": entry.problem,
            "path": None if path is None else str(path),
        })  # fmt: skip
    return rows


def looked_at(model: StoredModel) -> tuple[str, str | None]:
    """Architecture and quantization, as in 'llama Q4_K_M', and why the model does not run here, if that can be seen
    without reading much of it."""
    from qrun.cli.info import describe
    from qrun.formats import FormatError, GGUFReader
    from qrun.models.examine import glance

    try:
        with GGUFReader(model.path) as reader:
            facts = describe(reader, with_tensors=False)
            problem = glance(reader).problem
    except FormatError as error:
        return "damaged", error.reason
    except OSError as error:
        return "damaged", error.strerror
    return " ".join([facts["architecture"], *filter(None, [facts["quantization"]])]), problem
