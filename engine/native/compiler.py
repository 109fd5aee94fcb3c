"""Machine code for kernels: from packs, from the cache, or compiled first, and into the process.

Compiling runs in processes of its own (see `workers`), so that the process that generates text imports neither Numba
nor llvmlite: it maps images, in milliseconds, and need not have a compiler at all.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from qrun.engine.cpu.code_memory import CodeMemory
from qrun.engine.cpu.features import architecture
from qrun.engine.kernels import require
from qrun.engine.native.cache_root import cache_root
from qrun.engine.native.codegen import OLDEST, CompileError, code_digest, compiler_place, require_compiler
from qrun.engine.native.linker import AARCH64, X86_64, Image, LinkError, placed
from qrun.engine.native.locks import ForkAwareLock
from qrun.engine.native.object_cache import ObjectCache, warn_once
from qrun.engine.native.packs import Pack, PackError, packs
from qrun.engine.simd.target import Target, folded_target, host_target, machine_name, machine_target, usable_machines

__all__ = [
    "CompileError", "Kernels", "Progress", "cache_folder", "compile_kernels", "default_target", "load_images",
    "load_kernels",
]  # fmt: skip

Progress = Callable[[int, int], None]

_loaded: weakref.WeakValueDictionary[tuple[Target, frozenset[str]], Kernels] = weakref.WeakValueDictionary()
_compiling = ForkAwareLock()  # threads that need the same kernels compile them once


def load_kernels(keys: Sequence[str], target: Target | None = None, progress: Progress | None = None) -> Kernels:
    """Machine code for `keys` (see `engine.kernels`), compiled first where packs and the cache lack it. While somebody
    holds it, others that need the same share it.

    progress: called with (compiled so far, to be compiled), only if anything has to be compiled; again and again, so
    that what it raises ends the compilation soon.
    """
    target = target or default_target()
    name = (target, frozenset(keys))
    kernels = _loaded.get(name)
    if kernels is None:
        kernels = _loaded[name] = Kernels(load_images(keys, target, progress))
    return kernels


def default_target(folded: bool = False) -> Target:
    """The machine that kernels are loaded for if nobody says which: this one. Where packs have nothing for it, but for
    one that has all but tiles, that one; and where nothing can be compiled, the best that they have for lesser ones.

    folded: whether for a model that reads whole texts and writes none: see `folded_target`.
    """
    best = host_target()
    packed = {machine for pack in packs() for machine in pack.targets}
    if folded and (not packed or "amx-folded" in packed):
        best = folded_target()
    if packed and machine_name(best) not in packed:
        lesser = [name for name in usable_machines() if name != "amx"]
        if best.tiles and not os.environ.get("QRUN_SIMD") and lesser[0] in packed:
            return machine_target(lesser[0])
        if any(compiler_place(name) is None for name in OLDEST):
            return next((machine_target(name) for name in lesser if name in packed), best)
    return best


def load_images(keys: Sequence[str], target: Target, progress: Progress | None = None) -> dict[str, bytes]:
    """The images of `keys` for any target, compiled first where packs and the cache lack them.

    Where the cache cannot be used, a `CacheWarning` says so, and they are held in memory.
    """
    return _images(keys, target, progress, must_keep=False)[0]


def compile_kernels(keys: Sequence[str], target: Target, progress: Progress | None = None) -> int:
    """Have packs or the cache hold `keys`. Returns how many had to be compiled; `progress` as in `load_kernels`.

    Raises OSError if they cannot be kept there.
    """
    return _images(keys, target, progress, must_keep=True)[1]


def _images(
    keys: Sequence[str], target: Target, progress: Progress | None, must_keep: bool
) -> tuple[dict[str, bytes], int]:
    """The images of `keys`, and how many of them had to be compiled."""
    images, problems = _packed(keys, target)
    missing = [key for key in dict.fromkeys(keys) if key not in images]
    if not missing:
        return images, 0
    try:
        others, n_compiled = _cached(missing, target, progress, must_keep)
    except ImportError as error:
        if not (searched := packs()):
            raise
        raise CompileError(_missing_in_packs(missing[0], target, searched, problems)) from error
    for problem in problems:
        warn_once(problem)
    return images | others, n_compiled


def _cached(
    keys: Sequence[str], target: Target, progress: Progress | None, must_keep: bool
) -> tuple[dict[str, bytes], int]:
    """The images of `keys` from the cache, and how many of them had to be compiled."""
    cache = ObjectCache(code_digest(target), must_keep)
    images = {key: code for key in keys if (code := cache.read(key)) is not None}
    n_compiled = 0
    if any(key not in images for key in keys):
        with _compiling:
            # Another thread may have compiled them meanwhile.
            images |= {key: code for key in keys if key not in images and (code := cache.read(key)) is not None}
            missing = [key for key in keys if key not in images]
            if missing:
                require_compiler()
                cache.prepare()
                images |= _compile(missing, target, cache, progress or (lambda done, total: None))
            n_compiled = len(missing)
    cache.touch()
    return images, n_compiled


def _packed(keys: Sequence[str], target: Target) -> tuple[dict[str, bytes], list[str]]:
    """What packs have of `keys`, and what is wrong with packs."""
    images: dict[str, bytes] = {}
    problems = []
    machine = machine_name(target)
    for pack in packs():
        if pack.problem:
            problems.append(pack.problem)
        if machine is None or pack.problem:
            continue
        try:
            for key in keys:
                if key not in images and (image := pack.read(machine, key)) is not None:
                    images[key] = image
        except PackError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{pack.folder} cannot be read: {error.strerror}")
    return images, problems


def _missing_in_packs(key: str, target: Target, searched: Sequence[Pack], problems: Sequence[str]) -> str:
    folder, machine = searched[0].folder, machine_name(target) or target.cpu
    why = "; ".join(problems) or f"the kernel {key} for {machine} is not in the pack {folder}"
    if problems:
        why += f"; so the kernel {key} for {machine} is missing"
    return (
        f"{why}, and nothing can be compiled, as Numba is not there: "
        f"make the pack again (qrun pack MODEL --out {folder} --targets {machine})"
    )


def _compile(missing: list[str], target: Target, cache: ObjectCache, progress: Progress) -> dict[str, bytes]:
    """The images of `missing`, which are put into the cache as they are done."""
    from qrun.engine.native.workers import compile_all

    images: dict[str, bytes] = {}
    for key in missing:
        require(key)
    progress(0, len(missing))
    with closing(compile_all(missing, target)) as results:
        for result in results:
            if result is not None:
                key, code = result
                cache.write(key, code)
                images[key] = code
            progress(len(images), len(missing))
    return images


class Kernels:
    """Loaded machine code: `kernels["matmul-Q4_K"]` is the address of a function (op, step, thread), all int64, as
    other kernels call it.

    The code goes with this object: whoever runs it, or keeps an address in it, holds the object.
    """

    def __init__(self, images: Mapping[str, bytes]) -> None:
        """images: see `linker`. LinkError for what is none, or is for another kind of CPU."""
        machine = {"x86_64": X86_64, "aarch64": AARCH64}.get(architecture())
        read = {key: Image.from_bytes(content) for key, content in images.items()}
        for key, image in read.items():
            if image.machine != machine:
                raise LinkError(f"the machine code of {key} is for another kind of CPU")
        code, starts = placed(read.values())
        self._memory = CodeMemory(code)
        self._addresses, self._entries = {}, {}
        for (key, image), start in zip(read.items(), starts, strict=True):
            base = self._memory.address + start
            entry = image.entry_windows if sys.platform == "win32" else None
            self._addresses[key] = base + image.entry
            self._entries[key] = base + (image.entry if entry is None else entry)

    def __getitem__(self, key: str) -> int:
        return self._addresses[key]

    def function(self, key: str) -> Callable[[int, int, int], None]:
        """The kernel as a Python callable that releases the GIL while it runs, and that holds the machine code."""
        function = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(self._entries[key])
        function.kernels = self  # type: ignore[attr-defined]
        return function


def cache_folder(target: Target) -> Path:
    """Where the images for a target lie. OSError if there is no home."""
    return cache_root() / "kernels" / code_digest(target)
