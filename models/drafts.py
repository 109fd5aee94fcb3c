"""Draft layers: blocks behind a model's own that predict one token further, from the token and from what the model knew
before it (multi-token prediction: DeepSeek-V3, arXiv:2412.19437, section 2.2).

The row of a position has the embedding of its token, and the model's hidden state at the position before. It gives
logits of the token after it, and a hidden state from which the next row can go on without the model.
"""

from collections.abc import Callable
from dataclasses import replace

from qrun.formats.dataclass import dataclass
from qrun.models.graph import Graph, GraphBuilder, LayerNorm, RMSNorm, SelectRows, Value
from qrun.models.hyperparameters import Hyperparameters, Metadata

Block = Callable[[GraphBuilder, Metadata, Hyperparameters, int, Value, int], Value]
"""Adds a block: builder, metadata, hyper-parameters, context, its input, its number -> its output."""


@dataclass(frozen=True)
class DraftLayers:
    """What the draft layers of an architecture are.

    normed: is the hidden state that they go on from, the model's and their own, taken behind the final norm?
    """

    block: Block
    normed: bool = True


def build_layer(
    drafts: DraftLayers, builder: GraphBuilder, metadata: Metadata, h: Hyperparameters, context: int, layer: int
) -> Graph:
    """The graph of one draft layer, whose `Input` is a hidden state, and whose `hidden` is another."""
    block = f"blk.{layer}"
    own = f"{block}.nextn.embed_tokens"
    token = builder.embed(own if builder.has(f"{own}.weight") else "token_embd", h.n_vocab, h.n_embd)
    token = builder.rms_norm(token, f"{block}.nextn.enorm", h.rms_eps)
    hidden = builder.rms_norm(builder.input(h.n_embd), f"{block}.nextn.hnorm", h.rms_eps)
    x = builder.join(token, range(h.n_embd), 1, hidden, range(h.n_embd))
    x = builder.linear(x, f"{block}.nextn.eh_proj", h.n_embd)
    x = builder.select_rows(drafts.block(builder, metadata, h, context, x, layer))
    y = builder.rms_norm(x, first(builder, f"{block}.nextn.shared_head_norm", f"{block}.layer_output_norm",
                                  "output_norm"), h.rms_eps)  # fmt: skip
    logits = builder.linear(y, first(builder, f"{block}.nextn.shared_head_head", "output", "token_embd"), h.n_vocab)
    graph = builder.finish(metadata.architecture, logits, h.n_embd, h.context_length, context)
    return replace(graph, hidden=y if drafts.normed else x)


def first(builder: GraphBuilder, *names: str) -> str:
    """The first of these matrices that the file has, or else the last."""
    return next((name for name in names if builder.has(f"{name}.weight")), names[-1])


def with_hidden(graph: Graph, drafts: DraftLayers) -> Graph:
    """The same graph of a model, with the hidden states of all rows that its draft layers go on from."""
    (index,) = (i for i, operation in enumerate(graph.operations) if isinstance(operation, SelectRows))
    select = graph.operations[index]
    assert isinstance(select, SelectRows)
    if not drafts.normed:
        return replace(graph, hidden=select.x)
    norm = graph.operations[index + 1]
    assert isinstance(norm, RMSNorm | LayerNorm) and norm.x is select.out
    hidden = Value(1 + max(operation.out.id for operation in graph.operations), norm.out.width)
    operations = list(graph.operations)
    operations[index : index + 2] = [replace(norm, out=hidden, x=select.x), SelectRows(norm.out, hidden)]
    return replace(graph, operations=operations, hidden=hidden)
