"""Which form of the kernels a CPU gets, and whether its machine code has the instructions that it is meant to have."""

import re

import numpy as np
import pytest

from qrun.engine.cpu.features import linux_arm_features
from qrun.engine.kernels import records as R
from qrun.engine.native import codegen
from qrun.engine.simd.target import MACHINES, choose_target, host_target, machine_target
from tests.kernel_harness import ALL_FORMS, Harness

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
AVX512 = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq")


@pytest.mark.parametrize(
    ("name", "lanes", "dot"),
    [("avx2", 8, "avx2"), ("avx512", 16, "avx2"), ("avx512-vnni", 16, "vnni"), ("avx-vnni", 8, "vnni"),
     ("neon", 4, "neon"), ("neon-dotprod", 4, "dotprod"), ("apple", 4, "dotprod"),
     ("x86-64", 4, "plain"), ("amx", 16, "vnni"), ("amx-folded", 16, "vnni")],
)  # fmt: skip
def test_every_kind_of_machine_gets_its_form(name: str, lanes: int, dot: str) -> None:
    target = machine_target(name)
    assert (target.lanes, target.dot) == (lanes, dot)
    assert (target.tiles, target.folded) == (name.startswith("amx"), name == "amx-folded")
    # Forms that differ in nothing but instructions for tables, or in none, have one name.
    same = {"avx512-vbmi": "avx512-vnni", "apple": "neon-dotprod", "x86-64": "plain"}
    assert target.form == same.get(name, name)


def test_part_of_avx512_is_not_avx512() -> None:
    features = dict.fromkeys(AVX512, True) | {"avx512bw": False}
    target = choose_target(X86, "knl", features)
    assert (target.lanes, target.dot) == (8, "avx2")
    assert not target.has("avx512f")


def test_avx2_without_fused_arithmetic_or_half_floats_is_not_enough() -> None:
    for missing in ("fma", "f16c"):
        features = {"avx": True, "avx2": True, "fma": True, "f16c": True, missing: False}
        assert choose_target(X86, "odd", features).dot == "plain"


def test_a_lesser_form_can_be_asked_for() -> None:
    features = dict.fromkeys((*AVX512, "avx", "avx512vnni", "avx512vbmi", "avxvnni"), True)
    chosen = {
        form: choose_target(X86, "cpu", features, form) for form in ("best", "avx512", "avx-vnni", "avx2", "plain")
    }
    dots = [(16, "vnni"), (16, "avx2"), (8, "vnni"), (8, "avx2"), (8, "plain")]
    assert [(t.lanes, t.dot) for t in chosen.values()] == dots and not chosen["avx-vnni"].has("avx512f")
    assert not chosen["avx512"].has("avx512vnni") and not chosen["avx512"].has("avx512vbmi")
    assert chosen["best"].has("avx512vbmi") and not chosen["avx2"].has("avxvnni")
    assert not chosen["plain"].has("avx512f")
    with pytest.raises(ValueError, match=r"QRUN_SIMD is 'mmx': it can be best, amx, .*, avx-vnni, avx2 or plain"):
        choose_target(X86, "cpu", features, "mmx")


def test_tiles_are_used_where_they_are_and_folded_where_that_is_asked_for() -> None:
    triple, cpu, names = MACHINES["amx"]
    features = dict.fromkeys(names, True)
    assert not choose_target(triple, cpu, features, "avx512-vnni").has("amx-tile")
    assert choose_target(triple, cpu, features, "avx512-vnni").dot == "vnni"
    best, folded = (choose_target(triple, cpu, features, form) for form in ("best", "amx-folded"))
    assert best == choose_target(triple, cpu, features, "amx") and best.tiles and best.whole_tiles and not best.folded
    assert folded.tiles and folded.folded and not folded.whole_tiles
    assert not choose_target(triple, cpu, features | {"amx-bf16": False}).tiles
    with pytest.raises(ValueError, match=r"QRUN_SIMD is 'amx', and this machine \(or its system\) lacks amx-tile$"):
        choose_target(triple, cpu, features | {"amx-tile": False}, "amx")


def test_a_cpu_of_another_kind_gets_the_plain_form() -> None:
    target = choose_target("riscv64-unknown-linux-gnu", "generic-rv64", {"f": True, "d": True})
    assert (target.lanes, target.dot) == (4, "plain")
    assert not target.converts_half


def test_what_linux_says_of_arm_cores() -> None:
    big = "Features\t: fp asimd evtstrm asimdhp asimddp i8mm"
    little = "Features\t: fp asimd evtstrm asimddp"
    assert linux_arm_features(f"processor : 0\n{big}\n") == {"neon", "fullfp16", "dotprod", "i8mm"}
    assert linux_arm_features(f"{big}\n{little}\n{little}\n") == {"neon", "dotprod"}
    assert linux_arm_features("model name : x86") == set()


# What the machine code must have, and what it must not have, for matmul and for attention.
INSTRUCTIONS = {
    "avx2": (["vpmaddubsw.*%ymm", "vpmaddwd.*%ymm"], ["vcvtph2ps.*%ymm", "vfmadd231ps.*%ymm"], "zmm|vpdpbusd"),
    "avx512": (["vpmaddubsw.*%zmm", "vpmaddwd.*%zmm"], ["vcvtph2ps.*%zmm", "vfmadd231ps.*%zmm"], "vpdpbusd"),
    "avx512-vnni": (["vpdpbusd.*%zmm"], ["vcvtph2ps.*%zmm", "vfmadd231ps.*%zmm"], "vpmaddubsw"),
    "avx-vnni": ([r"\{vex\}\s*vpdpbusd.*%ymm"], ["vcvtph2ps.*%ymm", "vfmadd231ps.*%ymm"], "zmm|vpmaddubsw"),
    "neon": ([r"smull2?[\s.]", r"addp[\s.]", r"sa(da|dd)lp[\s.]"], [r"fcvtl[\s.]", r"fmla[\s.]"], r"sdot[\s.]"),
    "neon-dotprod": ([r"sdot[\s.].*\[\d\]"], [r"fcvtl[\s.]", r"fmla[\s.]"], r"sa(da|dd)lp[\s.]"),
    "apple": ([r"sdot[\s.].*\[\d\]"], [r"fcvtl[\s.]", r"fmla[\s.]"], r"sa(da|dd)lp[\s.]"),
    "x86-64": (["pmuludq|pmullw|pmaddwd"], ["mulps"], "ymm|vcvtph2ps|vfmadd"),
}


# Kernels of other machines than this one are compiled for these tests alone, seconds each. Attention differs by whether
# there are half floats and fused products; Q8_0 is multiplied in its own way with AVX2 alone.
KERNELS = ("matmul-Q4_K", "matmul-Q8_0", "attention-f16-1", "attention-q8_0-1")
SOME = {"matmul-Q4_K": list(INSTRUCTIONS), "attention-f16-1": ["avx2", "neon", "x86-64"]}
SEEN = [(name, kernel) for kernel in KERNELS for name in (INSTRUCTIONS if ALL_FORMS else SOME.get(kernel, ["avx2"]))]


@pytest.mark.parametrize(("name", "kernel"), SEEN)
def test_the_machine_code_has_the_instructions_of_its_target(name: str, kernel: str) -> None:
    for_matmul, for_attention, unwanted = INSTRUCTIONS[name]
    code = codegen.assembly(kernel, machine_target(name))
    expected = for_attention if kernel.startswith("attention") else []
    if kernel != "attention-f16-1":  # quantised keys are multiplied as a matrix is
        expected = [*expected, *for_matmul]
    if name == "avx2" and "8_0" in kernel:
        expected = [*expected, "vpsignb.*%ymm"]
    for wanted in expected:
        assert re.search(rf"^\s.*{wanted}", code, re.M), wanted
    assert not re.search(rf"^\s.*({unwanted})", code, re.M)
    assert calls_to_elsewhere(code) == set()
    if kernel.startswith("matmul") and name != "x86-64":
        check_hot_loop(name, code)


@pytest.mark.parametrize("kernel", ["matmul-Q4_K", *(["matmul-Q8_0", "matmul-IQ3_S"] if ALL_FORMS else [])])
def test_matrices_are_folded_tiles_in_the_machine_code(kernel: str) -> None:
    code = codegen.assembly(kernel, machine_target("amx-folded"))
    for wanted in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease", "vfmadd[0-9]*ph.*%zmm"):
        assert re.search(rf"^\s.*{wanted}", code, re.M), wanted
    assert not re.search(r"^\s.*(vpdpbusd|vcvtdq2ps.*%xmm)", code, re.M)
    assert calls_to_elsewhere(code) == set()
    # The loop over unpacked weights: two by two tiles, and nothing but addresses beside them.
    blocks = re.split(r"^(?:\.?[A-Za-z_]\w*:.*|\s+j\w+\s.*)$", code, flags=re.M)  # at labels and jumps
    loop = max(blocks, key=lambda block: block.count("tdpbf16ps") / (block.count("\n") + 1))
    products, loads = loop.count("tdpbf16ps"), loop.count("tileloadd")
    assert products % 4 == 0 and loads == products and loop.count("\n") < 4 * products


@pytest.mark.parametrize(
    ("name", "per_column"), [("Q4_K", 3), ("Q6_K", 3), *([("Q8_0", 2), ("IQ3_S", 2)] if ALL_FORMS else [])]
)
def test_whole_numbers_are_tiles_in_the_machine_code(name: str, per_column: int) -> None:
    code = codegen.assembly(f"matmul-{name}-tiles", machine_target("amx"))
    # Few columns are no tiles.
    for wanted in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease", "vpdpbusd.*%zmm"):
        assert re.search(rf"^\s.*{wanted}", code, re.M), wanted
    assert calls_to_elsewhere(code) == set()
    # Sums of two groups by 16 columns are scaled with so many instructions each, the next two are multiplied meanwhile,
    # and the totals stay in registers.
    blocks = re.split(r"^(?:\.?[A-Za-z_]\w*:.*|\s+j\w+\s.*)$", code, flags=re.M)
    loop = max(blocks, key=lambda block: block.count("tilestored") * len(re.findall(r"vfmadd\w*ps.*1to16", block)))
    arithmetic = len(re.findall(r"v(?:mul|fmadd\w*)ps\b", loop))
    tiles = 4 if name == "Q6_K" else 2
    assert arithmetic == 2 * 16 * per_column and loop.count("tdpbf16ps") == loop.count("tilestored") == tiles
    assert len(re.findall(r"vmov\w+\s+%zmm\d+, .*\(", loop)) == 0


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_floats_are_tiles_in_the_machine_code(name: str) -> None:
    code = codegen.assembly(f"matmul-{name}-tiles", machine_target("amx"))
    for wanted in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"):
        assert re.search(rf"^\s.*{wanted}", code, re.M), wanted
    assert calls_to_elsewhere(code) == set()
    blocks = re.split(r"^(?:\.?[A-Za-z_]\w*:.*|\s+j\w+\s.*)$", code, flags=re.M)
    loop = max(blocks, key=lambda block: block.count("tdpbf16ps") / (block.count("\n") + 1))
    products, loads = loop.count("tdpbf16ps"), loop.count("tileloadd")
    # Four row groups take a tile of activations, and nothing but addresses is beside them.
    assert products % (8 if name == "F16" else 4) == 0 and loads == products + products // (8 if name == "F16" else 4)
    assert loop.count("\n") < 4 * products and not re.search(r"%[xyz]mm", loop)


def test_second_moments_are_tiles_in_the_machine_code_for_amx() -> None:
    code = codegen.assembly("moments-add", machine_target("amx"))
    for wanted in ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"):
        assert re.search(rf"^\s.*{wanted}", code, re.M), wanted
    assert calls_to_elsewhere(code) == set()
    assert calls_to_elsewhere(codegen.assembly("moments-pack", machine_target("amx"))) == set()
    blocks = re.split(r"^(?:\.?[A-Za-z_]\w*:.*|\s+j\w+\s.*)$", code, flags=re.M)
    loop = max(blocks, key=lambda block: block.count("tdpbf16ps") / (block.count("\n") + 1))
    # Two by two tiles, and nothing but addresses beside them.
    assert loop.count("tdpbf16ps") % 4 == 0 and loop.count("tileloadd") == loop.count("tdpbf16ps")
    assert loop.count("\n") < 4 * loop.count("tdpbf16ps") and not re.search(r"%[xyz]mm", loop)


@pytest.mark.parametrize("kernel", ["embed-IQ1_M", *(["matmul-IQ3_S", "matmul-IQ2_XXS"] if ALL_FORMS else [])])
def test_groups_of_weights_are_looked_up_by_permutations_where_there_are_some(kernel: str) -> None:
    for name, wanted in (("avx512-vbmi", True), ("avx512-vnni", False)):
        code = codegen.assembly(kernel, machine_target(name))
        assert bool(re.search(r"^\s.*vperm[it]2b.*%zmm", code, re.M)) == wanted
        assert bool(re.search(r"^\s.*vpmultishiftqb.*%zmm", code, re.M)) == wanted
        assert calls_to_elsewhere(code) == set()


def check_hot_loop(name: str, code: str) -> None:
    """The loop over unpacked weights keeps its sums in registers: it touches the stack no more than four times for
    three products (of Q8_0 with AVX2; all others do so less)."""
    product = re.compile(r"\b(vpmaddubsw|vpdpbusd|smull2?|smlal2?|sdot)\b")
    blocks = re.split(r"^\.?[A-Za-z_]\w*:.*$", code, flags=re.M)
    # Of the blocks with a product of eight words for each column, the one with the least else: the others unpack, too.
    enough = 8 * machine_target(name).columns
    block = min((b for b in blocks if len(product.findall(b)) >= enough), key=lambda b: b.count("\n"))
    on_stack = len(re.findall(r"\(%r[sb]p|\[sp|\[x29", block))
    assert 3 * on_stack <= 4 * len(product.findall(block))


def calls_to_elsewhere(code: str) -> set[str]:
    """Functions that are called by name and are not in the code itself, such as the compiler's own helpers."""
    called = set(re.findall(r"^\s+(?:callq?|jmp|bl|b)\s+([A-Za-z_][\w.]*)", code, re.M))
    return {name for name in called if not re.search(rf"^{re.escape(name)}:", code, re.M)}


@pytest.fixture(scope="module")
def oldest() -> Harness:
    """The kernels as an x86-64 without any extension gets them, on this machine."""
    host = host_target()
    if not host.is_x86:
        pytest.skip("needs an x86-64")
    return Harness(choose_target(host.triple, *MACHINES["x86-64"][1:2], {"sse2": True}), ["embed-F16", "append-f16"])


def test_float16_is_read_without_instructions_for_it(oldest: Harness) -> None:
    halves = np.arange(1 << 16).astype(np.uint16).view(np.float16)
    out = oldest.embed("F16", halves.view(np.uint8), 1, len(halves), np.zeros(1, np.int64))[0]
    assert np.array_equal(out, halves.astype(np.float32), equal_nan=True)


def test_float16_is_written_without_instructions_for_it(rng: np.random.Generator, oldest: Harness) -> None:
    bits = rng.integers(0, 1 << 32, (64, 32), np.uint32)
    bits[:, 16:] = (bits[:, 16:] & 0x87FFFFFF) + 0x30000000  # exponents near those of float16
    bits[0, 16:24] = 0x38801000 + 0x1000 * np.arange(8)  # halfway between two float16s
    x = bits.view(np.float32)
    x[np.isnan(x)] = np.inf
    page = np.zeros((2, 64 * 32), np.float16)
    table, positions = np.array([page.ctypes.data], np.int64), np.arange(64)
    tables = np.full(64, table.ctypes.data, np.int64)
    fields = {
        R.KV_K: x.ctypes.data, R.KV_K_STRIDE: 128, R.KV_V: x.ctypes.data, R.KV_V_STRIDE: 128, R.KV_HEADS: 1,
        R.KV_DIM_K: 32, R.KV_DIM_V: 32, R.KV_V_OFFSET: page[0].nbytes, R.KV_K_HEAD_BYTES: page[0].nbytes,
        R.KV_V_HEAD_BYTES: page[0].nbytes, R.KV_EVERY: 1,
    }  # fmt: skip
    step = {R.POSITIONS: positions.ctypes.data, R.PAGE_TABLES: tables.ctypes.data}
    oldest.run("append-f16", fields, 64, step)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    assert np.array_equal(page[1].view(np.uint16), expected.reshape(-1).view(np.uint16))
    assert np.array_equal(page[0].view(np.uint16), expected.T.reshape(-1).view(np.uint16))
