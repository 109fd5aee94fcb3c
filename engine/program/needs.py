"""What a model will need: kernels, which can be compiled ahead of the first run, and bytes read for each token."""

from __future__ import annotations

from qrun.engine.kernels.records import PAGE_POSITIONS
from qrun.engine.native.compiler import Progress, compile_kernels
from qrun.engine.native.cpu_count import available_cores
from qrun.engine.native.team import TEAM_KERNELS
from qrun.engine.program.kv_cache import CacheLayout
from qrun.engine.program.lowering import Lowering, attention_key
from qrun.engine.program.state_blocks import state_sizes
from qrun.engine.simd.target import Target, host_target
from qrun.models import graph as G


def kernels_of(graph: G.Graph, cache_type: str = "f16", target: Target | None = None) -> list[str]:
    """The keys of the kernels that a model needs, with as many threads as there are cores, or fewer."""
    layout = CacheLayout(graph.cache_layers, cache_type, state_sizes(graph))
    program = Lowering(graph, layout, target or host_target(), batch=1, head_rows=1, context=1, threads=1)
    counts = range(1, available_cores() + 1)
    attention = {
        attention_key(graph, operation, layout.places[operation.layer].kind, threads)
        for operation in graph.operations
        if isinstance(operation, G.Attention)
        for threads in counts
    }
    return [*TEAM_KERNELS, *dict.fromkeys([*program.kernel_keys, *sorted(attention)])]


def warm_up(
    graph: G.Graph | None = None, cache_type: str = "f16", *, progress: Progress | None = None
) -> tuple[int, int]:
    """Compile what a model will need, or without one all that any model may need, as far as it is not there.

    Returns how many kernels were compiled, and how many were there. `progress` is called with (done, to be done).
    """
    from qrun.engine.kernels import all_keys

    keys = kernels_of(graph, cache_type) if graph is not None else all_keys()
    compiled = compile_kernels(keys, host_target(), progress)
    return compiled, len(set(keys)) - compiled


def bytes_per_token(graph: G.Graph, cache_type: str, position: float) -> float:
    """Bytes of weights, keys and values that have to be read to generate the token at a position."""
    total = 0.0
    for operation in graph.operations:
        if isinstance(operation, G.Linear | G.HeadLinear):
            total += operation.weight.raw.nbytes
        elif isinstance(operation, G.MoE):
            weights = [operation.router, *operation.matrices]
            weights += [weight for change in operation.changes for weight in (change.a, change.b)]
            for weight in weights:  # those of experts have three dimensions
                used = operation.n_used / weight.shape[0] if len(weight.shape) == 3 else 1
                total += weight.raw.nbytes * used
    layout = CacheLayout(graph.cache_layers, cache_type, state_sizes(graph))
    for (window, every), page_bytes in zip(layout.groups, layout.page_bytes, strict=True):
        seen = position / every if window is None else min(position, window)
        total += page_bytes / PAGE_POSITIONS * seen
    total += layout.block_bytes
    return total
