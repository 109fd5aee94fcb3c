"""The CPU that kernels are compiled for, and which instructions they may use there."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import sys
from collections.abc import Iterator, Mapping

from qrun.engine.cpu.features import V8_2, architecture, host_features
from qrun.engine.errors import QrunError
from qrun.formats.dataclass import dataclass

FORMS = ("best", "amx", "amx-folded", "avx512-vnni", "avx512", "avx-vnni", "avx2", "plain")
# What tiles are made with: all CPUs with AMX have it.
AMX = frozenset(
    {"amx-tile", "amx-bf16", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avx512fp16"}
)


@dataclass(frozen=True)
class Target:
    """A CPU as the kernels see it.

    lanes: float32 values in one vector register. A row group of a matrix has that many rows.
    dot: how four int8 products are added: "vnni" (vpdpbusd), "avx2" (vpmaddubsw, vpmaddwd), "dotprod" (sdot),
    "neon" (smull, saddlp) or "plain" (vector arithmetic that every LLVM target has).
    columns: how many columns a matrix tile has, so that its accumulators stay in registers.
    tiles: whether matrices are multiplied by AMX, in tiles of bfloat16.
    folded: whether quantised weights are tiles with their scales folded in, also where a column is alone.

    Arm CPUs with matrix products of int8 (i8mm) get "dotprod", too. With smmla the loop over unpacked weights would
    have 135 instructions in the place of 154 for Q4_K (8 columns of 4 rows and 32 weights), 133 of 149 for Q4_0, 118
    of 140 for Q8_0: scales of sums of two rows by two columns lie in no single lane. That is 1.12 to 1.19 times fewer,
    and would need a second form of packed weights and of sums.
    """

    triple: str
    cpu: str
    features: str
    lanes: int
    dot: str
    columns: int
    tiles: bool = False
    folded: bool = False

    @property
    def form(self) -> str:
        """The name of its form: what QRUN_SIMD calls it, or what a kind of machine in MACHINES is called."""
        if self.tiles:
            return "amx-folded" if self.folded else "amx"
        if self.dot == "vnni":
            return "avx512-vnni" if self.lanes == 16 else "avx-vnni"
        if self.dot == "avx2":
            return "avx512" if self.lanes == 16 else "avx2"
        return {"dotprod": "neon-dotprod"}.get(self.dot, self.dot)

    @property
    def whole_tiles(self) -> bool:
        """Whether quantised weights are tiles of whole numbers, where there are many columns."""
        return self.tiles and not self.folded

    @property
    def is_x86(self) -> bool:
        return _is_x86(self.triple)

    @property
    def is_arm(self) -> bool:
        return _is_arm(self.triple)

    def has(self, feature: str) -> bool:
        return f"+{feature}" in self.features.split(",")

    @property
    def converts_half(self) -> bool:
        """Whether instructions convert float16. Without them LLVM would call a function that no process has."""
        return self.has("f16c") if self.is_x86 else self.is_arm

    @property
    def fuses(self) -> bool:
        """Whether a fused multiply-add is one instruction, and no call."""
        return self.has("fma") if self.is_x86 else True

    @property
    def rounds(self) -> bool:
        """Whether rounding a float to a whole number is one instruction, and no call."""
        return self.has("sse4.1") if self.is_x86 else self.is_arm


def _is_x86(triple: str) -> bool:
    return triple.startswith(("x86_64", "i686", "amd64"))


def _is_arm(triple: str) -> bool:
    return triple.startswith(("aarch64", "arm64"))


def choose_target(triple: str, cpu: str, features: Mapping[str, bool], form: str = "best") -> Target:
    """The best of what a CPU has: LLVM's triple and name for it, and LLVM's names of features, present or not.

    form: "best", or another: "amx", "amx-folded", "avx512-vnni" (no AMX), "avx512" (no VNNI, no VBMI either),
    "avx-vnni" (no AVX-512), "avx2", "plain".

    "best" never folds scales. Matrices of 512 columns take 2.2 to 2.7 times less with that than with VNNI, but a column
    alone cannot have the same bits at the speed of memory: unpacking a weight to bfloat16 takes 0.07 nanoseconds of a
    core, and to int8 0.02, where memory brings a weight of Q4_K in 0.04 (Emerald Rapids).
    """
    if form not in FORMS:
        raise ValueError(f"QRUN_SIMD is {form!r}: it can be {', '.join(FORMS[:-1])} or {FORMS[-1]}")
    features = dict(sorted(features.items()))
    has = {name for name, present in features.items() if present}
    folded, tiles = form == "amx-folded", form.startswith("amx") or (form == "best" and has >= AMX)
    if tiles and not has >= AMX:
        lacking = ", ".join(sorted(AMX - has))
        raise ValueError(f"QRUN_SIMD is {form!r}, and this machine (or its system) lacks {lacking}")
    if not tiles:
        features = {name: present and not name.startswith("amx") for name, present in features.items()}
    wide = {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= has and form in FORMS[:5]
    if not wide:
        # AVX10 names imply AVX-512.
        features = {name: present and not name.startswith(("avx512", "avx10")) for name, present in features.items()}
    if form in ("avx512", "avx2"):
        features = {name: present and not re.search("vnni|vbmi", name) for name, present in features.items()}
    has = {name for name, present in features.items() if present}
    if form == "plain":
        lanes, dot, columns = 8 if _is_x86(triple) and "avx" in has else 4, "plain", 4
    elif _is_x86(triple) and wide:
        lanes, dot, columns = 16, "vnni" if "avx512vnni" in has else "avx2", 16 if folded else 8
    elif _is_x86(triple) and {"avx2", "fma", "f16c"} <= has:
        lanes, dot, columns = 8, "vnni" if "avxvnni" in has else "avx2", 4
    elif _is_arm(triple):
        lanes, dot, columns = 4, "dotprod" if "dotprod" in has else "neon", 8
    else:
        lanes, dot, columns = 4, "plain", 4
    text = ",".join(("+" if present else "-") + name for name, present in features.items())
    return Target(triple, cpu, text, lanes, dot, columns, tiles, folded)


# Kinds of machines by name, of each family from the one that has most: triple, LLVM's name of a CPU that has no more
# than that, and its features as far as LLVM or the kernels make use of them. Code for a triple runs on all systems: the
# format and the convention of calls are the loader's matter (see `engine.native.linker`).
_X86, _ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
_V2 = ("sse2", "cx16", "popcnt", "sahf", "sse3", "ssse3", "sse4.1", "sse4.2")
_AVX2 = (*_V2, "avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512vl", "avx512dq")
MACHINES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    **dict.fromkeys(("amx", "amx-folded"), (_X86, "x86-64-v4", (*_AVX512, "avx512vnni", "avx512vbmi", "avx512bf16",
                                                                 "avx512fp16", "amx-tile", "amx-bf16"))),
    "avx512-vbmi": (_X86, "x86-64-v4", (*_AVX512, "avx512vnni", "avx512vbmi")),
    "avx512-vnni": (_X86, "x86-64-v4", (*_AVX512, "avx512vnni")),
    "avx512": (_X86, "x86-64-v4", _AVX512),
    "avx-vnni": (_X86, "x86-64-v3", (*_AVX2, "avxvnni")),
    "avx2": (_X86, "x86-64-v3", _AVX2),
    "x86-64": (_X86, "x86-64", ("sse2",)),
    "apple": (_ARM, "apple-m1", V8_2),
    "neon-dotprod": (_ARM, "neoverse-n1", V8_2),
    "neon": (_ARM, "cortex-a72", ("neon",)),
}
TILES = ("amx", "amx-folded")
"""Those of them that a model chooses from: see `folded_target`."""


def machine_target(name: str) -> Target:
    """A kind of machine that is common, by its name in MACHINES."""
    triple, cpu, features = MACHINES[name]
    return choose_target(triple, cpu, dict.fromkeys(features, True), name if name in TILES else "best")


def machine_name(target: Target) -> str | None:
    """The name of a target in MACHINES."""
    return next((name for name in MACHINES if machine_target(name) == target), None)


def usable_machines() -> list[str]:
    """The kinds of machines whose code runs here, the best one first, but for the one whose tiles are folded, which is
    for who asks for it, or for some models (`folded_target`). Which instructions kernels may use hangs on nothing else,
    so that machine code can be made elsewhere. QrunError for a CPU that there are no kernels for."""
    present, family = host_features(), architecture()
    usable = [
        name for name, (triple, _, features) in MACHINES.items()
        if triple.startswith(family) and present >= set(features) and name != "amx-folded"
        and (name != "apple" or sys.platform == "darwin") and (name != "amx" or _may_use_tiles())
    ]  # fmt: skip
    if not usable:
        raise QrunError(f"there are no kernels for this CPU: it is {family}, and x86-64 or 64-bit Arm is needed")
    return usable


@functools.cache
def host_target(form: str | None = None) -> Target:
    """The machine that runs this process. `form` (or QRUN_SIMD) forces another form: see `choose_target`."""
    form = form or os.environ.get("QRUN_SIMD") or "best"
    if form in TILES:
        triple, cpu, features = MACHINES[form]
        present = host_features()
        if not _may_use_tiles():
            present -= {"amx-tile"}
        return choose_target(triple, cpu, {name: name in present for name in features}, form)
    for name in usable_machines():
        triple, cpu, features = MACHINES[name]
        target = choose_target(triple, cpu, dict.fromkeys(features, True), form)
        if form == "plain" or target == machine_target(name):
            return target
    raise AssertionError("every form is that of some machine")


def folded_target() -> Target:
    """The machine for models that read whole texts and write none, as a column alone does not count there: tiles are
    folded where there are some, and QRUN_SIMD does not say otherwise."""
    best = host_target()
    return machine_target("amx-folded") if best.tiles and not os.environ.get("QRUN_SIMD") else best


def _may_use_tiles() -> bool:
    """Ask Linux for leave to use AMX's tiles, for the whole process, its threads and its children by fork."""
    if sys.platform != "linux":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18  # the first is x86-64's number of the system call
    try:
        return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)
    except (OSError, AttributeError):
        return False


_compiled_for: Target | None = None


def target() -> Target:
    """The target that kernels are being compiled for: this host unless `compiling_for` says otherwise."""
    return _compiled_for or host_target()


@contextlib.contextmanager
def compiling_for(chosen: Target) -> Iterator[None]:
    global _compiled_for
    before, _compiled_for = _compiled_for, chosen
    try:
        yield
    finally:
        _compiled_for = before
