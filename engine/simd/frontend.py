"""What Numba does to kernels before LLVM has them, cut down to what they need.

Kernels are functions of integers, floats and vectors. Most of what Numba knows and looks for is for others: arrays,
containers, closures, exceptions, functions that ordinary Python calls. Without that the same machine code is made in
two thirds of the time. Nor does Numba make code for this process: only its IR is wanted, which may hold another CPU's
instructions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core import imputils, registry, types, typing
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase
from numba.core.compiler_machinery import PassManager
from numba.core.cpu import CPUContext
from numba.core.typed_passes import NativeLowering, NoPythonBackend, NopythonTypeInference, PreLowerStripPhis
from numba.core.typing.templates import Registry
from numba.core.untyped_passes import (
    DeadBranchPrune,
    FixupArgs,
    IRProcessing,
    ReconstructSSA,
    RewriteSemanticConstants,
    TranslateByteCode,
)
from numba.core.utils import threadsafe_cached_property

_PASSES = (
    TranslateByteCode,
    FixupArgs,
    IRProcessing,
    RewriteSemanticConstants,
    DeadBranchPrune,  # of branches that hang on what a kernel is specialised for
    ReconstructSSA,
    NopythonTypeInference,
    PreLowerStripPhis,
    NativeLowering,  # without telling where each variable is used last: nothing is counted, and nothing let go of
    NoPythonBackend,
)


# What `simd.operations` adds, for kernels alone: an app's own code is compiled in the same process.
functions, lowerings = Registry(), imputils.Registry("kernels")


class KernelCompiler(CompilerBase):
    """Numba's passes over one function."""

    def define_pipelines(self) -> list[PassManager]:
        passes = PassManager("kernel")
        for each in _PASSES:
            passes.add_pass(each, each.name())
        passes.finalize()
        return [passes]


class _TypingContext(typing.Context):
    """The types of Python's own operations and of `simd.operations`."""

    def __init__(self) -> None:
        super().__init__()
        self.resolved: dict[tuple[Any, tuple[Any, ...]], Any] = {}

    def resolve_function_type(self, function: Any, args: Any, kws: Any) -> Any:
        """The signature of a call. Numba asks again and again for the same ones, and looks through all there are."""
        if kws or not isinstance(function, types.Function):
            return super().resolve_function_type(function, args, kws)
        call = function, tuple(args)
        if call not in self.resolved:
            self.resolved[call] = super().resolve_function_type(function, args, kws)
        return self.resolved[call]

    def load_additional_registries(self) -> None:
        """NumPy's and others are left out."""
        self.install_registry(functions)

    def refresh(self) -> None:
        """Numba asks for this before each function; see `begin_kernel`."""


class _Library(JITCodeLibrary):
    """The code of one function. Numba would link all that it calls into it, and that again into each of its callers."""

    def finalize(self) -> None:
        self._finalized = True

    def with_all_it_calls(self) -> Any:
        """A module of LLVM's, whole."""
        linked, waiting = set(), list(self._linking_libraries)
        while waiting:
            library = waiting.pop()
            if library not in linked:
                linked.add(library)
                waiting += library._linking_libraries
                self._final_module.link_in(library._get_module_for_linking(), preserve=True)
        return self._final_module


class _TargetContext(CPUContext):
    """How those operations are lowered."""

    def init(self) -> None:
        super().init()
        self.codegen()._library_class = _Library

    def load_additional_registries(self) -> None:
        from numba.cpython import builtins, iterators, numbers, rangeobj, tupleobj  # noqa: F401

        self.install_registry(lowerings)

    def refresh(self) -> None:
        """As that of typing."""

    def get_abi_sizeof(self, ty: Any) -> int:
        """Only debugging information asks for it, and there is none. LLVM would read a module of its own for each."""
        return 0

    def post_lowering(self, module: Any, library: Any) -> None:
        """Numba's own memory management, which others link here, is not wanted."""

    def get_executable(self, library: Any, description: Any, environment: Any) -> Callable[..., None]:
        """Of a function's executable Numba needs no more than the identity of a built-in function: any unlike others
        will do."""
        return [].append


class _Target(registry.CPUTarget):
    @threadsafe_cached_property
    def _toplevel_target_context(self) -> _TargetContext:
        return _TargetContext(self.typing_context, self._target_name)

    @threadsafe_cached_property
    def _toplevel_typing_context(self) -> _TypingContext:
        return _TypingContext()


kernel_target = _Target("cpu")


def begin_kernel() -> None:
    """Have the compiler know the operations that were defined since the last time, as those of a kernel are that has
    just been built, and forget what the last one's gave: that may have been for another machine."""
    kernel_target.typing_context.resolved.clear()
    typing.Context.refresh(kernel_target.typing_context)
    CPUContext.refresh(kernel_target.target_context)


class _Dispatcher(registry.CPUDispatcher):
    targetdescr = kernel_target


def helper(function: Callable[..., Any]) -> Any:
    """A function that kernels call, compiled into each of them."""
    options = {"nopython": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return _Dispatcher(function, targetoptions=options, pipeline_class=KernelCompiler)
