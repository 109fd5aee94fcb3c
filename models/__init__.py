"""What can be run: architectures described as graphs. Executes nothing."""

from collections.abc import Sequence

from qrun.formats import FormatError, GGUFReader, TensorInfo
from qrun.models import gemma, gemma2, gemma3, llama, phi3, qwen2, qwen3, smollm3
from qrun.models.adapter import Adapter, adapt, is_adapter
from qrun.models.graph import Graph, GraphBuilder
from qrun.models.hyperparameters import MAX_CONTEXT, Hyperparameters, Metadata, shorten

__all__ = ["ARCHITECTURES", "Graph", "build_graph"]

ARCHITECTURES = {
    "llama": llama.build,
    "qwen2": qwen2.build,
    "qwen3": qwen3.build,
    "qwen3moe": qwen3.build,
    "gemma": gemma.build,
    "gemma2": gemma2.build,
    "gemma3": gemma3.build,
    "phi3": phi3.build,
    "smollm3": smollm3.build,
}
"""By the name that a file gives under `general.architecture`."""


def build_graph(
    reader: GGUFReader,
    context: int | None = None,
    adapters: Sequence[Adapter[TensorInfo]] = (),
    *,
    default_context: int = MAX_CONTEXT,
) -> Graph:
    """The graph of the model in an open file, with the changes of some adapters in it.

    context: the most tokens that will be used at once, by default the trained context, or `default_context` if that is
    less. Models that turn their heads differently for long contexts are built for it, so run the graph with its own
    `context`. Raises `FormatError`, naming the file, for an architecture that is not known, a hyper-parameter out of
    bounds, a tensor that is missing or has the wrong shape or type, or an adapter of another model.
    """
    if is_adapter(reader):
        raise FormatError(reader.path, "this is an adapter, not a model: name it after --lora, beside its model")
    metadata = Metadata(reader)
    build = ARCHITECTURES.get(metadata.architecture)
    if build is None:
        known = ", ".join(ARCHITECTURES)
        raise FormatError(
            reader.path, f"architecture {shorten(metadata.architecture)} is not supported (supported: {known})"
        )
    h = Hyperparameters.read(metadata)
    builder = GraphBuilder(reader)
    context = context or min(h.context_length, default_context)
    logits = build(builder, metadata, h, context)
    if builder.has(f"blk.{h.n_layer}.attn_norm.weight"):
        raise metadata.error("block_count", f"is {h.n_layer}, but the file has tensors of block {h.n_layer}")
    return adapt(builder.finish(metadata.architecture, logits, h.n_embd, h.context_length, context), adapters)
