"""Compiling ahead of the first run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qrun.engine.compiler import Progress, compile_kernels
from qrun.engine.cpu_count import available_cores
from qrun.engine.kv_cache import CacheLayout
from qrun.engine.lowering import Lowering, attention_key
from qrun.engine.simd.target import Target, host_target
from qrun.engine.team import TEAM_KERNELS

if TYPE_CHECKING:
    from qrun.models.graph import Graph


def kernels_of(graph: Graph, cache_type: str = "f16", target: Target | None = None) -> list[str]:
    """The keys of the kernels that a model needs, with as many threads as there are cores, or fewer."""
    layout = CacheLayout(graph.cache_layers, cache_type)
    program = Lowering(graph, layout, target or host_target(), batch=1, head_rows=1, context=1, threads=1)
    counts = range(1, available_cores() + 1)
    attention = {attention_key(layer, cache_type, threads) for layer in graph.cache_layers for threads in counts}
    return [*TEAM_KERNELS, *dict.fromkeys([*program.kernel_keys, *sorted(attention)])]


def warm_up(
    graph: Graph | None = None, cache_type: str = "f16", *, progress: Progress | None = None
) -> tuple[int, int]:
    """Compile what a model will need, or without one all that any model may need, as far as it is not there.

    Returns how many kernels were compiled, and how many were there. `progress` is called with (done, to be done).
    """
    from qrun.engine.kernels import all_keys

    keys = kernels_of(graph, cache_type) if graph is not None else all_keys()
    compiled = compile_kernels(keys, host_target(), progress)
    return compiled, len(set(keys)) - compiled
