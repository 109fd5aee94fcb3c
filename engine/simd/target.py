"""The CPU that kernels are compiled for, and which instructions they may use there."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A CPU as the kernels see it.

    lanes: float32 values in one vector register. A row group of a matrix has that many rows.
    dot: how four int8 products are added: "vnni" (one instruction), "avx2" (pmaddubsw, pmaddwd), "neon" (sdot) or
    "plain" (vector arithmetic that every LLVM target has).
    columns: how many columns a matrix tile has, so that its accumulators stay in registers.
    """

    triple: str
    cpu: str
    features: str
    lanes: int
    dot: str
    columns: int

    @property
    def is_x86(self) -> bool:
        return self.triple.startswith(("x86_64", "i686", "amd64"))

    def has(self, feature: str) -> bool:
        return f"+{feature}" in self.features.split(",")


@functools.cache
def host_target(form: str | None = None) -> Target:
    """The machine that runs this process. `form` (or QRUN_SIMD) forces a lesser one: "avx512", "avx2" or "plain"."""
    import llvmlite.binding as llvm

    triple, cpu = llvm.get_process_triple(), llvm.get_host_cpu_name()
    features = dict(sorted(llvm.get_host_cpu_features().items()))
    form = form or os.environ.get("QRUN_SIMD") or "best"
    if form not in ("best", "avx512", "avx2", "plain"):
        raise ValueError(f"QRUN_SIMD is {form!r}: it can be best, avx512, avx2 or plain")
    has = {name for name, present in features.items() if present}
    wide = {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= has and form in ("best", "avx512")
    if not wide:
        features = {name: present and not name.startswith("avx512") for name, present in features.items()}
    if form == "avx2":
        features = {name: present and "vnni" not in name for name, present in features.items()}
    has = {name for name, present in features.items() if present}
    if form == "plain":
        lanes, dot, columns = 8, "plain", 4
    elif wide:
        lanes, dot, columns = 16, "vnni" if "avx512vnni" in has and form == "best" else "avx2", 8
    elif {"avx2", "fma", "f16c"} <= has:
        lanes, dot, columns = 8, "vnni" if "avxvnni" in has else "avx2", 4
    elif "dotprod" in has:
        lanes, dot, columns = 4, "neon", 8
    else:
        lanes, dot, columns = 4, "plain", 4
    text = ",".join(("+" if present else "-") + name for name, present in features.items())
    return Target(triple, cpu, text, lanes, dot, columns)
