"""Running the machine code of Arm kernels on any CPU: their images, and QEMU's emulation (Unicorn).

The emulated CPU sees this process's memory at its own addresses: records and arrays are passed as to a native kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from qrun.engine.native.compiler import load_images
from qrun.engine.native.linker import Image
from qrun.engine.simd.target import Target

unicorn: Any = pytest.importorskip("unicorn")  # there are no wheels for some platforms
arm64: Any = pytest.importorskip("unicorn.arm64_const")

# Where code and stack lie: at 128 GiB, where no system puts what a process has.
CODE, STACK, STACK_BYTES = 0x20_0000_0000, 0x21_0000_0000, 1 << 20
# A kernel returns to this address, where the emulation ends.
RETURN = CODE - 0x1000
PAGE = 1 << 16


class EmulatedKernels:
    """Kernels for an Arm target, in the place of `engine.native.compiler.Kernels`."""

    def __init__(self, keys: Sequence[str], target: Target) -> None:
        # The oldest CPU that has the instructions: any other instruction is an error.
        old = target.dot == "neon"
        self._cpu = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self._cpu.ctl_set_cpu_model(arm64.UC_CPU_ARM64_A72 if old else arm64.UC_CPU_ARM64_MAX)
        self._addresses: dict[str, int] = {}
        place = CODE
        for key, content in load_images(keys, target).items():
            image = Image.from_bytes(content)
            size = -(-len(image.code) // PAGE) * PAGE
            self._cpu.mem_map(place, size, unicorn.UC_PROT_READ | unicorn.UC_PROT_EXEC)
            self._cpu.mem_write(place, image.code)
            self._addresses[key] = place + image.entry
            place += size
        self._cpu.mem_map(RETURN, 0x1000)
        self._cpu.mem_map(STACK, STACK_BYTES)
        self._cpu.hook_add(unicorn.UC_HOOK_MEM_READ_UNMAPPED | unicorn.UC_HOOK_MEM_WRITE_UNMAPPED, _share_memory)

    def function(self, key: str) -> Callable[[int, int, int], None]:
        address = self._addresses[key]

        def call(op: int, step: int, thread: int) -> None:
            for register, value in (
                (arm64.UC_ARM64_REG_X0, op), (arm64.UC_ARM64_REG_X1, step), (arm64.UC_ARM64_REG_X2, thread),
                (arm64.UC_ARM64_REG_SP, STACK + STACK_BYTES), (arm64.UC_ARM64_REG_LR, RETURN),
            ):  # fmt: skip
                self._cpu.reg_write(register, value)
            self._cpu.emu_start(address, RETURN)

        return call


def _share_memory(cpu: unicorn.Uc, access: int, address: int, size: int, value: int, data: Any) -> bool:
    """Let the emulated CPU see the pages of this process around an address that it does not see yet."""
    if address < PAGE:
        return False  # an error of the emulation, and no crash of this process
    for page in {address // PAGE * PAGE, (address + size - 1) // PAGE * PAGE}:
        with contextlib.suppress(unicorn.UcError):  # one of two is mapped already
            cpu.mem_map_ptr(page, PAGE, unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE, page)
    return True
