"""From kernels in Python to machine code on disk, and from there into the process.

Compiling runs in processes of its own (one per core), so that the process that generates text never imports Numba:
it loads object files through llvmlite alone, in milliseconds. An object file is named by its kernel and lies in a
folder named by a digest of all kernel sources, the versions of the compilers, and the CPU's features. It is written
to a temporary name and renamed, so processes that compile at the same time do not harm each other.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qrun.engine.native.cache_root import cache_root
from qrun.engine.native.cpu_count import available_cores
from qrun.engine.simd.target import Target, compiling_for, host_target
from qrun.formats import blocks

Progress = Callable[[int, int], None]

UNUSED_DAYS = 60
"""Compiled kernels that were not loaded for so long are removed when others are compiled."""


class CompileError(RuntimeError):
    """A kernel did not compile. The message carries the compiler's last words."""


def load_kernels(keys: Sequence[str], target: Target | None = None, progress: Progress | None = None) -> Kernels:
    """Machine code for `keys` (see `engine.kernels`), compiled first where the cache lacks it.

    progress: called with (compiled so far, to be compiled), only if anything has to be compiled.
    """
    return Kernels(load_objects(keys, target or host_target(), progress))


def load_objects(keys: Sequence[str], target: Target, progress: Progress | None = None) -> dict[str, bytes]:
    """The object files of `keys` for any target, compiled first where the cache lacks them."""
    compile_kernels(keys, target, progress)
    folder = cache_folder(target)
    objects = {key: _read_object(folder, key) for key in keys}
    with contextlib.suppress(OSError):
        os.utime(folder)  # says that it is in use: see `_forget_old`
    return {key: code for key, code in objects.items() if code is not None}


def compile_kernels(keys: Sequence[str], target: Target, progress: Progress | None = None) -> int:
    """Have the cache hold `keys`. Returns how many of them had to be compiled; `progress` as in `load_kernels`."""
    folder = cache_folder(target)
    missing = [key for key in dict.fromkeys(keys) if _read_object(folder, key) is None]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        _forget_old(folder.parent, but=folder)
        _compile_missing(missing, target, folder, progress)
    return len(missing)


def _forget_old(folders: Path, but: Path) -> None:
    """Remove what versions of qrun, Python or the CPU's features have left that nobody has used for long."""
    for folder in folders.iterdir():
        with contextlib.suppress(OSError):
            if folder != but and folder.stat().st_mtime < time.time() - UNUSED_DAYS * 86400:
                shutil.rmtree(folder)


def _read_object(folder: Path, key: str) -> bytes | None:
    """The object file of a kernel, or None if it is not there, or not as it was written."""
    try:
        whole = (folder / f"{key}.o").read_bytes()
    except FileNotFoundError:
        return None
    digest, code = whole[:32], whole[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write_object(folder: Path, key: str, code: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=folder)
    with os.fdopen(handle, "wb") as file:
        file.write(hashlib.sha256(code).digest() + code)
    os.replace(temporary, folder / f"{key}.o")


class Kernels:
    """Loaded machine code: `kernels["matmul-Q4_K"]` is the address of a C function (op, step, thread), all int64.

    The code goes with this object: whoever runs it, or keeps an address in it, holds the object.
    """

    def __init__(self, objects: dict[str, bytes]) -> None:
        import llvmlite.binding as llvm

        initialize_llvm()
        module = llvm.parse_assembly("")
        machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
        self._engine = llvm.create_mcjit_compiler(module, machine)
        for code in objects.values():
            self._engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        self._addresses = {key: self._engine.get_function_address(symbol(key)) for key in objects}

    def __getitem__(self, key: str) -> int:
        return self._addresses[key]

    def function(self, key: str) -> Callable[[int, int, int], None]:
        """The kernel as a Python callable that releases the GIL while it runs, and that holds the machine code."""
        function = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(self._addresses[key])
        function.kernels = self  # type: ignore[attr-defined]
        return function


def symbol(key: str) -> str:
    return "qrun_" + "".join(c if c.isalnum() else "_" for c in key)


def cache_folder(target: Target) -> Path:
    return cache_root() / "kernels" / _digest(target)


@functools.cache
def _digest(target: Target) -> str:
    digest = hashlib.sha256(repr(target).encode())
    for package in ("numba", "llvmlite"):
        digest.update(importlib.metadata.version(package).encode())
    digest.update(sys.version.encode())
    engine = Path(__file__).parents[1]
    formats = Path(blocks.__file__).parent  # the quantisers' kernels are built from what it says of the types
    ours = [Path(__file__), *engine.glob("simd/*.py"), *engine.glob("kernels/*.py")]
    for path in sorted([*ours, *formats.glob("*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:24]


@functools.cache
def initialize_llvm(triple: str | None = None) -> None:
    """Have LLVM ready for this machine's code, or for that of any other that `triple` names."""
    import llvmlite.binding as llvm

    if triple is None or triple == llvm.get_process_triple():
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
    else:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()


def _compile_missing(missing: list[str], target: Target, folder: Path, progress: Progress | None) -> None:
    """Compile `missing` in one process per core, each fed by a thread that hands it a key at a time."""
    if getattr(sys, "frozen", False):
        # A packed application has no interpreter to start: it compiles here.
        for index, key in enumerate(missing):
            if progress:
                progress(index, len(missing))
            _write_object(folder, key, compile_kernel(key, target))
        return
    waiting = sorted(missing, key=_cost)
    done = 0
    lock = threading.Lock()
    if progress:
        progress(0, len(missing))

    def feed() -> None:
        nonlocal done
        arguments = [
            str(folder),
            target.triple,
            target.cpu,
            target.features,
            str(target.lanes),
            target.dot,
            str(target.columns),
        ]
        command = [sys.executable, "-m", "qrun.engine.native.compiler", *arguments]
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            ) as worker,
        ):
            assert worker.stdin is not None and worker.stdout is not None
            try:
                while True:
                    with lock:
                        if not waiting:
                            return
                        key = waiting.pop()
                    worker.stdin.write(key + "\n")
                    worker.stdin.flush()
                    if not worker.stdout.readline():
                        worker.wait()
                        errors.seek(0)
                        words = (errors.read().strip().splitlines() or ["no message"])[-1]
                        raise CompileError(f"the kernel {key} did not compile: {words}")
                    with lock:
                        done += 1
                        if progress:
                            progress(done, len(missing))
            except BaseException:
                worker.kill()
                raise

    jobs = max(1, min(len(missing), available_cores()))
    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(feed) for _ in range(jobs)]:
            future.result()


def _cost(key: str) -> int:
    return 2 if key.startswith("matmul") else 1 if key.startswith("attention") else 0


def compile_kernel(key: str, target: Target) -> bytes:
    """The object file of one kernel."""
    module, machine = _optimized_module(key, target)
    return machine.emit_object(module)


def assembly(key: str, target: Target) -> str:
    """The assembly of one kernel, to look at."""
    module, machine = _optimized_module(key, target)
    return machine.emit_assembly(module)


@contextlib.contextmanager
def _no_host_code(context: Any) -> Iterator[None]:
    """Keep Numba from making machine code of its own: only its IR is wanted, which may hold another CPU's instructions.

    Of a function's executable it needs no more than the identity of a built-in function: any unlike others will do.
    """

    def get_executable(library: Any, description: Any, environment: Any) -> Callable[..., None]:
        library.finalize()  # links what the function calls into its module
        return [].append

    engine = context.codegen()._engine
    context.get_executable, engine.finalize_object = get_executable, lambda: None
    try:
        yield
    finally:
        del context.get_executable, engine.finalize_object


@functools.cache
def _set_options() -> None:
    """Options of LLVM that hold for the whole process: one that compiles and nothing else, but in a packed app."""
    import llvmlite.binding as llvm

    # Loop strength reduction would make sixteen pointers of one pointer and a stride, and keep them on the stack.
    llvm.set_option("qrun", "--disable-lsr")


def _optimized_module(key: str, target: Target):  # type: ignore[no-untyped-def]
    import llvmlite.binding as llvm
    from numba.core import compiler, config, registry, types
    from numba.core.compiler import Flags

    from qrun.engine import kernels

    # Numba's own passes are skipped: one O3 run for `target` follows.
    config.OPT = config._OptLevel("0")  # type: ignore[attr-defined]
    cpu = registry.cpu_target
    flags: Any = Flags()
    flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    with compiling_for(target), _no_host_code(cpu.target_context):
        function = kernels.build(key)
        cpu.typing_context.refresh()
        cpu.target_context.refresh()
        result = compiler.compile_extra(
            cpu.typing_context, cpu.target_context, function, (types.intp,) * 3, types.none, flags, {}
        )
    ir = str(result.library._final_module)
    inner = result.fndesc.llvm_func_name
    # Numba's convention is (result*, exception**, arguments...) -> status; kernels return nothing and raise nothing.
    ir += f"""
define void @{symbol(key)}(i64 %op, i64 %step, i64 %thread) {{
  %result = alloca ptr
  %exception = alloca ptr
  %status = call i32 @"{inner}"(ptr %result, ptr %exception, i64 %op, i64 %step, i64 %thread)
  ret void
}}
"""
    initialize_llvm(target.triple)
    _set_options()
    module = llvm.parse_assembly(ir)
    module.triple = target.triple
    for definition in module.functions:
        if not definition.is_declaration and definition.name != symbol(key):
            definition.linkage = "internal"
    machine = llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, reloc="pic", codemodel="default"
    )
    module.data_layout = str(machine.target_data)
    # Kernels are written in vectors: LLVM's own vectorisers would only slow the compilation.
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = tuning.slp_vectorization = False
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)
    module.verify()
    return module, machine


def _serve(arguments: list[str]) -> None:
    """The compiling process: keys on standard input, a line on standard output for each one done."""
    folder, triple, cpu, features, lanes, dot, columns = arguments
    target = Target(triple, cpu, features, int(lanes), dot, int(columns))
    for line in sys.stdin:
        key = line.strip()
        _write_object(Path(folder), key, compile_kernel(key, target))
        print(key, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1:])
