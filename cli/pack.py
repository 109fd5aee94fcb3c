"""`qrun pack`: the machine code of models' kernels in a folder, for apps that shall compile nothing."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qrun.cli.console import CompileProgress, echo, human_bytes, plural
from qrun.cli.options import CACHE_TYPES, FilePath, ModelName, lora_option, type_option

if TYPE_CHECKING:
    from qrun.models import Graph
    from qrun.models.adapter import Lora


class Targets(click.ParamType):
    """Kinds of machines, by name."""

    name = "host|all|NAME,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        from qrun.engine.simd.target import MACHINES

        if isinstance(value, list):
            return value
        names = [name.strip().lower() for name in value.split(",")]
        for name in names:
            if name not in ("host", "all", *MACHINES):
                self.fail(f"{name!r} is no kind of machine; there are host, all, {', '.join(MACHINES)}", param, ctx)
        return names


@click.command()
@click.argument("models", nargs=-1, required=True, type=ModelName(), metavar="MODEL...")
@click.option("--out", required=True, type=FilePath(path_type=Path), metavar="FOLDER",
              help="Where the pack is written; one that is there is replaced.")  # fmt: skip
@click.option("--targets", type=Targets(), default="all", show_default=True,
              help="Kinds of machines, separated by commas: avx512-vbmi, avx512-vnni, avx512, avx-vnni, avx2, x86-64, "
                   "apple, neon-dotprod, neon, and for Intel's newer servers amx, or amx-folded where a model only "
                   "makes vectors; host for the kind that this one is. The same code runs on Linux, macOS and "
                   "Windows.")  # fmt: skip
@click.option("--cache-type", "cache_types", type=click.Choice(CACHE_TYPES), multiple=True, default=["f16"],
              show_default=True, help="How the app keeps keys and values. May be given several times.")  # fmt: skip
@lora_option()
@type_option()
def command(
    models: tuple[str, ...], out: Path, targets: list[str], cache_types: tuple[str, ...], loras: tuple[Lora, ...],
    type_name: str | None,
) -> None:  # fmt: skip
    """Compile what models need, for any machines, into a folder that an app brings along.

    With it an app compiles nothing where it runs, and needs neither Numba nor llvmlite. MODELs are all that it loads
    with this version of qrun, drafts too. It finds the pack by Model.load(..., kernels=FOLDER), by the variable
    QRUN_KERNELS, or, once it is packed, in a folder "kernels" beside its program.

    \b
    Examples:
      qrun pack model.gguf --out app/kernels
      qrun pack model.gguf draft.gguf --out app/kernels --targets avx2,avx512-vnni,x86-64
    """
    from qrun.cli.loading import find_model
    from qrun.engine import __version__
    from qrun.engine.finding import is_checkpoint
    from qrun.engine.native.compiler import load_images
    from qrun.engine.native.packs import check_writable, write
    from qrun.engine.program.adapted import ADAPTER_KERNELS
    from qrun.engine.program.needs import kernels_on_any_machine, machines_for
    from qrun.engine.simd.target import machine_target
    from qrun.formats import GGUFReader
    from qrun.formats.blocks import SEARCHES
    from qrun.models.adapter import open_adapters

    out = Path(out).absolute()
    check_writable(out)
    with ExitStack() as stack:
        graphs, quantisers, packages = [], set(), set()
        adapters = stack.enter_context(open_adapters(loras))
        for model in models:
            folder = is_checkpoint(model)
            reader = stack.enter_context(GGUFReader(find_model(model, type_name if folder else None)))
            graphs += _graphs(reader, adapters)
            packages |= _packages(reader, folder)
            if folder:  # the app may quantise it when it first loads it
                types = {tensor.type for tensor in reader.tensors.values()}
                quantisers |= {f"quantize-{type.name}" for type in types if type in SEARCHES}
        takers: dict[str, list[Graph]] = {}
        for graph in graphs:
            for machine in dict.fromkeys(machine for name in targets for machine in machines_for(graph, name)):
                takers.setdefault(machine, []).append(graph)
        images = {}
        for number, (name, of_machine) in enumerate(takers.items(), 1):
            target = machine_target(name)
            of_adapters = ADAPTER_KERNELS if adapters else ()  # the app may switch them
            keys = [*kernels_on_any_machine(of_machine, cache_types, target), *of_adapters, *sorted(quantisers)]
            counted = f" ({number} of {len(takers)})" if len(takers) > 1 else ""
            images[name] = load_images(keys, target, CompileProgress(name + counted))
    size = write(out, __version__, images, packages)
    kernels = {key for of_target in images.values() for key in of_target}
    echo(f"{out}: {plural(len(kernels), 'kernel')} for {', '.join(images)}, {human_bytes(size)}")


def _graphs(reader: Any, adapters: Any) -> list[Graph]:
    """What may be run of a model: itself, with adapters, and its draft layers."""
    from qrun.formats import FormatError
    from qrun.models import build_drafts, build_graph

    graph = build_graph(reader)
    graphs = [graph, build_graph(reader, adapters=adapters)] if adapters else [graph]
    try:
        with_hidden, layers = build_drafts(reader, graph)
    except FormatError:  # it has none
        return graphs
    return [*graphs, with_hidden, *layers]


def _packages(reader: Any, is_folder: bool) -> set[str]:
    """What cuts the model's texts into tokens. is_folder: it is a checkpoint, whose rules are the library's."""
    from qrun.engine.text.tokenizer import Tokenizer
    from qrun.formats import FormatError

    try:
        packages = set(Tokenizer.load(reader).packages)
    except FormatError:  # it has none
        packages = set()
    return packages | {"tokenizers"} if is_folder else packages
