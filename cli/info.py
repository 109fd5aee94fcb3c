"""`qrun info`: what a model file holds, and the memory that it takes to run it. Loads and compiles nothing."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qrun.cli.console import echo
from qrun.cli.options import CACHE_TYPES, lora_option, model_argument, type_option
from qrun.formats.gguf.file_types import FILE_TYPES

if TYPE_CHECKING:
    from qrun.formats import FormatError, GGUFReader
    from qrun.models import Graph
    from qrun.models.adapter import Lora

# Python, NumPy, the compiler's libraries, kernels, and the intermediate values of a step
WORKING_BYTES = 250_000_000
# A window's pages are given back one whole page at a time, and the rows of a step come in before others go.
WINDOW_SLACK = 512
# a value of a quantized cache: blocks of 32 with a float16 scale
CACHE_VALUE_BYTES = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}


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
    """Show what a model file holds, and the memory that it needs against what this machine has.

    Of a LoRA adapter's file: what it changes. With --lora: the memory of the model and its adapters.

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
    from qrun.formats import FormatError, GGUFReader
    from qrun.models import build_graph
    from qrun.models.adapter import is_adapter, open_adapters

    unsupported: FormatError | None = None
    with GGUFReader(find_model(model, type_name)) as reader, open_adapters(loras) as adapters:
        facts = describe(reader, tensors)
        try:
            if is_adapter(reader):
                facts["adapter"] = describe_adapter(reader.path)
                graph = None
            else:
                graph = build_graph(reader, ctx, adapters)
        except FormatError as error:  # what the file holds is worth showing all the same
            unsupported, graph = error, None
        if graph is not None:
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
    if unsupported:
        raise unsupported


def describe(reader: GGUFReader, with_tensors: bool) -> dict[str, Any]:
    """All that the file says about itself, ready for JSON."""
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
        "name": metadata.get("general.name"),
        "licence": metadata.get("general.license"),
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
            "model": metadata.get("tokenizer.ggml.model"),
            "pre": metadata.get("tokenizer.ggml.pre"),
            "tokens": vocabulary_size(reader),
        },
        "chat_template": metadata.get("tokenizer.chat_template"),
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
    return len(reader.raw_strings("tokenizer.ggml.tokens"))


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes."""

    file: int
    cache: int
    working: int = WORKING_BYTES

    @property
    def total(self) -> int:
        """All of it."""
        return self.file + self.cache + self.working

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return {"file": self.file, "cache": self.cache, "working": self.working, "total": self.total}


def memory_needed(graph: Graph, file_bytes: int, context: int, cache_type: str) -> MemoryNeed:
    """What a model takes with a full context: its file, mapped, the keys and values, and about 250 MB besides.

    A layer with a sliding window keeps the window's positions only.
    """
    values = 0
    for layer in graph.cache_layers:
        positions = context if layer.window is None else min(context, layer.window + WINDOW_SLACK)
        values += positions * layer.n_kv_heads * (layer.head_dim_k + layer.head_dim_v)
    return MemoryNeed(file_bytes, round(values * CACHE_VALUE_BYTES[cache_type]))


def show(facts: dict[str, Any]) -> None:
    """Prints the facts for a reader."""
    from qrun.cli.console import human_bytes, human_count

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
        line("  " + name, f"{held['tensors']} tensors", human_bytes(held["bytes"]))
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
