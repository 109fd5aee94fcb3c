"""`qrun info`: what a model file holds, and the memory that it takes to run it. Loads and compiles nothing."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qrun.cli.console import echo
from qrun.cli.options import CACHE_TYPES, lora_option, model_argument, type_option
from qrun.engine.native.machine import MemoryNeed
from qrun.formats.gguf.file_types import FILE_TYPES

if TYPE_CHECKING:
    from qrun.formats import GGUFReader
    from qrun.models import Graph
    from qrun.models.adapter import Lora
    from qrun.models.support import Support


@click.command()
@model_argument()
@click.option("--ctx", type=click.IntRange(min=1), metavar="TOKENS", help="The context for which memory is counted.",
              show_default="the model's own")  # fmt: skip
@lora_option()
@click.option("--tensors", is_flag=True, help="List every tensor too.")
@type_option()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str, ctx: int | None, loras: tuple[Lora, ...], tensors: bool, type_name: str | None, as_json: bool
) -> None:
    """Show what a model file holds, whether it runs here, and the memory that it needs against what this machine has.

    Of a file that does not run here: what is missing, such as its architecture, or the types of some of its tensors.
    (One without a tokenizer that is supported runs, but gives logits only.)
    Any GGUF file can be looked at, also one part of a split model, a vocabulary, or what goes beside a model. Of a LoRA
    adapter's file: what it changes. With --lora: the memory of the model and its adapters.

    \b
    Examples:
      qrun info model.gguf
      qrun info model.gguf --ctx 4096
      qrun info model.gguf --tensors
      qrun info adapter.gguf
      qrun info model.gguf --json
    """
    from qrun.cli.loading import find_model, show_context_notice
    from qrun.engine.native.machine import memory
    from qrun.formats import FormatError
    from qrun.models import build_graph
    from qrun.models.adapter import open_adapters
    from qrun.models.examine import examine
    from qrun.models.support import purpose

    broken: FormatError | None = None
    with opened(find_model(model, type_name)) as (reader, part), open_adapters(loras) as adapters:
        support, graph = (part, None) if part else examine(reader, ctx)
        facts = describe(reader, tensors) | {"kind": support.kind, "runs": support.runs, "problem": support.problem}
        facts["purpose"] = purpose(reader)
        if graph is not None:
            facts["tokenizer"]["problem"] = tokenizer_problem(reader)
        if support.kind == "adapter":
            try:
                facts["adapter"] = describe_adapter(reader.path)
            except FormatError as error:  # what the file holds is worth showing all the same
                broken = error
        if graph is not None:
            if adapters:
                graph = build_graph(reader, ctx, adapters)
            context = graph.context
            show_context_notice(graph, context)
            file_bytes = facts["file_bytes"] + sum(lora.path.stat().st_size for lora in loras)
            needs = {kind: memory_needed(graph, file_bytes, context, kind) for kind in CACHE_TYPES}
            has = memory()
            facts["memory"] = {
                "context": context,
                "needed": {kind: need.as_dict() for kind, need in needs.items()},
                "machine": {"total": has.total, "available": has.available},
            }
    if as_json:
        echo(json.dumps(facts, ensure_ascii=False))
    else:
        show(facts)
    if broken:
        raise broken


@contextmanager
def opened(path: Path) -> Iterator[tuple[GGUFReader, Support | None]]:
    """An open model; of one part of a split model whose others are not there, or that is not the first, that part alone
    and why it does not run."""
    from qrun.formats import FormatError, GGUFReader
    from qrun.formats.gguf.split import SPLIT_COUNT
    from qrun.models.support import Support

    part: Support | None = None
    try:
        reader = GGUFReader(path)
    except FormatError as error:
        reader = GGUFReader(path, alone=True)
        if SPLIT_COUNT not in reader.metadata:
            reader.close()
            raise
        part = Support("part of a split model", error.reason)
    with reader:
        yield reader, part


def describe(reader: GGUFReader, with_tensors: bool) -> dict[str, Any]:
    """All that the file says about itself, ready for JSON."""
    from qrun.formats.tensors import text_of

    metadata = reader.metadata
    architecture = str(metadata.get("general.architecture", "unknown"))
    sizes: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    parameters = 0
    for tensor in reader.tensors.values():
        sizes[tensor.type.name] += tensor.n_bytes
        numbers[tensor.type.name] += 1
        parameters += math.prod(tensor.shape)
    tensor_bytes = sum(sizes.values())

    def of_architecture(key: str) -> Any:
        value: Any = metadata.get(f"{architecture}.{key}")
        return value.tolist() if hasattr(value, "tolist") else value  # an array, with a number for each layer

    facts: dict[str, Any] = {
        "name": text_of(reader, "general.name"),
        "licence": text_of(reader, "general.license"),
        "files": [str(path) for path in reader.files],
        "file_bytes": sum(path.stat().st_size for path in reader.files),
        "gguf_version": reader.version,
        "architecture": architecture,
        "parameters": parameters,
        "quantization": quantization(reader, sizes),
        "bits_per_weight": round(tensor_bytes * 8 / parameters, 2) if parameters else None,
        "tensor_types": {
            name: {"tensors": numbers[name], "bytes": n_bytes} for name, n_bytes in sizes.most_common()
        },
        "context_length": of_architecture("context_length"),
        "layers": of_architecture("block_count"),
        "embedding_length": of_architecture("embedding_length"),
        "heads": of_architecture("attention.head_count"),
        "kv_heads": of_architecture("attention.head_count_kv"),
        "experts": of_architecture("expert_count"),
        "tokenizer": {
            "model": text_of(reader, "tokenizer.ggml.model"),
            "pre": text_of(reader, "tokenizer.ggml.pre"),
            "tokens": vocabulary_size(reader),
        },
        "chat_template": text_of(reader, "tokenizer.chat_template"),
    }  # fmt: skip
    if with_tensors:
        facts["tensors"] = [
            {"name": name, "type": tensor.type.name, "shape": list(tensor.shape), "bytes": tensor.n_bytes}
            for name, tensor in reader.tensors.items()
        ]
    return facts


def describe_adapter(path: Path) -> dict[str, Any]:
    """What an adapter's file says of itself. FormatError if it is none that can be used."""
    from qrun.models.adapter import Lora, open_adapters

    with open_adapters([Lora(path)]) as (adapter,):
        kinds = dict.fromkeys(re.sub(r"^blk\.\d+\.|\.weight$", "", name) for name in adapter.changes)
        return {
            "alpha": adapter.alpha, "ranks": adapter.ranks, "matrices": len(adapter.changes), "kinds": list(kinds),
            "notice": adapter.notice,
        }  # fmt: skip


def tokenizer_problem(reader: GGUFReader) -> str | None:
    """Why a model gives logits only, and reads and writes no text; None where it does."""
    from qrun.engine import Tokenizer
    from qrun.formats import FormatError

    try:
        Tokenizer.load(reader)
    except FormatError as error:
        return error.reason
    return None


def quantization(reader: GGUFReader, sizes: Mapping[str, int]) -> str | None:
    """The name of the file's quantization, by its own word, else the tensor type that has most of the bytes."""
    declared = reader.metadata.get("general.file_type")
    if isinstance(declared, int) and declared in FILE_TYPES:
        return FILE_TYPES[declared]
    return max(sizes, key=sizes.__getitem__, default=None)


def vocabulary_size(reader: GGUFReader) -> int | None:
    """Tokens in the file's vocabulary, without decoding them."""
    if "tokenizer.ggml.tokens" not in reader.metadata:
        return None
    return len(reader.strings("tokenizer.ggml.tokens"))


def memory_needed(graph: Graph, file_bytes: int, context: int, cache_type: str) -> MemoryNeed:
    """What a model takes with a full context: its file, mapped, keys and values or states, and about 250 MB besides."""
    from qrun.engine.program.kv_cache import context_bytes

    return MemoryNeed(file_bytes, context_bytes(graph, cache_type, context))


def show(facts: dict[str, Any]) -> None:
    """Prints the facts for a reader."""
    from qrun.cli.console import human_bytes, human_count, plural

    def line(label: str, *parts: Any) -> None:
        known = [str(part) for part in parts if part not in (None, "")]
        if known:
            echo(f"{label:<16}{', '.join(known)}".replace("\n", " "))

    def counted(key: str, unit: str) -> str | None:
        value = facts[key]
        if value is None:
            return None
        if isinstance(value, list):
            value = f"{min(value)} to {max(value)}"
        return f"{value} {unit}"

    line("name", facts["name"])
    more = len(facts["files"]) - 1
    line("file", facts["files"][0] + (f" and {more} more" if more else ""), human_bytes(facts["file_bytes"]),
         f"GGUF {facts['gguf_version']}")  # fmt: skip
    without_text = facts["tokenizer"].get("problem")
    yes = f"yes, but it reads no text: {without_text}" if without_text else "yes"
    line("runs here", yes if facts["runs"] else f"no: {facts['problem']}")
    line("it is for", facts["purpose"])
    line("licence", facts["licence"])
    line("architecture", facts["architecture"], counted("layers", "layers"), counted("embedding_length", "wide"),
         counted("heads", "heads"), counted("kv_heads", "of keys and values"),
         counted("experts", "experts") if facts["experts"] else None)  # fmt: skip
    line("parameters", human_count(facts["parameters"]), facts["quantization"],
         facts["bits_per_weight"] and f"{facts['bits_per_weight']} bits per weight")  # fmt: skip
    if "adapter" in facts:
        adapter = facts["adapter"]
        ranks = " ".join(map(str, adapter["ranks"]))
        alpha = "" if adapter["alpha"] is None else f"alpha {adapter['alpha']:g}"
        line("LoRA adapter", f"{adapter['matrices']} matrices", f"rank {ranks}", alpha)
        line("it changes", *adapter["kinds"])
        line("left out", adapter["notice"])
    else:
        line("context", counted("context_length", "tokens"))
        tokenizer = facts["tokenizer"]
        if tokenizer["model"] in (None, "none"):
            line("tokenizer", "none in the file")
        else:
            line("tokenizer", tokenizer["model"], tokenizer["pre"], f"{tokenizer['tokens']} tokens")
        template = facts["chat_template"]
        line("chat template", f"{len(template)} characters" if template else "none in the file")
    for name, held in facts["tensor_types"].items():
        line("  " + name, plural(held["tensors"], "tensor"), human_bytes(held["bytes"]))
    if "memory" in facts:
        show_memory(facts["memory"])
    for tensor in facts.get("tensors", ()):
        shape = " x ".join(map(str, tensor["shape"]))
        echo(f"{tensor['type']:<8}{shape:<24}{human_bytes(tensor['bytes']):>9}  {tensor['name']}")


def show_memory(memory: dict[str, Any]) -> None:
    """Prints the table of what is needed, and what there is."""
    from qrun.cli.console import human_bytes

    echo(f"memory          with {memory['context']} tokens of context")
    echo(f"  {'cache type':<14}{'file':>10}{'cache':>10}{'working':>10}{'in all':>10}")
    available = memory["machine"]["available"] or memory["machine"]["total"]
    for kind, need in memory["needed"].items():
        row = "".join(f"{human_bytes(need[part]):>10}" for part in ("file", "cache", "working", "total"))
        fits = "" if available is None else "  fits" if need["total"] <= available else "  does not fit"
        echo(f"  {kind:<14}{row}{fits}")
    if total := memory["machine"]["total"]:
        free = memory["machine"]["available"]
        echo(f"this machine    {human_bytes(total)}" + (f", {human_bytes(free)} of it available" if free else ""))
