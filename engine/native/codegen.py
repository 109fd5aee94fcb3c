"""One kernel from Python to an object file: Numba makes LLVM's IR of it, LLVM the machine code.

Nothing here is imported by a process that only runs models: importing Numba takes longer than loading what is compiled.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

from qrun.engine.native.locks import ForkAwareLock
from qrun.engine.simd.target import Target, compiling_for
from qrun.formats.errors import QrunError

OLDEST = {"numba": (0, 66), "llvmlite": (0, 48)}
"""The first versions that compile all kernels: before them LLVM lacks the products of AVX-512 as they are written."""

# Each name is written out: by that those who pack apps know whose records to take along.
_VERSIONS: dict[str, Callable[[], str]] = {
    "numba": lambda: importlib.metadata.version("numba"),
    "llvmlite": lambda: importlib.metadata.version("llvmlite"),
}


class CompileError(QrunError, RuntimeError):
    """A kernel did not compile. The message carries the compiler's last words."""


def symbol(key: str) -> str:
    return "qrun_" + "".join(c if c.isalnum() else "_" for c in key)


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


@functools.cache
def code_digest(target: Target) -> str:
    """A name for all that the machine code of kernels depends on: their sources, the compilers, and the target."""
    digest = hashlib.sha256(repr(target).encode())
    for package, oldest in OLDEST.items():
        digest.update(_compiler_version(package, oldest).encode())
    digest.update(sys.version.encode())
    # The quantisers' kernels are built from what `formats.blocks` says of the types.
    for package in ("qrun.engine.simd", "qrun.engine.kernels", "qrun.formats.blocks"):
        for name in (package, *_modules_of(package)):
            digest.update(name.encode() + _source(name))
    digest.update(_source(__name__))
    return digest.hexdigest()[:24]


def _compiler_version(package: str, oldest: tuple[int, int]) -> str:
    """The version of Numba or llvmlite that is installed. ImportError if there is none, or one that is too old."""
    wanted = f"{package} {'.'.join(map(str, oldest))} or newer"
    try:
        version = _VERSIONS[package]()
    except importlib.metadata.PackageNotFoundError:  # a packed app may have left such records out
        try:
            version = importlib.import_module(package).__version__
        except ImportError as error:
            raise ImportError(
                f"{wanted} is needed to compile kernels, and cannot be imported ({error}). Where pip finds no wheel of "
                "it, this version of Python or this system is not among those that Numba supports"
            ) from error
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < oldest:
        raise ImportError(
            f"{wanted} is needed to compile kernels, and {version} is installed (pip install --upgrade numba)"
        )
    return version


def _modules_of(package: str) -> list[str]:
    paths = importlib.import_module(package).__path__
    return sorted(f"{package}.{module.name}" for module in pkgutil.iter_modules(paths))


def _source(name: str) -> bytes:
    """A module's source, or where an app was packed without sources, its bytecode."""
    loader: Any = getattr(importlib.util.find_spec(name), "loader", None)
    if loader is None:
        return b""
    source = loader.get_source(name)
    return source.encode() if source is not None else _bytecode(loader.get_code(name))


def _bytecode(code: types.CodeType | None) -> bytes:
    """All that a code object does. Its marshalled form will not do: that depends on what else the process holds."""
    if code is None:
        return b""
    parts: list[object] = [code.co_name, code.co_flags, code.co_argcount, code.co_names, code.co_varnames]
    parts += [code.co_freevars, code.co_cellvars, code.co_code, code.co_exceptiontable]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            parts.append(_bytecode(constant))
        else:  # sets have no order
            parts.append(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)
    return repr(parts).encode()


def last_words(error: BaseException) -> str:
    """The last line of what an error says."""
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


_one_at_a_time = ForkAwareLock()  # importing Numba is not safe in two threads at once, nor is what follows


def compile_kernel(key: str, target: Target) -> bytes:
    """The object file of one kernel. Raises CompileError; threads that call at once wait for each other."""
    try:
        with _one_at_a_time:
            module, machine = _optimized_module(key, target)
            return bytes(machine.emit_object(module))
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise CompileError(f"the kernel {key} did not compile: {last_words(error)}") from error


def assembly(key: str, target: Target) -> str:
    """The assembly of one kernel, to look at."""
    with _one_at_a_time:
        module, machine = _optimized_module(key, target)
        return str(machine.emit_assembly(module))


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


def _optimized_module(key: str, target: Target):  # type: ignore[no-untyped-def]
    import llvmlite.binding as llvm
    from numba.core import compiler, config, registry, types
    from numba.core.compiler import Flags
    from numba.core.compiler_lock import global_compiler_lock

    from qrun.engine import kernels

    cpu = registry.cpu_target
    flags: Any = Flags()
    flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    # Numba's own lock keeps out what else in this process is compiled by Numba, in an app that has uses of its own.
    with global_compiler_lock, _no_optimization(config), _no_host_code(cpu.target_context), compiling_for(target):
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


