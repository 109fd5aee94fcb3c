"""Dropping rows whose logits nobody wants as soon as no other row needs them: after the last operation that looks back.

What follows in the last block takes each row for itself. A prompt wants the logits of its last token only, so its
output matrix and feed-forward network are computed for one row: of 16 blocks, almost one less.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qrun.models import graph as G


def select_early(graph: G.Graph) -> G.Graph:
    """The same graph, with rows selected behind the last operation whose rows depend on each other."""
    last = max((i for i, operation in enumerate(graph.operations) if isinstance(operation, G.STATEFUL)), default=-1)
    if last < 0:
        return graph
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
    return replace(graph, operations=[*body, *selections, *rest], logits=of(graph.logits))
