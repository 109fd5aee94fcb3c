"""How commands open models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qrun.cli.console import CompileProgress, DownloadBar, human_bytes, notice
from qrun.models.catalog import CATALOG, DEFAULT_MODEL, CatalogEntry, HubEntry, NotPulled, catalog_entry, resolve

if TYPE_CHECKING:
    from qrun.engine import Model, Tokenizer
    from qrun.engine.judging.scoring import Chunks
    from qrun.engine.program.runtime import Runtime
    from qrun.formats.tensors import TensorFile
    from qrun.models import Graph
    from qrun.models.adapter import Adapter, Lora


def load_model(source: str, loading: dict[str, Any]) -> Model:
    """Loads a model, with progress while kernels compile. `loading`: see options.loading_options."""
    from qrun.engine import Model

    if loading.get("draft") not in (None, "mtp"):  # a folder is converted with a bar of its own
        loading = loading | {"draft": find_model(loading["draft"])}
    fetch_if_watched(source)
    with converting_bar(source, loading.get("type")) as converting:
        model = Model.load(source, progress=CompileProgress(), converting=converting, notice=notice, **loading)
    show_notices(model.loras)
    if model.tokenizer is not None:
        for text in model.tokenizer.notices:
            notice(text)
    show_context_notice(model.graph, model.context)
    return model


def show_context_notice(graph: Graph, context: int) -> None:
    """Says that a context is larger than what the model was trained for, if it is, once in a command."""
    from qrun.engine.model import context_notice

    command = click.get_current_context(silent=True)
    said: set[str] = command.meta.setdefault("qrun.cli.loading.notices", set()) if command else set()
    text = context_notice(graph, context)
    if text and text not in said:
        said.add(text)
        notice(text)


def show_notices(adapters: Iterable[Adapter[Any]]) -> None:
    """Says what of the adapters is not used, if anything."""
    for adapter in adapters:
        if adapter.notice:
            notice(adapter.notice)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a file, for commands that need nothing else of a model."""
    from qrun.engine import Tokenizer

    tokenizer = Tokenizer.load(path)
    for text in tokenizer.notices:
        notice(text)
    return tokenizer


def find_model(source: str, type: str | None = None) -> Path:
    """The file of a model; a folder with a checkpoint is converted, with a bar, if it was not before."""
    from qrun.engine.model import find_model

    with converting_bar(source, type) as converting:
        return find_model(source, type, progress=converting, compiling=CompileProgress(), notice=notice)


def find_original(source: str) -> Path:
    """The same of a model that others are measured by: a folder is kept as BF16, as most checkpoints are."""
    from qrun.engine.model import is_checkpoint

    return find_model(source, "BF16" if is_checkpoint(source) else None)


@contextmanager
def converting_bar(source: str, type: str | None) -> Iterator[Callable[[int, int], None]]:
    """The callback for a conversion on loading: a bar for the bytes."""
    from qrun.engine.model import is_checkpoint

    if not is_checkpoint(source):
        yield lambda done, total: None
        return
    from qrun.engine.quantize.on_load import DEFAULT_TYPE

    with DownloadBar(f"converting {source} to {(type or DEFAULT_TYPE).upper()}, once") as bar:
        yield bar.update


@contextmanager
def open_runtime(
    path: Path,
    *,
    threads: int | None,
    context: int,
    cache_type: str = "f16",
    observe: bool = False,
    loras: Iterable[Lora] = (),
) -> Iterator[Runtime]:
    """A model's runtime alone, without tokenizer and sampling: for what works with token ids and logits."""
    from qrun.engine.native.cpu_count import available_cores
    from qrun.engine.program.runtime import Runtime
    from qrun.formats import GGUFReader
    from qrun.models import build_graph, check_goes_on
    from qrun.models.adapter import open_adapters

    with GGUFReader(path) as reader, open_adapters(loras) as adapters:
        graph = build_graph(reader, context, adapters)
        check_goes_on(graph, path)
        show_notices(adapters)
        show_context_notice(graph, context)
        runtime = Runtime(
            graph,
            threads=threads or available_cores(),
            context=graph.context,
            cache_type=cache_type,
            progress=CompileProgress(),
            observe=observe,
        )
        try:
            yield runtime
        finally:
            runtime.close()


def check_predicts(path: Path, wanted: str = "perplexity") -> None:
    """Raises ValueError, naming the file, for a model that does not predict each token from those before it. wanted:
    what there is none of then."""
    from qrun.formats import GGUFReader

    with GGUFReader(path) as reader:
        check_predicting(path, reader, f"so that there is no {wanted} of it")


def check_predicting(path: Path, model: TensorFile[Any], consequence: str) -> None:
    """The same of a model that is open, and of a checkpoint."""
    from qrun.models.support import predicts, purpose

    if not predicts(model):
        what = f" ({made})" if (made := purpose(model)) else ""
        raise ValueError(f"{path}: it does not predict the next token{what}, {consequence}")


def text_chunks(file: Path, tokenizer: Tokenizer, size: int, limit: int | None) -> Chunks:
    """The text in a file, in chunks. Raises ValueError, naming the file, if it has none."""
    from qrun.engine.judging.scoring import Chunks, TextTooShort
    from qrun.formats.mapping import read_text

    try:
        return Chunks.of(read_text(file, lenient=True), tokenizer, size, limit)
    except TextTooShort as error:
        raise ValueError(f"{file}: {error}") from None


def with_tokenizer(model: Model) -> Model:
    """The model, if it has a tokenizer; ValueError otherwise."""
    if model.tokenizer is None:
        raise ValueError(model.tokenizer_problem)
    return model


def default_model() -> str:
    """The default model's name; fetches it, after saying so, where it is not in the store."""
    entry = CATALOG[DEFAULT_MODEL]
    if not entry.path.is_file():
        size = human_bytes(entry.download_bytes)
        pull_with_progress(entry.name, f"fetching the default model, {entry.name} ({size}, {entry.licence}), once")
    return entry.name


def fetch_if_watched(source: str) -> None:
    """Fetches a model that the catalog or the hub knows, where it is not in the store and somebody is at the terminal.

    They see its size and its licence first, and Ctrl-C stops it. Elsewhere nothing is fetched: what comes to many
    gigabytes is for `qrun pull`, as the error says that follows.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return
    try:
        resolve(source)
    except NotPulled:
        entry = catalog_entry(source)
        if entry and entry.problem:
            raise ValueError(f"{entry.name}: {entry.problem}") from None
        if entry and (text := memory_notice(entry)):
            notice(text)
        pull_with_progress(source, fetching(source))
    except OSError:  # the one that opens it says what is wrong
        return


def memory_notice(entry: CatalogEntry | HubEntry) -> str | None:
    """A line where a model of the catalog needs more memory than is available now, as far as that is known."""
    from qrun.engine.native.machine import MemoryNeed, memory

    room = memory().room
    needed = MemoryNeed(entry.size or 0, entry.cache).total
    if room is None or needed <= room:
        return None
    return f"{entry.name} needs about {human_bytes(needed)} of memory, and {human_bytes(room)} are available now"


def fetching(source: str) -> str:
    """The announcement of a download: what, how large, and under which licence, as far as the catalog knows."""
    entry = catalog_entry(source)
    if entry is None:
        return f"fetching {source}"
    size = f"{human_bytes(entry.download_bytes)}, " if entry.download_bytes else ""
    origin = f" from {entry.spec}" if isinstance(entry, HubEntry) else ""
    return f"fetching {entry.name}{origin} ({size}{entry.licence})"


def pull_with_progress(spec: str, announcement: str) -> Path:
    """Pulls a model with a progress bar; makes the announcement once bytes are coming."""
    from qrun.models.download import pull

    with DownloadBar(announcement) as bar:
        path = pull(spec, progress=bar.update, notice=notice)
    if not bar.begun:
        notice(f"{spec} is in the store already")
    return path
