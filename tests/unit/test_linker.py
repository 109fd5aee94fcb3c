"""Object files to images, and images in memory: every kind of reference, what is refused, and whose pages they are."""

import contextlib
import ctypes
import gc
import os
import platform
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qrun.engine.cpu.code_memory import CodeMemory
from qrun.engine.native import codegen
from qrun.engine.native.compiler import Kernels
from qrun.engine.native.linker import AARCH64, HEADER, X86_64, Image, LinkError, link, placed
from qrun.engine.native.team import called_as_on_windows
from qrun.engine.simd.target import host_target, machine_target
from tests.kernel_harness import Harness, random_tensor

llvm = pytest.importorskip("llvmlite.binding")

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc")
on_x86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or sys.platform == "win32", reason="runs code of x86-64"
)

# Calls of a function of its own (twice), constants of 4 to 32 bytes, and a table.
MODULE = """
@table = private unnamed_addr constant [4 x i64] [i64 3, i64 -5, i64 7000, i64 11], align 8
@bytes = private unnamed_addr constant [3 x i8] c"\\05\\06\\07", align 1

define internal i64 @helper(i64 %x, i64 %place) noinline {
  %slot = getelementptr i64, ptr @table, i64 %place
  %value = load i64, ptr %slot
  %product = mul i64 %value, %x
  ret i64 %product
}

define void @kernel(i64 %op, i64 %step, i64 %thread) {
  %out = inttoptr i64 %op to ptr
  %one = call i64 @helper(i64 %step, i64 %thread)
  %two = call i64 @helper(i64 %one, i64 2)
  store i64 %two, ptr %out
  %next = getelementptr i8, ptr %out, i64 8
  %integer = uitofp i64 %step to double
  %scaled = fmul double %integer, 0x3FD3333333333333
  store double %scaled, ptr %next
  %vector = getelementptr i8, ptr %out, i64 16
  %four = load <4 x float>, ptr %vector, align 4
  %sum = fadd <4 x float> %four, <float 1.0, float 2.5, float -3.0, float 0.125>
  store <4 x float> %sum, ptr %vector, align 4
  %after = getelementptr i8, ptr %out, i64 32
  %byte = getelementptr i8, ptr @bytes, i64 %thread
  %loaded = load i8, ptr %byte
  store i8 %loaded, ptr %after
  ret void
}

define win64cc void @windows_kernel(i64 %op, i64 %step, i64 %thread) {
  call void @kernel(i64 %op, i64 %step, i64 %thread) noinline
  ret void
}
"""


def compiled(text: str, triple: str = X86, model: str = "default", reloc: str = "pic", opt: int = 2) -> bytes:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.initialize_native_asmparser()  # of what is written in assembly
    module = llvm.parse_assembly(text)
    machine = llvm.Target.from_triple(triple).create_target_machine(opt=opt, reloc=reloc, codemodel=model)
    module.triple, module.data_layout = triple, str(machine.target_data)
    return bytes(machine.emit_object(module))


def relocation_kinds(content: bytes) -> set[int]:
    (start,), (count,) = struct.unpack_from("<Q", content, 40), struct.unpack_from("<H", content, 60)
    kinds = set()
    for index in range(count):
        _, type_, _, _, offset, size, *_ = struct.unpack_from("<IIQQQQIIQQ", content, start + 64 * index)
        if type_ == 4:
            kinds |= {info & 0xFFFFFFFF for _, info, _ in struct.iter_unpack("<QQq", content[offset : offset + size])}
    return kinds


def call(address: int, *arguments: int) -> None:
    ctypes.CFUNCTYPE(None, *(ctypes.c_int64,) * len(arguments))(address)(*arguments)


def operand() -> np.ndarray:
    memory = np.zeros(5, np.int64)
    memory[2:4].view(np.float32)[:] = 0.1, 0.2, 0.3, 0.4
    return memory


def expected(step: int, thread: int) -> bytes:
    memory = operand()
    memory[0] = [3, -5, 7000, 11][thread] * step * 7000
    memory[1:2].view(np.float64)[0] = step * 0.3
    memory[2:4].view(np.float32)[:] += np.array([1.0, 2.5, -3.0, 0.125], np.float32)
    memory[4] = [5, 6, 7][thread]
    return memory.tobytes()


@on_x86
def test_calls_constants_and_tables_are_found_wherever_the_code_lies() -> None:
    content = compiled(MODULE)
    assert relocation_kinds(content) == {2, 4}  # PC32 and PLT32
    image = link(content, "kernel", "windows_kernel")
    assert image.machine == X86_64 and image.entry_windows not in (None, image.entry)
    code, starts = placed([image] * 3)
    assert starts[0] == 0 and all(start % 64 == 0 for start in starts)
    memory = CodeMemory(code)
    for start in starts:
        for thread in range(3):
            out = operand()
            call(memory.address + start + image.entry, out.ctypes.data, 5, thread)
            assert out.tobytes() == expected(5, thread)


# A caller by the convention of Windows: it calls the address with its first two arguments and 3, and writes into the
# buffer that is its third what the call has left of xmm6, xmm15, rsi and rdi.
CALLER_OF_WINDOWS = (
    "5356574883ec204889d30f1033440f103b4889f94889f241b803000000be11110000bf2222000048b8",
    "ffd00f117310440f117b204889733048897b384883c4205f5e5bc3",
)


# A kernel that changes what it may by the convention of System V.
CLOBBER = """
define void @kernel(i64 %op, i64 %step, i64 %thread) {
  call void asm sideeffect "xorps %xmm6, %xmm6; xorps %xmm15, %xmm15; xor %edi, %edi; xor %esi, %esi",
    "~{xmm6},~{xmm15},~{rdi},~{rsi}"()
  %out = inttoptr i64 %op to ptr
  store i64 %step, ptr %out
  %next = getelementptr i8, ptr %out, i64 8
  store i64 %thread, ptr %next
  ret void
}
"""


@on_x86
def test_windows_has_an_entry_of_its_own_that_keeps_what_windows_wants_kept() -> None:
    image = link(compiled(CLOBBER + MODULE[MODULE.index("define win64cc") :]), "kernel", "windows_kernel")
    memory = CodeMemory(image.code)
    before, after = map(bytes.fromhex, CALLER_OF_WINDOWS)
    assert image.entry_windows is not None
    caller = CodeMemory(before + struct.pack("<Q", memory.address + image.entry_windows) + after)
    out, kept = np.zeros(4, np.int64), np.zeros(8, np.int64)
    kept[:2] = 0x1234567890ABCDEF, 0x0FEDCBA098765432
    call(caller.address, out.ctypes.data, 7, kept.ctypes.data)
    assert out.tolist() == [7, 3, 0, 0], "op, step and thread came as they were given"
    assert kept.tolist() == [kept[0], kept[1]] * 3 + [0x1111, 0x2222]


@on_x86
def test_a_function_of_windows_is_called_with_room_on_the_stack() -> None:
    """The function that is called writes into the 32 bytes that are its own by Windows' convention, and counts."""
    count = np.zeros(1, np.int64)
    callee = bytes.fromhex("48b8") + struct.pack("<Q", count.ctypes.data)  # mov rax, count
    callee += bytes.fromhex("48ff00")  # inc qword [rax]
    callee += b"".join(bytes.fromhex(f"48c74424{offset:02x}ffffffff") for offset in (8, 16, 24, 32)) + b"\xc3"
    function = CodeMemory(callee)
    bridge = CodeMemory(called_as_on_windows(function.address))
    call(bridge.address)
    call(bridge.address)
    assert count[0] == 2


def test_arm_code_finds_its_constants_and_functions() -> None:
    unicorn = pytest.importorskip("unicorn")
    arm64 = pytest.importorskip("unicorn.arm64_const")
    # What others could have another function for is called by a relocation; the linker's answer is the one there is.
    text = MODULE[: MODULE.index("define win64cc")].replace("define internal", "define")
    kinds = set()
    for opt in (0, 2):
        content = compiled(text, ARM, opt=opt)
        kinds |= relocation_kinds(content)
        image = link(content, "kernel")
        assert (image.machine, image.entry_windows) == (AARCH64, None)
        code, starts = placed([image, image])
        assert starts[1] % 4096 == 0
        cpu = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        base, data, stack = 0x7_0000_0000, 0x1000_0000, 0x2000_0000
        for place in (base, data, stack):
            cpu.mem_map(place, 1 << 16)
        cpu.mem_write(base, code)
        for start in starts:
            cpu.mem_write(data, operand().tobytes())
            for register, value in (
                (arm64.UC_ARM64_REG_X0, data), (arm64.UC_ARM64_REG_X1, 5), (arm64.UC_ARM64_REG_X2, 1),
                (arm64.UC_ARM64_REG_SP, stack + (1 << 15)), (arm64.UC_ARM64_REG_LR, data + 0x8000),
            ):  # fmt: skip
                cpu.reg_write(register, value)
            cpu.emu_start(base + start + image.entry, data + 0x8000)
            assert bytes(cpu.mem_read(data, 40)) == expected(5, 1)
    assert {275, 277, 283} <= kinds and kinds & {278, 284, 285, 286, 299}  # page, add, call, and a load


@pytest.mark.parametrize(
    ("triple", "text", "why"),
    [
        (X86, "declare void @f()\n define void @kernel() {\n call void @f()\n ret void }", "outside of it"),
        (ARM, "declare void @f()\n define void @kernel() {\n call void @f()\n ret void }", "outside of it"),
        (X86, "@v = internal global i64 7\n define ptr @kernel() {\n %x = load i64, ptr @v\n %y = add i64 %x, 1\n"
              "store i64 %y, ptr @v\n ret ptr @v }", "variables of its own"),
        (X86, "@v = internal global i64 0\n define void @kernel() {\n store i64 1, ptr @v\n ret void }",
         "variables of its own"),
        (X86, "@v = internal thread_local global i64 0\n define void @kernel() {\n store i64 1, ptr @v\n ret void }",
         "variables of its own|not known|outside"),
        (X86, "@t = internal unnamed_addr constant [2 x ptr] [ptr @kernel, ptr @t]\n define ptr @kernel(i64 %i) {\n"
              "%a = getelementptr ptr, ptr @t, i64 %i\n %b = load ptr, ptr %a\n ret ptr %b }", "variables of its own"),
        (X86, "define void @other() { ret void }", "no function kernel"),
    ],
)  # fmt: skip
def test_what_an_image_cannot_have_is_refused(triple: str, text: str, why: str) -> None:
    with pytest.raises(LinkError, match=why):
        link(compiled(text, triple), "kernel")


def test_absolute_addresses_are_refused() -> None:
    text = MODULE[: MODULE.index("define win64cc")]
    with pytest.raises(LinkError, match=r"relocations of kind 1 are not known here \(x86-64\)"):
        link(compiled(text, model="large", reloc="static"), "kernel")
    with pytest.raises(LinkError, match=r"relocations of kind 2\d\d are not known here \(AArch64\)"):
        link(compiled(text, ARM, model="large", reloc="static"), "kernel")


def test_damaged_object_files_are_refused_and_never_crash() -> None:
    content = compiled(MODULE)
    for size in (0, 3, 17, 63, 64, 200, len(content) // 2, len(content) - 1):
        with pytest.raises(LinkError):
            link(content[:size], "kernel")
    random_ = random.Random(7)
    for _ in range(500):
        damaged = bytearray(content)
        for _ in range(random_.randrange(1, 6)):
            damaged[random_.randrange(len(damaged))] = random_.randrange(256)
        with contextlib.suppress(LinkError):
            link(bytes(damaged), "kernel")


def test_an_image_is_read_as_it_was_written_and_refused_when_it_is_not_whole() -> None:
    image = Image(AARCH64, 4, None, bytes(range(40)))
    assert Image.from_bytes(image.to_bytes()) == image
    windows = Image(X86_64, 0, 39, bytes(40))
    content = windows.to_bytes()
    assert Image.from_bytes(content) == windows
    for damaged in (
        b"", content[:-1], content + b"\0", content[: HEADER.size - 1], b"x" + content[1:],
        Image(X86_64, 40, None, bytes(40)).to_bytes(), Image(X86_64, 0, 40, bytes(40)).to_bytes(),
        Image(3, 0, None, bytes(40)).to_bytes(), Image(X86_64, 0, None, b"").to_bytes(),
    ):  # fmt: skip
        with pytest.raises(LinkError):
            Image.from_bytes(damaged)


def test_code_of_another_kind_of_cpu_is_not_loaded() -> None:
    other = AARCH64 if host_target().is_x86 else X86_64
    with pytest.raises(LinkError, match="the machine code of scale- is for another kind of CPU"):
        Kernels({"scale-": Image(other, 0, None, bytes(16)).to_bytes()})


def pages(address: int) -> str | None:
    """What may be done with the memory at an address: "r-xp"."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(number, 16) for number in line.split()[0].split("-"))
        if first <= address < last:
            return line.split()[1]
    return None


RETURN = b"\xc3" if host_target().is_x86 else bytes.fromhex("c0035fd6")


@on_linux
def test_code_can_be_run_and_not_written_to_and_goes_when_nobody_holds_it() -> None:
    memory = CodeMemory(RETURN * 5000)
    assert memory.address % os.sysconf("SC_PAGE_SIZE") == 0 and memory.size >= 5000
    assert {pages(memory.address), pages(memory.address + memory.size - 1)} == {"r-xp"}
    call(memory.address)
    other = CodeMemory(RETURN)
    address = memory.address
    del memory
    gc.collect()
    assert pages(address) in (None, "rw-p")  # given back, perhaps to others
    assert pages(other.address) == "r-xp"
    with pytest.raises(ValueError, match="no code"):
        CodeMemory(b"")


@on_linux
def test_a_child_process_runs_the_code_and_leaves_it_to_its_parent() -> None:
    memory = CodeMemory(RETURN)
    child = os.fork()
    if not child:
        call(memory.address)
        memory.__dict__.clear()
        del memory
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    call(memory.address)


class OldKernels:
    """The same object files, loaded by LLVM's own linker."""

    def __init__(self, objects: dict[str, bytes]) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        for content in objects.values():
            self._engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(content))
        self._engine.finalize_object()

    def function(self, key: str) -> Callable[[int, int, int], None]:
        address = self._engine.get_function_address(codegen.symbol(key))
        return ctypes.CFUNCTYPE(None, *(ctypes.c_int64,) * 3)(address)


@pytest.mark.parametrize("form", ["best", "plain"])
def test_kernels_compute_the_same_bits_as_by_llvm_s_own_loader(rng: np.random.Generator, form: str) -> None:
    keys = ["embed-Q4_K", "scale-"]
    target = host_target(form)
    objects = {key: codegen.object_file(key, target) for key in keys}
    images = {key: link(content, codegen.symbol(key)).to_bytes() for key, content in objects.items()}
    raw, _ = random_tensor(rng, "Q4_K", 8, 512)
    x = rng.normal(size=(5, 300)).astype(np.float32)
    results = []
    for kernels in (Kernels(images), OldKernels(objects)):
        harness = Harness(target, keys, lambda keys, target, kernels=kernels: kernels)  # type: ignore[misc]
        embedded = harness.embed("Q4_K", raw, 8, 512, np.array([3, 0, 7, 7], np.int64), 0.5)
        results.append((embedded, harness.rows("scale-", x, ROW_FACTOR=0.37)))
    assert not np.isnan(results[0][0]).any() and not np.isnan(results[0][1]).any()
    for new, old in zip(*results, strict=True):
        assert new.tobytes() == old.tobytes()


@on_x86
def test_no_code_uses_what_windows_and_macos_keep_for_themselves() -> None:
    assert not re.search(r"\b[xw]18\b", codegen.assembly("attention-f16-1", machine_target("neon")))
    large = codegen.assembly("attention-q8_0-1", machine_target("avx2"))
    assert "cmpq\t%r11, %rsp" in large, "a frame of several pages touches each of them"
    assert "-8(%rsp)" not in large


IN_A_SANDBOX = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(65, 1, 0, 0, 0):  # PR_SET_MDWE: no page is to be run from that could be written to
    sys.exit("this kernel has no such thing")
from qrun.engine.cpu.code_memory import CodeMemory
if sys.argv[2] == "none":
    def memfd_create(name): raise OSError(38, "Function not implemented")
    os.memfd_create = memfd_create
try:
    memory = CodeMemory(bytes.fromhex(sys.argv[1]))
except PermissionError as error:
    sys.exit(f"refused: {error}")
ctypes.CFUNCTYPE(None)(memory.address)()
print([line.split()[1] for line in open("/proc/self/maps") if line.startswith(f"{memory.address:x}-")])
"""


@on_linux
@pytest.mark.parametrize("files", ["in memory", "none"])
def test_code_where_no_page_may_become_one_to_run_from(files: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_A_SANDBOX, RETURN.hex(), files], capture_output=True, text=True, timeout=60
    )
    if "no such thing" in done.stderr:
        pytest.skip(done.stderr)
    if files == "in memory":
        assert (done.returncode, done.stdout) == (0, "['r-xp']\n"), done.stderr
    else:
        assert "refused: [Errno 13] the system gives no memory that code may be run from" in done.stderr
