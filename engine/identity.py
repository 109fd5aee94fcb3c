"""What tells models apart whose caches and sessions must not be mixed."""

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qrun.engine.generation.adapters import Adapters, Chosen

if TYPE_CHECKING:
    from qrun.engine.program.runtime import Runtime
    from qrun.models import Graph
    from qrun.models.adapter import Adapter


def fingerprint(files: Iterable[Path], graph: "Graph", loras: "Iterable[Adapter[Any]]") -> Callable[[], str]:
    """A function that gives a digest of the model's files, of what they describe, and of the adapters that were loaded
    with it, and holds neither: a session may outlive its model, and shall not keep the file mapped."""
    description = repr((graph.architecture, graph.n_vocab, graph.n_embd, graph.cache_layers))
    # An adapter of scale 0 changes nothing.
    acting = [lora for lora in loras if lora.scale != 0]
    if acting:  # their order decides that of additions, and so the last bits
        description += repr([lora.scale for lora in acting])
    return functools.cache(functools.partial(_digest, [*files, *(lora.path for lora in acting)], description))


def _digest(files: Sequence[Path], description: str) -> str:
    from qrun.engine.generation.session_file import model_fingerprint  # only for those who save or load sessions

    return model_fingerprint(files, description)


def bits_of(graph: "Graph", runtime: "Runtime") -> str:
    """A digest of what decides the bits of a cache beside the model's file: the kernels, the type of the cache, and how
    the graph was built."""
    import hashlib

    from qrun.engine.native.codegen import code_digest
    from qrun.engine.program.state_blocks import state_sizes

    digest = hashlib.sha256(code_digest(runtime.target).encode())
    digest.update(repr((runtime.cache_type, graph.cache_layers, state_sizes(graph))).encode())
    for operation in graph.operations:
        digest.update(type(operation).__name__.encode())
        for value in vars(operation).values():
            if isinstance(value, np.ndarray):  # which may depend on the context, as factors of frequencies do
                digest.update(np.ascontiguousarray(value).data)
            elif isinstance(value, bool | int | float | str):
                digest.update(repr(value).encode())
    return digest.hexdigest()


def prefix_key(model: str, adapters: Adapters, chosen: Chosen) -> str:
    """The key of `DiskPrefixes`. model: a digest of the model and of what else decides its bits."""
    import hashlib

    return model[:12] + hashlib.sha256(f"{model} {adapters.digest(chosen)}".encode()).hexdigest()[12:]
