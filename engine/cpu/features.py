"""What the CPU has, in LLVM's names for it, found without LLVM.

An x86 tells by its instruction CPUID, and XGETBV tells which registers the system keeps for a process. Of an Arm CPU
the system tells.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from pathlib import Path

from qrun.engine.cpu.code_memory import CodeMemory


def architecture() -> str:
    """What kind of CPU this process has been made for: "x86_64", "aarch64", or the system's name of another."""
    if os.name == "posix":
        name = os.uname().machine.lower()
    else:
        import sysconfig

        name = sysconfig.get_platform().rpartition("-")[2].lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


@functools.cache
def host_features() -> frozenset[str]:
    """What this CPU has of what kernels are compiled for, and the system lets a process use."""
    if architecture() == "x86_64":
        return frozenset(_x86_features(_Identity()))
    return frozenset(_arm_features()) if architecture() == "aarch64" else frozenset()


# --- x86: Intel, "Software Developer's Manual", volume 2, CPUID, and volume 1, chapter 13 -----------------------------

EAX, EBX, ECX, EDX = range(4)

# The registers that a feature needs the system to keep, as bits of XCR0.
YMM, ZMM, TILES = 0x6, 0xE6, 0x60006

# (leaf, subleaf, register): the features that its bits stand for, by the registers that they need.
X86_BITS: dict[tuple[int, int, int], dict[str, tuple[int, int]]] = {
    (1, 0, EDX): {"sse2": (26, 0)},
    (1, 0, ECX): {
        "sse3": (0, 0), "ssse3": (9, 0), "cx16": (13, 0), "sse4.1": (19, 0), "sse4.2": (20, 0), "movbe": (22, 0),
        "popcnt": (23, 0), "fma": (12, YMM), "avx": (28, YMM), "f16c": (29, YMM),
    },
    (7, 0, EBX): {
        "bmi": (3, 0), "bmi2": (8, 0), "avx2": (5, YMM), "avx512f": (16, ZMM), "avx512dq": (17, ZMM),
        "avx512cd": (28, ZMM), "avx512bw": (30, ZMM), "avx512vl": (31, ZMM),
    },
    (7, 0, ECX): {"avx512vbmi": (1, ZMM), "avx512vnni": (11, ZMM)},
    (7, 0, EDX): {
        "amx-bf16": (22, TILES), "avx512fp16": (23, ZMM), "amx-tile": (24, TILES),
    },
    (7, 1, EAX): {"avxvnni": (4, YMM), "avx512bf16": (5, ZMM)},
    (0x80000001, 0, ECX): {"sahf": (0, 0), "lzcnt": (5, 0)},
}  # fmt: skip
OSXSAVE = 27  # of (1, 0, ECX): there is XGETBV

# void f(uint32 first, uint32 second, uint32 *out), in the registers that Windows passes arguments in.
_CPUID = bytes.fromhex(
    "53"  # push rbx
    "89c8 89d1 0fa2"  # mov eax, ecx; mov ecx, edx; cpuid
    "418900 41895804 41894808 4189500c"  # mov [r8], eax; [r8+4], ebx; [r8+8], ecx; [r8+12], edx
    "5b c3"  # pop rbx; ret
)
_XGETBV = bytes.fromhex("31c9 0f01d0 418900 41895004 c3")  # xor ecx, ecx; xgetbv; mov [r8], eax; [r8+4], edx; ret
_FROM_SYSTEM_V = bytes.fromhex("4989d0 89f2 89f9")  # mov r8, rdx; mov edx, esi; mov ecx, edi


class _Identity:
    """Asks the CPU."""

    def __init__(self) -> None:
        start = b"" if sys.platform == "win32" else _FROM_SYSTEM_V
        first = start + _CPUID
        self._code = CodeMemory(first + start + _XGETBV)
        kind = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)
        self._cpuid, self._xgetbv = kind(self._code.address), kind(self._code.address + len(first))

    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, ...]:
        """EAX, EBX, ECX, EDX; zeros for what the CPU does not know."""
        highest = self._ask(self._cpuid, leaf & 0x80000000, 0)[EAX]
        if leaf > highest or (subleaf and subleaf > self._ask(self._cpuid, leaf, 0)[EAX]):
            return (0, 0, 0, 0)
        return self._ask(self._cpuid, leaf, subleaf)

    def kept(self) -> int:
        """XCR0: which registers the system keeps. Only where there is XGETBV."""
        low, high, *_ = self._ask(self._xgetbv, 0, 0)
        return low | high << 32

    @staticmethod
    def _ask(function: object, leaf: int, subleaf: int) -> tuple[int, ...]:
        out = (ctypes.c_uint32 * 4)()
        function(leaf, subleaf, ctypes.addressof(out))  # type: ignore[operator]
        return tuple(out)


def _x86_features(identity: _Identity) -> set[str]:
    kept = identity.kept() if identity.cpuid(1)[ECX] >> OSXSAVE & 1 else 0
    if sys.platform == "darwin" and kept & YMM == YMM:
        kept |= ZMM  # macOS keeps these from the first time on that a process uses them
    found = set()
    for (leaf, subleaf, register), features in X86_BITS.items():
        word = identity.cpuid(leaf, subleaf)[register]
        found |= {name for name, (bit, needed) in features.items() if word >> bit & 1 and kept & needed == needed}
    return found


# --- Arm --------------------------------------------------------------------------------------------------------------

# Linux's names, and LLVM's.
_LINUX_ARM = {
    "asimd": "neon", "asimddp": "dotprod", "i8mm": "i8mm", "asimdhp": "fullfp16", "atomics": "lse", "asimdrdm": "rdm",
    "lrcpc": "rcpc",
}  # fmt: skip
V8_2 = ("neon", "dotprod", "fullfp16", "lse", "rdm", "rcpc")


def _arm_features() -> set[str]:
    if sys.platform == "darwin":  # the first of Apple's own CPUs for macOS, the M1, has them
        return set(V8_2)
    if sys.platform == "win32":
        is_present = getattr(ctypes, "windll").kernel32.IsProcessorFeaturePresent  # noqa: B009
        # PF_ARM_V81_ATOMIC_, PF_ARM_V82_DP_ and PF_ARM_V83_LRCPC_INSTRUCTIONS_AVAILABLE
        return set(V8_2) if all(is_present(number) for number in (34, 43, 45)) else {"neon"}
    with contextlib.suppress(OSError):
        return linux_arm_features(Path("/proc/cpuinfo").read_text())
    return {"neon"}


def linux_arm_features(cpuinfo: str) -> set[str]:
    """LLVM's names for what /proc/cpuinfo says of an Arm CPU. With cores of several kinds: what all of them have."""
    lines = [line for line in cpuinfo.splitlines() if line.startswith("Features")]
    cores = [{_LINUX_ARM[word] for word in line.split() if word in _LINUX_ARM} for line in lines]
    return set.intersection(*cores) if cores else set()
