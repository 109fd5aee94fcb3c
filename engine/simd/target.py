"""The CPU that kernels are compiled for, and which instructions they may use there."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

FORMS = ("best", "amx", "avx512-vnni", "avx512", "avx2", "plain")
# What tiles are made with: all CPUs with AMX have it. And the forms that use them.
AMX = frozenset(
    {"amx-tile", "amx-bf16", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avx512fp16"}
)
BY_TILES = ("amx",)


@dataclass(frozen=True)
class Target:
    """A CPU as the kernels see it.

    lanes: float32 values in one vector register. A row group of a matrix has that many rows.
    dot: how four int8 products are added: "vnni" (vpdpbusd), "avx2" (vpmaddubsw, vpmaddwd), "dotprod" (sdot),
    "neon" (smull, saddlp) or "plain" (vector arithmetic that every LLVM target has).
    columns: how many columns a matrix tile has, so that its accumulators stay in registers.
    tiles: whether quantised matrices are multiplied by AMX: tiles of bfloat16, in the place of int8 products.

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

    @property
    def form(self) -> str:
        """The name of its form: what QRUN_SIMD calls it, or what a kind of machine in MACHINES is called."""
        if self.tiles:
            return "amx"
        if self.dot == "vnni":
            return "avx512-vnni" if self.lanes == 16 else "avx-vnni"
        if self.dot == "avx2":
            return "avx512" if self.lanes == 16 else "avx2"
        return {"dotprod": "neon-dotprod"}.get(self.dot, self.dot)

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

    form: "best", or another: "amx", "avx512-vnni" (no AMX), "avx512" (no VNNI, no VBMI either), "avx2", "plain".

    "best" leaves AMX out. Matrices of 512 columns take 2.2 to 2.8 times less with it, and prompts of SmolLM2 1.6 times
    less, but a column alone cannot have the same bits at the speed of memory: unpacking a weight to bfloat16 takes 0.07
    nanoseconds of a core, and to int8 0.02, where memory brings a weight of Q4_K in 0.04 (Emerald Rapids).
    """
    if form not in FORMS:
        raise ValueError(f"QRUN_SIMD is {form!r}: it can be {', '.join(FORMS[:-1])} or {FORMS[-1]}")
    features = dict(sorted(features.items()))
    has = {name for name, present in features.items() if present}
    tiles = form in BY_TILES and has >= AMX
    if form == "amx" and not tiles:
        raise ValueError(f"QRUN_SIMD is 'amx', and this machine (or its system) lacks {', '.join(sorted(AMX - has))}")
    if not tiles:
        features = {name: present and not name.startswith("amx") for name, present in features.items()}
    wide = {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= has and form in (*FORMS[:3], "avx512")
    if not wide:
        # AVX10 names imply AVX-512.
        features = {name: present and not name.startswith(("avx512", "avx10")) for name, present in features.items()}
    if form in ("avx512", "avx2"):
        features = {name: present and not re.search("vnni|vbmi", name) for name, present in features.items()}
    has = {name for name, present in features.items() if present}
    if form == "plain":
        lanes, dot, columns = 8 if _is_x86(triple) and "avx" in has else 4, "plain", 4
    elif _is_x86(triple) and wide:
        lanes, dot, columns = 16, "vnni" if "avx512vnni" in has else "avx2", 16 if tiles else 8
    elif _is_x86(triple) and {"avx2", "fma", "f16c"} <= has:
        lanes, dot, columns = 8, "vnni" if "avxvnni" in has else "avx2", 4
    elif _is_arm(triple):
        lanes, dot, columns = 4, "dotprod" if "dotprod" in has else "neon", 8
    else:
        lanes, dot, columns = 4, "plain", 4
    text = ",".join(("+" if present else "-") + name for name, present in features.items())
    return Target(triple, cpu, text, lanes, dot, columns, tiles)


@functools.cache
def host_target(form: str | None = None) -> Target:
    """The machine that runs this process. `form` (or QRUN_SIMD) forces another form: see `choose_target`."""
    import llvmlite.binding as llvm

    triple, features = llvm.get_process_triple(), {}
    with contextlib.suppress(RuntimeError):  # LLVM cannot tell on every system
        features = dict(llvm.get_host_cpu_features())
    form = form or os.environ.get("QRUN_SIMD") or "best"
    if form in BY_TILES and features.get("amx-tile") and not _may_use_tiles():
        features["amx-tile"] = False
    if _is_arm(triple):
        features |= dict.fromkeys(_arm_features(), True)
    return choose_target(triple, llvm.get_host_cpu_name(), features, form)


def _may_use_tiles() -> bool:
    """Ask Linux for leave to use AMX's tiles, for the whole process, its threads and its children by fork."""
    if sys.platform != "linux":
        return False
    import ctypes

    arch_prctl, request_permission, tile_data = 158, 0x1023, 18  # the first is x86-64's number of the system call
    try:
        return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)
    except (OSError, AttributeError):
        return False


def _arm_features() -> Iterable[str]:
    """What the system says of an Arm CPU, in LLVM's names: LLVM itself does not ask on all systems."""
    if sys.platform == "darwin":  # the first of Apple's own CPUs for macOS, the M1, has it (FEAT_DotProd)
        return ("neon", "dotprod")
    if sys.platform == "win32":
        import ctypes

        has_dot_product = ctypes.windll.kernel32.IsProcessorFeaturePresent(43)  # PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE
        return ("neon", "dotprod") if has_dot_product else ("neon",)
    with contextlib.suppress(OSError):
        return linux_arm_features(Path("/proc/cpuinfo").read_text())
    return ()


def linux_arm_features(cpuinfo: str) -> set[str]:
    """LLVM's names for what /proc/cpuinfo says of an Arm CPU. With cores of several kinds: what all of them have."""
    names = {"asimd": "neon", "asimddp": "dotprod", "i8mm": "i8mm", "asimdhp": "fullfp16"}
    lines = [line for line in cpuinfo.splitlines() if line.startswith("Features")]
    cores = [{names[word] for word in line.split() if word in names} for line in lines]
    return set.intersection(*cores) if cores else set()


# Kinds of machines by name: triple, LLVM's name of a CPU, and its features as far as they matter here.
_X86, _ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
_AVX2 = ("sse4.1", "sse4.2", "ssse3", "avx", "avx2", "fma", "f16c", "bmi", "bmi2")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq")
MACHINES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "avx2": (_X86, "haswell", _AVX2),
    "avx512": (_X86, "skylake-avx512", _AVX512),
    "avx512-vnni": (_X86, "icelake-server", (*_AVX512, "avx512vnni")),
    "avx512-vbmi": (_X86, "icelake-server", (*_AVX512, "avx512vnni", "avx512vbmi")),
    "amx": (_X86, "sapphirerapids", (*_AVX512, "avx512vnni", "avx512vbmi", "avx512bf16", "avx512fp16", "amx-tile",
                                     "amx-bf16")),
    "avx-vnni": (_X86, "alderlake", (*_AVX2, "avxvnni")),
    "neon": (_ARM, "cortex-a72", ("neon",)),
    "neon-dotprod": (_ARM, "neoverse-n1", ("neon", "dotprod")),
    "neon-i8mm": (_ARM, "neoverse-v1", ("neon", "dotprod", "i8mm")),
    "apple": ("arm64-apple-darwin", "apple-m1", ("neon", "dotprod")),
    "x86-64": (_X86, "x86-64", ("sse2",)),
}


def machine_target(name: str) -> Target:
    """A kind of machine that is common, by its name in MACHINES: to compile for it elsewhere and look at the result."""
    triple, cpu, features = MACHINES[name]
    return choose_target(triple, cpu, dict.fromkeys(features, True), "amx" if name == "amx" else "best")


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
