"""Whether a file can be run here, found out without running it."""

from __future__ import annotations

from qrun.formats import FormatError, GGUFReader
from qrun.formats.tensors import text_of
from qrun.models import ARCHITECTURES, Graph, build_graph
from qrun.models.support import Support, architecture_problem, other_kind, unsupported_types


def examine(reader: GGUFReader, context: int | None = None) -> tuple[Support, Graph | None]:
    """Whether the model in an open file can be run here, or what is missing; and its graph, if it can."""
    support = _without_graph(reader)
    if support is not None:
        return support, None
    try:
        return Support("model", None), build_graph(reader, context)
    except FormatError as error:
        return Support("model", error.reason), None


def glance(reader: GGUFReader) -> Support:
    """Whether a file runs here, without looking at every tensor: what is missing among them, or has the wrong shape, is
    not seen."""
    support = _without_graph(reader)
    if support is None and unsupported_types(reader.tensors.values()):
        support, _ = examine(reader)  # they may be of those that are not needed
    return support or Support("model", None)


def _without_graph(reader: GGUFReader) -> Support | None:
    """What can be said of a file by its metadata; None if that speaks for it."""
    if other := other_kind(reader):
        return other
    architecture = text_of(reader, "general.architecture")
    if architecture is None:
        return Support("model", "general.architecture is missing or not a string")
    problem = architecture_problem(architecture, ARCHITECTURES)
    return Support("model", problem) if problem else None
