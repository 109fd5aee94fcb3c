"""What a model will need: kernels, which can be compiled ahead of the first run, and bytes read for each token."""

from __future__ import annotations

from collections.abc import Iterable

from qrun.engine.kernels.records import MAX_THREADS, PAGE_POSITIONS
from qrun.engine.native.compiler import Progress, compile_kernels, default_target
from qrun.engine.native.cpu_count import available_cores
from qrun.engine.native.team import TEAM_KERNELS
from qrun.engine.program.early_selection import select_early
from qrun.engine.program.kv_cache import CacheLayout
from qrun.engine.program.lowering import Lowering, attention_key
from qrun.engine.program.record_writer import matrices
from qrun.engine.program.state_blocks import state_sizes
from qrun.engine.simd.target import MACHINES, TILES, Target, folded_target, machine_name, usable_machines
from qrun.models import graph as G


def kernels_of(
    graph: G.Graph, cache_type: str = "f16", target: Target | None = None, threads: int | None = None
) -> list[str]:
    """The keys of the kernels that a model needs, with that many threads (one for each core) or fewer."""
    layout = CacheLayout(graph.cache_layers, cache_type, state_sizes(graph))
    target = target or default_target(folded=graph.embeds)
    halves = [graph] if graph.encoder is None else [graph.encoder, graph]
    lowered = [
        Lowering(to_lower, layout, target, batch=1, head_rows=1, context=1, threads=1)
        for to_lower in (*halves, select_early(graph))
    ]
    counts = range(1, (threads or available_cores()) + 1)
    attention = {
        f"{sparse}{attention_key(graph, operation, layout.places[operation.layer].kind, count)}"
        for half in halves
        for operation in half.operations
        if isinstance(operation, G.Attention)
        for sparse in (("",) if operation.chosen is None else ("", "sparse_"))
        for count in counts
    }
    keys = [key for program in lowered for key in program.kernel_keys]
    return [*TEAM_KERNELS, *dict.fromkeys([*keys, *sorted(attention)])]


def machines_for(graph: G.Graph, name: str) -> list[str]:
    """The kinds of machines that a model chooses from. name: "host" for what this machine is, "all", or a kind."""
    if name == "host":
        folded = machine_name(folded_target()) if graph.embeds else None
        return list(dict.fromkeys([usable_machines()[0], *([folded] if folded else [])]))
    if name == "all":
        tiles = "amx-folded" if graph.embeds else "amx"
        return [machine for machine in MACHINES if machine not in TILES or machine == tiles]
    return [name]


def kernels_on_any_machine(graphs: Iterable[G.Graph], cache_types: Iterable[str], target: Target) -> list[str]:
    """What models need on machines of a kind, however many cores they have."""
    types = list(cache_types)
    found = [kernels_of(graph, type, target, MAX_THREADS) for graph in graphs for type in types]
    return list(dict.fromkeys(key for keys in found for key in keys))


def warm_up(
    graph: G.Graph | None = None, cache_type: str = "f16", *, progress: Progress | None = None
) -> tuple[int, int]:
    """Compile what a model will need, or without one all that any model may need, as far as it is not there.

    Returns how many kernels were compiled, and how many were there. `progress` is called with (done, to be done), for
    each form of kernels that models choose here.
    """
    from qrun.engine.kernels import all_keys

    if graph is None:
        wanted = {target: all_keys(target) for target in map(default_target, (False, True))}
    else:
        target = default_target(folded=graph.embeds)
        wanted = {target: kernels_of(graph, cache_type, target)}
    compiled = sum(compile_kernels(keys, target, progress) for target, keys in wanted.items())
    return compiled, sum(len(set(keys)) for keys in wanted.values()) - compiled


def bytes_per_token(graph: G.Graph, cache_type: str, position: float) -> float:
    """Bytes of weights, keys and values that have to be read to generate the token at a position."""
    total = 0.0
    for operation in graph.operations:
        for weight in matrices(operation):
            used = 1.0
            if isinstance(operation, G.MoE) and len(weight.shape) == 3:  # of experts
                used = operation.n_used / weight.shape[0]
            total += weight.raw.nbytes * used
    layout = CacheLayout(graph.cache_layers, cache_type, state_sizes(graph))
    for (window, every), page_bytes in zip(layout.groups, layout.page_bytes, strict=True):
        seen = position / every if window is None else min(position, window)
        total += page_bytes / PAGE_POSITIONS * seen
    for operation in graph.operations:
        if isinstance(operation, G.Attention) and operation.index is not None:
            number = operation.layer if operation.entries_layer is None else operation.entries_layer
            layer, place = graph.cache_layers[number], layout.places[number]
            not_chosen = max(position / layer.every - operation.index.most, 0)
            total -= layer.n_kv_heads * (place.k_head_bytes + place.v_head_bytes) / PAGE_POSITIONS * not_chosen
    total += layout.block_bytes
    return total
