"""Machine code for kernels: from the cache, or compiled first, and into the process.

Compiling runs in processes of its own (see `workers`), so that the process that generates text never imports Numba:
it loads object files through llvmlite alone, in milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from qrun.engine.kernels import require
from qrun.engine.native.cache_root import cache_root
from qrun.engine.native.codegen import CompileError, code_digest, initialize_llvm, symbol
from qrun.engine.native.locks import ForkAwareLock
from qrun.engine.native.object_cache import ObjectCache
from qrun.engine.native.workers import compile_all
from qrun.engine.simd.target import Target, host_target

__all__ = [
    "CompileError", "Kernels", "Progress", "cache_folder", "compile_kernels", "initialize_llvm", "load_kernels",
    "load_objects", "symbol",
]  # fmt: skip

Progress = Callable[[int, int], None]

_linking = threading.RLock()
if hasattr(os, "register_at_fork"):
    # LLVM has locks of its own. A child process would wait for ever for one that another thread held when it forked.
    os.register_at_fork(before=_linking.acquire, after_in_parent=_linking.release, after_in_child=_linking.release)

_loaded: weakref.WeakValueDictionary[tuple[Target, frozenset[str]], Kernels] = weakref.WeakValueDictionary()
_compiling = ForkAwareLock()  # threads that need the same kernels compile them once


def load_kernels(keys: Sequence[str], target: Target | None = None, progress: Progress | None = None) -> Kernels:
    """Machine code for `keys` (see `engine.kernels`), compiled first where the cache lacks it. While somebody holds it,
    others that need the same share it.

    progress: called with (compiled so far, to be compiled), only if anything has to be compiled; again and again, so
    that what it raises ends the compilation soon.
    """
    target = target or host_target()
    name = (target, frozenset(keys))
    kernels = _loaded.get(name)
    if kernels is None:
        kernels = _loaded[name] = Kernels(load_objects(keys, target, progress))
    return kernels


def load_objects(keys: Sequence[str], target: Target, progress: Progress | None = None) -> dict[str, bytes]:
    """The object files of `keys` for any target, compiled first where the cache lacks them.

    Where the cache cannot be used, a `CacheWarning` says so, and they are held in memory.
    """
    return _objects(ObjectCache(code_digest(target)), keys, target, progress)[0]


def compile_kernels(keys: Sequence[str], target: Target, progress: Progress | None = None) -> int:
    """Have the cache hold `keys`. Returns how many of them had to be compiled; `progress` as in `load_kernels`.

    Raises OSError if they cannot be kept there.
    """
    return _objects(ObjectCache(code_digest(target), must_keep=True), keys, target, progress)[1]


def _objects(
    cache: ObjectCache, keys: Sequence[str], target: Target, progress: Progress | None
) -> tuple[dict[str, bytes], int]:
    """The object files of `keys`, and how many of them had to be compiled."""
    objects = {key: code for key in keys if (code := cache.read(key)) is not None}
    n_compiled = 0
    if any(key not in objects for key in keys):
        with _compiling:
            # Another thread may have compiled them meanwhile.
            objects |= {key: code for key in keys if key not in objects and (code := cache.read(key)) is not None}
            missing = [key for key in dict.fromkeys(keys) if key not in objects]
            if missing:
                cache.prepare()
                objects |= _compile(missing, target, cache, progress or (lambda done, total: None))
            n_compiled = len(missing)
    cache.touch()
    return objects, n_compiled


def _compile(missing: list[str], target: Target, cache: ObjectCache, progress: Progress) -> dict[str, bytes]:
    """The object files of `missing`, which are put into the cache as they are done."""
    objects: dict[str, bytes] = {}
    for key in missing:
        require(key)
    progress(0, len(missing))
    with closing(compile_all(missing, target)) as results:
        for result in results:
            if result is not None:
                key, code = result
                cache.write(key, code)
                objects[key] = code
            progress(len(objects), len(missing))
    return objects


class Kernels:
    """Loaded machine code: `kernels["matmul-Q4_K"]` is the address of a C function (op, step, thread), all int64.

    The code goes with this object: whoever runs it, or keeps an address in it, holds the object.
    """

    def __init__(self, objects: dict[str, bytes]) -> None:
        import llvmlite.binding as llvm

        with _linking:
            initialize_llvm()
            module = llvm.parse_assembly("")
            machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
            engine = llvm.create_mcjit_compiler(module, machine)
            for code in objects.values():
                engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code))
            engine.finalize_object()
            self._addresses = {key: engine.get_function_address(symbol(key)) for key in objects}
        # Not at exit: threads may be running it to the last.
        weakref.finalize(self, _unload, engine).atexit = False

    def __getitem__(self, key: str) -> int:
        return self._addresses[key]

    def function(self, key: str) -> Callable[[int, int, int], None]:
        """The kernel as a Python callable that releases the GIL while it runs, and that holds the machine code."""
        function = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(self._addresses[key])
        function.kernels = self  # type: ignore[attr-defined]
        return function


def _unload(engine: Any) -> None:
    """Give back the memory of machine code that nobody holds."""
    with _linking:
        engine.close()


def cache_folder(target: Target) -> Path:
    """Where the object files for a target lie. OSError if there is no home."""
    return cache_root() / "kernels" / code_digest(target)
