"""What the CPU has, asked without LLVM."""

import platform
import sys

import pytest

from qrun.engine.cpu import features
from qrun.engine.cpu.features import ECX, OSXSAVE, X86_BITS, _x86_features, host_features
from qrun.engine.simd import target
from qrun.engine.simd.target import MACHINES, host_target, machine_name, machine_target, usable_machines
from qrun.formats import QrunError

X86_NAMES = {name for bits in X86_BITS.values() for name in bits}


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="LLVM cannot tell of all others")
def test_llvm_has_the_same_view_of_this_machine() -> None:
    llvm = pytest.importorskip("llvmlite.binding")
    said = {name for name, present in llvm.get_host_cpu_features().items() if present}
    assert host_features() == said & X86_NAMES


def test_every_feature_that_a_machine_may_have_is_one_that_is_asked_for() -> None:
    for name, (triple, _, wanted) in MACHINES.items():
        known = X86_NAMES if triple.startswith("x86_64") else set(features._LINUX_ARM.values())
        assert set(wanted) <= known, name


def test_this_machine_s_best_form_is_the_first_that_it_can_run() -> None:
    assert machine_name(host_target("best")) == usable_machines()[0]
    assert usable_machines()[-1] in ("x86-64", "neon")


class Identity:
    """A CPU with some features, under a system that keeps some registers."""

    def __init__(self, present: set[str], kept: int, has_xgetbv: bool = True) -> None:
        self.words: dict[tuple[int, int], list[int]] = {}
        for (leaf, subleaf, register), bits in X86_BITS.items():
            word = sum(1 << bit for name, (bit, _) in bits.items() if name in present)
            self.words.setdefault((leaf, subleaf), [0] * 4)[register] |= word
        self.words[1, 0][ECX] |= has_xgetbv << OSXSAVE
        self.registers, self.has_xgetbv = kept, has_xgetbv

    def cpuid(self, leaf: int, subleaf: int = 0) -> tuple[int, ...]:
        return tuple(self.words[leaf, subleaf])

    def kept(self) -> int:
        assert self.has_xgetbv, "this instruction would end the process"
        return self.registers


@pytest.mark.parametrize(
    ("kept", "has_xgetbv", "wide", "tiles"),
    [(0x600E7, True, True, True), (0xE7, True, True, False), (0x7, True, False, False), (0x3, True, None, False),
     (0, False, None, False)],
)  # fmt: skip
def test_what_the_system_does_not_keep_registers_for_is_not_there(
    monkeypatch: pytest.MonkeyPatch, kept: int, has_xgetbv: bool, wide: bool | None, tiles: bool
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    found = _x86_features(Identity(X86_NAMES, kept, has_xgetbv))  # type: ignore[arg-type]
    assert {"sse4.2", "bmi2", "lzcnt", "popcnt"} <= found
    assert ("avx2" in found) == ("fma" in found) == (wide is not None)
    assert ("avx512vbmi" in found) == bool(wide)
    assert ("amx-tile" in found) == tiles


def test_macos_keeps_wide_registers_once_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "avx512f" in _x86_features(Identity(X86_NAMES, 0x7))  # type: ignore[arg-type]
    assert "avx2" not in _x86_features(Identity(X86_NAMES, 0x3))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "without", "then"), [
    ("amx", "amx-bf16", "avx512-vbmi"), ("avx512-vbmi", "avx512vbmi", "avx512-vnni"),
    ("avx512-vbmi", "avx512cd", "avx2"), ("avx2", "movbe", "x86-64"), ("avx512", "bmi", "x86-64"),
    ("neon-dotprod", "lse", "neon"),
])  # fmt: skip
def test_a_machine_that_lacks_something_gets_the_next_form(
    monkeypatch: pytest.MonkeyPatch, name: str, without: str, then: str
) -> None:
    triple, _, wanted = MACHINES[name]
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(target, "architecture", lambda: triple.partition("-")[0])
    monkeypatch.setattr(target, "_may_use_tiles", lambda: True)
    for present, best in ((set(wanted), name), (set(wanted) - {without}, then)):
        monkeypatch.setattr(target, "host_features", lambda present=present: frozenset(present))
        assert usable_machines()[0] == best
        assert host_target.__wrapped__("best") == machine_target(best)


def test_tiles_are_used_where_the_system_gives_leave_and_folded_for_models_that_only_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(target, "architecture", lambda: "x86_64")
    monkeypatch.setattr(target, "host_features", lambda: frozenset(MACHINES["amx"][2]))
    monkeypatch.setattr(target, "_may_use_tiles", lambda: True)
    monkeypatch.setattr(target, "host_target", host_target.__wrapped__)
    monkeypatch.delenv("QRUN_SIMD", raising=False)
    assert target.host_target() == machine_target("amx")
    assert target.folded_target() == machine_target("amx-folded")
    monkeypatch.setenv("QRUN_SIMD", "avx512-vnni")
    assert target.host_target() == target.folded_target() == machine_target("avx512-vbmi")
    monkeypatch.delenv("QRUN_SIMD")
    monkeypatch.setattr(target, "_may_use_tiles", lambda: False)
    assert target.host_target() == target.folded_target() == machine_target("avx512-vbmi")
    with pytest.raises(ValueError, match=r"lacks amx-tile$"):
        target.host_target("amx")


def test_a_cpu_without_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "architecture", lambda: "riscv64")
    with pytest.raises(QrunError, match="it is riscv64, and x86-64 or 64-bit Arm is needed"):
        usable_machines()


