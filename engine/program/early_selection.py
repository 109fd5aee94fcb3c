"""Dropping rows whose logits nobody wants as soon as no other row needs them: after the last operation that looks back.

What follows in the last block takes each row for itself. A prompt wants the logits of its last token only, so its
output matrix and feed-forward network are computed for one row: of 16 blocks, almost one less.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qrun.models import graph as G


def select_early(graph: G.Graph) -> G.Graph:
    """The same graph, with rows selected behind the last operation whose rows depend on each other, or on where they
    are.

    A graph whose hidden states are wanted of all rows stays as it is.
    """
    if hidden_of_all_rows(graph):
        return graph
    if not any(isinstance(operation, G.STATEFUL) for operation in graph.operations):
        return graph
    last = max(i for i, operation in enumerate(graph.operations) if knows_its_row(operation))
    body, head = graph.operations[: last + 1], graph.operations[last + 1 :]
    all_rows = {operation.out.id for operation in body}
    unused = 1 + max(operation.out.id for operation in graph.operations)
    selections: list[G.Operation] = []
    selected: dict[int, G.Value] = {}  # what stands for a value in the head

    def of(value: G.Value) -> G.Value:
        if value.id in all_rows and value.id not in selected:
            selected[value.id] = G.Value(unused + len(selections), value.width)
            selections.append(G.SelectRows(selected[value.id], value))
        return selected.get(value.id, value)

    rest: list[G.Operation] = []
    for operation in head:
        if isinstance(operation, G.SelectRows):
            selected[operation.out.id] = of(operation.x)
        else:
            inputs: dict[str, Any] = {
                name: of(value)
                for name, value in vars(operation).items()
                if name != "out" and isinstance(value, G.Value)
            }
            rest.append(replace(operation, **inputs))
    hidden = None if graph.hidden is None else of(graph.hidden)
    return replace(graph, operations=[*body, *selections, *rest], logits=of(graph.logits), hidden=hidden)


def knows_its_row(operation: G.Operation) -> bool:
    """Must an operation have the rows of all tokens, at their places?"""
    by_token = isinstance(operation, G.MoE) and operation.by_token is not None
    return by_token or isinstance(operation, (*G.STATEFUL, G.Embed, G.Rope))


def hidden_of_all_rows(graph: G.Graph) -> bool:
    """Are there hidden states for draft layers of all rows, and not only of those that are selected?"""
    for operation in graph.operations:
        if isinstance(operation, G.SelectRows):
            return False
        if operation.out is graph.hidden:
            return True
    return False
