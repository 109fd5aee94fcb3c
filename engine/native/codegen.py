"""One kernel from Python to an image of machine code: Numba makes LLVM's IR of it, LLVM an object file, and the linker
the image.

Neither Numba nor llvmlite is imported by a process that only runs models: that takes longer than loading what is
compiled, and they need not be there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qrun.engine.native.linker import link
from qrun.engine.native.locks import ForkAwareLock
from qrun.engine.native.sources import sources_digest
from qrun.engine.simd.target import Target, compiling_for
from qrun.formats.errors import QrunError

OLDEST = {"numba": (0, 66), "llvmlite": (0, 48)}
"""The first versions that compile all kernels: before them LLVM lacks the products of AVX-512 as they are written."""
NEWEST = (0, 68)
"""The last version of Numba with which kernels have been compiled. Later ones may have moved what `simd.frontend` uses
of it."""


def _version_of_numba() -> str:
    import importlib.metadata

    return importlib.metadata.version("numba")


def _version_of_llvmlite() -> str:
    import importlib.metadata

    return importlib.metadata.version("llvmlite")


# Each name is written out: by that those who pack apps know whose records to take along.
_VERSIONS: dict[str, Callable[[], str]] = {"numba": _version_of_numba, "llvmlite": _version_of_llvmlite}


class CompileError(QrunError, RuntimeError):
    """A kernel did not compile. The message carries the compiler's last words."""


def symbol(key: str) -> str:
    return "qrun_" + "".join(c if c.isalnum() else "_" for c in key)


def symbol_for_windows(key: str) -> str:
    return "windows_" + symbol(key)


@functools.cache
def _initialize_llvm() -> None:
    """Have LLVM ready for the code of any machine."""
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


@functools.cache
def code_digest(target: Target) -> str:
    """A name for all that the machine code of kernels depends on: their sources, the compilers, and the target."""
    digest = hashlib.sha256(f"{target!r} {sources_digest()} {sys.version}".encode())
    for package, oldest in OLDEST.items():
        digest.update(_compiler_version(package, oldest).encode())
    return digest.hexdigest()[:24]


def _compiler_version(package: str, oldest: tuple[int, int]) -> str:
    """The version of Numba or llvmlite that is installed. ImportError if there is none, or one that is too old."""
    wanted = f"{package} {'.'.join(map(str, oldest))} or newer"
    version = _recorded_version(package)
    if version is None:  # a packed app may have left such records out
        try:
            version = str(importlib.import_module(package).__version__)
        except ImportError as error:
            raise _not_there(package, oldest, str(error)) from error
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < oldest:
        raise ImportError(
            f"{wanted} is needed to compile kernels, and {version} is installed (pip install --upgrade numba)"
        )
    return version


def _recorded_version(package: str) -> str | None:
    """What the installation's records say, as a rule the name of a folder: reading them would take longer than loading
    what is compiled."""
    place = compiler_place(package)
    if place is not None:
        with contextlib.suppress(OSError):
            names = [name for name in os.listdir(place.parents[1]) if name.startswith(f"{package}-")]
            versions = [name[len(package) + 1 : -len(".dist-info")] for name in names if name.endswith(".dist-info")]
            if len(versions) == 1:
                return versions[0]
    from importlib.metadata import PackageNotFoundError

    try:
        return _VERSIONS[package]()
    except PackageNotFoundError:
        return None


def _not_there(package: str, oldest: tuple[int, int], why: str) -> ImportError:
    wanted = f"{package} {'.'.join(map(str, oldest))} or newer"
    return ImportError(
        f"{wanted} is needed to compile kernels, and cannot be imported ({why}). Where pip finds no wheel of it, this "
        "version of Python or this system is not among those that Numba supports"
    )


def compiler_place(package: str) -> Path | None:
    """Where Numba or llvmlite lies, without importing it; None if it is not there."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def require_compiler() -> None:
    """ImportError if nothing can be compiled here."""
    for package, oldest in OLDEST.items():
        if compiler_place(package) is None:
            raise _not_there(package, oldest, f"No module named '{package}'")


def last_words(error: BaseException) -> str:
    """The last line of what an error says."""
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


_one_at_a_time = ForkAwareLock()  # importing Numba is not safe in two threads at once, nor is what follows


def compile_kernel(key: str, target: Target) -> bytes:
    """The image of one kernel (see `linker`). Raises CompileError; threads that call at once wait for each other."""
    try:
        for_windows = symbol_for_windows(key) if target.is_x86 else None
        return link(object_file(key, target), symbol(key), for_windows).to_bytes()
    except MemoryError:
        raise
    except Exception as error:
        hint = _untried_numba()
        if isinstance(error, ImportError) and not hint:
            raise
        raise CompileError(f"the kernel {key} did not compile: {last_words(error)}{hint}") from error


def _untried_numba() -> str:
    """What a message ends with where Numba is newer than those that have been tried; nothing otherwise."""
    version = _recorded_version("numba") or ""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) <= NEWEST:
        return ""
    newest = ".".join(map(str, NEWEST))
    return f" (Numba {version} is newer than {newest}, the last that was tried: pip install 'numba<={newest}.99')"


def object_file(key: str, target: Target) -> bytes:
    """What LLVM makes of one kernel."""
    with _one_at_a_time:
        module, machine = _optimized_module(key, target)
        return bytes(machine.emit_object(module))


def assembly(key: str, target: Target) -> str:
    """The assembly of one kernel, to look at."""
    with _one_at_a_time:
        module, machine = _optimized_module(key, target)
        return str(machine.emit_assembly(module))


@contextlib.contextmanager
def _no_optimization(config: Any) -> Iterator[None]:
    """Have Numba skip its own passes: one O3 run for the target follows."""
    before, config.OPT = config.OPT, config._OptLevel("0")
    try:
        yield
    finally:
        config.OPT = before


@functools.cache
def _set_options() -> None:
    """Options of LLVM that hold for the whole process: one that compiles and nothing else, but in a packed app."""
    import llvmlite.binding as llvm

    # Loop strength reduction would make sixteen pointers of one pointer and a stride, and keep them on the stack.
    llvm.set_option("qrun", "--disable-lsr")


# The head of a function in LLVM's text, where attributes can be put in. See `linker` for why they are needed.
_DEFINITION = re.compile(r"^(define [^\n]*\))( comdat)? (?=\{$)", re.M)


def _optimized_module(key: str, target: Target):  # type: ignore[no-untyped-def]
    import llvmlite.binding as llvm
    from numba.core import compiler, config, types
    from numba.core.compiler import Flags
    from numba.core.compiler_lock import global_compiler_lock

    from qrun.engine import kernels
    from qrun.engine.simd.frontend import KernelCompiler, begin_kernel, kernel_target

    flags: Any = Flags()
    flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    # Numba's own lock keeps out what else in this process is compiled by Numba, in an app that has uses of its own.
    with global_compiler_lock, _no_optimization(config), compiling_for(target):
        function = kernels.build(key)
        begin_kernel()
        result = compiler.compile_extra(
            kernel_target.typing_context, kernel_target.target_context, function, (types.intp,) * 3, types.none, flags,
            {}, pipeline_class=KernelCompiler,
        )  # fmt: skip
    ir, count = _DEFINITION.subn(r"\1 #900\2 ", str(result.library.with_all_it_calls()))
    inner = result.fndesc.llvm_func_name
    # Numba's convention is (result*, exception**, arguments...) -> status; kernels return nothing and raise nothing.
    ir += f"""
define void @{symbol(key)}(i64 %op, i64 %step, i64 %thread) #900 {{
  %result = alloca ptr
  %exception = alloca ptr
  %status = call i32 @"{inner}"(ptr %result, ptr %exception, i64 %op, i64 %step, i64 %thread)
  ret void
}}
attributes #900 = {{ noredzone "probe-stack"="inline-asm" }}
"""
    entries = {symbol(key)}
    if target.is_x86:
        entries.add(symbol_for_windows(key))
        ir += f"""
define win64cc void @{symbol_for_windows(key)}(i64 %op, i64 %step, i64 %thread) #900 {{
  call void @{symbol(key)}(i64 %op, i64 %step, i64 %thread) noinline
  ret void
}}
"""
    _initialize_llvm()
    _set_options()
    module = llvm.parse_assembly(ir)
    module.triple = target.triple
    definitions = [function for function in module.functions if not function.is_declaration]
    if len(definitions) != count + len(entries):
        raise CompileError("the form of LLVM's text is not as it was")  # some function would lack its attributes
    for definition in definitions:
        if definition.name not in entries:
            definition.linkage = "internal"
    # What no system has for itself: macOS and Windows take x18.
    features = f"{target.features},+reserve-x18" if target.is_arm else target.features
    machine = llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=features, opt=3, reloc="pic", codemodel="default"
    )
    module.data_layout = str(machine.target_data)
    # Kernels are written in vectors: LLVM's own vectorisers would only slow the compilation.
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = tuning.slp_vectorization = False
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)
    module.verify()
    return module, machine


