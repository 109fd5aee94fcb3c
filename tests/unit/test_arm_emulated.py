"""The machine code for Arm, run under emulation: every kernel gives the bits that this machine's own kernels give.

What is added across the lanes of a vector (norms, attention) is compared with this machine's code for vectors of four.
"""

from dataclasses import replace

import numpy as np
import pytest

from qrun.engine.kernels import records as R
from qrun.engine.kernels.unpack import TYPES, Quantised
from qrun.engine.program.kv_cache import head_bytes
from qrun.engine.simd.target import host_target, machine_target
from tests.arm_emulator import EmulatedKernels
from tests.kernel_harness import ALL_FORMS, Harness, random_tensor, types_of

CACHES = ("f16", "q8_0", "q4_0") if ALL_FORMS else ("f16", "q8_0")
ROWS = [f"{name}-" for name in ("add", "scale", "softcap", "silu", "gelu", "rope", "select_rows")]
TESTED = types_of("neon-dotprod")
KEYS = [
    *(f"{name}-{type_}" for name in ("matmul", "embed") for type_ in TESTED), *(f"append-{cache}" for cache in CACHES),
    "pack-q8", "pack-f32", *ROWS,
]  # fmt: skip
ACROSS_LANES = ["rms_norm-", "rms_norm-q8", *(f"attention-{cache}-{heads}" for cache in CACHES for heads in (1, 3))]
QUANTISED = {name: TYPES[name] for name in TESTED if isinstance(TYPES[name], Quantised)}
# Without dot products, how many products may be added in int16 depends on their limit alone: a type of each.
OLDER_TYPES = {spec.limit: name for name, spec in reversed(QUANTISED.items())}.values()


@pytest.fixture(scope="module")
def arm() -> Harness:
    """An Arm CPU with dot products."""
    return Harness(machine_target("neon-dotprod"), [*KEYS, *ACROSS_LANES], EmulatedKernels)


@pytest.fixture(scope="module")
def older_arm() -> Harness:
    """An Arm CPU without them. What has no integer products is the same code."""
    return Harness(machine_target("neon"), [*(f"matmul-{name}" for name in OLDER_TYPES), "pack-q8"], EmulatedKernels)


@pytest.fixture(scope="module")
def host() -> Harness:
    return Harness(host_target(), KEYS)


@pytest.fixture(scope="module")
def narrow_host() -> Harness:
    """This machine, with vectors and panels as on Arm."""
    arm = machine_target("neon-dotprod")
    target = replace(host_target("plain"), lanes=arm.lanes, columns=arm.columns)
    return Harness(target, [*ACROSS_LANES, *(f"append-{cache}" for cache in CACHES), "pack-q8", "pack-f32"])


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes() and (a.dtype != np.float32 or not np.isnan(a).any())


def check_matmul(rng: np.random.Generator, arm: Harness, host: Harness, name: str) -> None:
    width = 768 if name in QUANTISED else 61
    for rows, columns in ((19, 1), (19, 3), (19, 8), (11, 20), (3, 3)):
        raw, _ = random_tensor(rng, name, rows, width)
        x = rng.normal(size=(columns, width)).astype(np.float32)
        assert same_bits(arm.matmul(name, raw, rows, x), host.matmul(name, raw, rows, x)), (rows, columns)


def check_largest_sums(rng: np.random.Generator, arm: Harness, host: Harness, name: str) -> None:
    """Weights that are all alike times activations of -127 and 127: sums that int16 would not hold are in int32."""
    x = np.stack([np.ones(256), -np.ones(256), rng.choice([-1, 1], 256)]).astype(np.float32)
    for byte in (0x00, 0x77, 0x7F, 0x80, 0xFF):
        raw, _ = random_tensor(rng, name, 4, 256, byte)
        assert same_bits(arm.matmul(name, raw, 4, x), host.matmul(name, raw, 4, x)), byte


@pytest.mark.parametrize("name", TESTED)
def test_matmul(rng: np.random.Generator, arm: Harness, host: Harness, name: str) -> None:
    check_matmul(rng, arm, host, name)
    if name in QUANTISED:
        check_largest_sums(rng, arm, host, name)


@pytest.mark.parametrize("name", OLDER_TYPES)
def test_matmul_without_dot_products(rng: np.random.Generator, older_arm: Harness, host: Harness, name: str) -> None:
    check_matmul(rng, older_arm, host, name)
    check_largest_sums(rng, older_arm, host, name)


@pytest.mark.parametrize("name", TESTED)
def test_embedding(rng: np.random.Generator, arm: Harness, host: Harness, name: str) -> None:
    width = 512 if name in QUANTISED else 509
    raw, _ = random_tensor(rng, name, 7, width)
    tokens = np.array([3, 0, 6, 3], np.int64)
    assert same_bits(arm.embed(name, raw, 7, width, tokens, 2.5), host.embed(name, raw, 7, width, tokens, 2.5))


def test_every_float16_is_read_alike(arm: Harness, host: Harness) -> None:
    halves = np.arange(1 << 16).astype(np.uint16).view(np.float16)
    halves = halves[~np.isnan(halves)]
    a, b = (h.embed("F16", halves.view(np.uint8), 1, len(halves), np.zeros(1, np.int64)) for h in (arm, host))
    assert same_bits(a, b)


def test_packing(rng: np.random.Generator, arm: Harness, narrow_host: Harness) -> None:
    x = (rng.normal(size=(8, 96)) * 10.0 ** rng.integers(-36, 36, (8, 96))).astype(np.float32)
    x[0, :16], x[1, 16:32] = 0.0, 1e-35
    ties = np.arange(-31, 33, 2, dtype=np.float32) / 2
    x[2, :16], x[3, :16] = np.append(ties[:15], 127), np.append(ties[15:30], -127)
    for packing in ("q8", "f32"):
        assert same_bits(arm.packed(x, packing), narrow_host.packed(x, packing))
        assert same_bits(arm.packed(x[:1], packing), narrow_host.packed(x[:1], packing))


@pytest.mark.parametrize("width", [1, 15, 64, 97])
def test_rows(rng: np.random.Generator, arm: Harness, host: Harness, narrow_host: Harness, width: int) -> None:
    x, z = (rng.normal(0, 3, (5, width)).astype(np.float32) for _ in range(2))
    x.flat[:2], x.flat[-2:] = (80.0, 1e-4), (-95.0, -0.0)
    chosen = np.array([4, 0, 2, 2, 1], np.int64)
    weight = rng.normal(size=width).astype(np.float32)
    for key in ("add-", "scale-", "softcap-", "silu-", "gelu-"):
        assert same_bits(*(h.rows(key, x, z, ROW_FACTOR=0.3) for h in (arm, host))), key
    assert same_bits(*(h.rows("select_rows-", x, step={R.SELECTED: chosen.ctypes.data}) for h in (arm, host)))
    fields = {"ROW_FACTOR": 1e-5, "ROW_WEIGHT": weight.ctypes.data}
    assert same_bits(*(h.rows("rms_norm-", x, **fields) for h in (arm, narrow_host)))


def test_a_norm_that_packs(rng: np.random.Generator, arm: Harness, narrow_host: Harness) -> None:
    x = rng.normal(size=(9, 96)).astype(np.float32)
    packed = [np.zeros(16 * 96 // 32 * R.PACKED_BYTES, np.uint8) for _ in range(2)]
    for harness, out in zip((arm, narrow_host), packed, strict=True):
        harness.rows("rms_norm-q8", x, ROW_FACTOR=1e-6, ROW_PACKED=out.ctypes.data)
    assert same_bits(*packed)


@pytest.mark.parametrize("interleaved", [0, 1])
def test_rope(rng: np.random.Generator, arm: Harness, host: Harness, interleaved: int) -> None:
    x = rng.normal(size=(4, 96)).astype(np.float32)
    positions, table = np.array([0, 3, 9, 4], np.int64), rng.uniform(-1, 1, (10, 10, 2)).astype(np.float32)
    fields = {
        "ROW_ROPE_HEAD_DIM": 32, "ROW_ROPE_DIMS": 20, "ROW_ROPE_INTERLEAVED": interleaved,
        "ROW_ROPE_TABLE": table.ctypes.data,
    }  # fmt: skip
    step = {R.POSITIONS: positions.ctypes.data}
    assert same_bits(*(h.rows("rope-", x, step=step, **fields) for h in (arm, host)))


class Cache:
    """Pages of one layer, filled and attended to by the kernels of one harness. Keys are longer than values."""

    kv_heads, dim_k, dim_v = 2, 80, 48

    def __init__(self, harness: Harness, cache_type: str) -> None:
        self.harness, self.cache_type = harness, cache_type
        self.k_bytes, self.v_bytes = head_bytes(self.dim_k, cache_type), head_bytes(self.dim_v, cache_type)
        self.pages = np.zeros((3, self.kv_heads * (self.k_bytes + self.v_bytes)), np.uint8)
        self.table = np.array([page.ctypes.data for page in self.pages], np.int64)

    def append(self, k: np.ndarray, v: np.ndarray) -> None:
        """Put rows of keys [n, kv_heads * dim_k] and values at positions 0 .. n - 1."""
        n = len(k)
        positions, tables = np.arange(n), np.full(n, self.table.ctypes.data)
        fields = {
            R.KV_K: k.ctypes.data, R.KV_K_STRIDE: k.strides[0], R.KV_V: v.ctypes.data, R.KV_V_STRIDE: v.strides[0],
            R.KV_EVERY: 1, R.KV_HEADS: self.kv_heads, R.KV_DIM_K: self.dim_k, R.KV_DIM_V: self.dim_v,
            R.KV_V_OFFSET: self.kv_heads * self.k_bytes, R.KV_K_HEAD_BYTES: self.k_bytes,
            R.KV_V_HEAD_BYTES: self.v_bytes,
        }  # fmt: skip
        step = {R.POSITIONS: positions.ctypes.data, R.PAGE_TABLES: tables.ctypes.data}
        self.harness.run(f"append-{self.cache_type}", fields, n, step)

    def attend(self, q: np.ndarray, first: int, window: int, softcap: float, together: int) -> np.ndarray:
        """Queries [n, heads * dim_k] of positions `first` .. first + n - 1: one tile."""
        n, heads = len(q), q.shape[1] // self.dim_k
        out = np.full((n, heads * self.dim_v), np.nan, np.float32)
        tile, tables = np.array([0, n, first, first + n, 0]), np.full(n, self.table.ctypes.data)
        fields = {
            R.ATT_Q: q.ctypes.data, R.ATT_Q_STRIDE: q.strides[0], R.ATT_OUT: out.ctypes.data,
            R.ATT_OUT_STRIDE: out.strides[0], R.ATT_HEADS: heads, R.ATT_KV_HEADS: self.kv_heads,
            R.ATT_DIM_K: self.dim_k, R.ATT_DIM_V: self.dim_v, R.ATT_V_OFFSET: self.kv_heads * self.k_bytes,
            R.ATT_K_HEAD_BYTES: self.k_bytes, R.ATT_V_HEAD_BYTES: self.v_bytes, R.ATT_SCALE: 0.3,
            R.ATT_SOFTCAP: softcap, R.ATT_WINDOW: window, R.ATT_OF_TILE: R.TILE_END, R.ATT_BEFORE: 1 << 40,
        }  # fmt: skip
        step = {R.N_TILES: 1, R.TILES: tile.ctypes.data, R.PAGE_TABLES: tables.ctypes.data}
        self.harness.run(f"attention-{self.cache_type}-{together}", fields, n, step)
        return out


@pytest.mark.parametrize("cache_type", CACHES)
def test_attention_over_what_was_appended(
    rng: np.random.Generator, arm: Harness, host: Harness, narrow_host: Harness, cache_type: str
) -> None:
    k = rng.normal(size=(150, Cache.kv_heads * Cache.dim_k)).astype(np.float32)
    v = rng.normal(size=(150, Cache.kv_heads * Cache.dim_v)).astype(np.float32)
    v[:, :32] *= np.float32(10.0) ** rng.integers(-12, 4, (150, 32))  # float16's denormals are among them
    k[7], v[7, :40] = 0.0, -1e-30
    caches = [Cache(harness, cache_type) for harness in (arm, host, narrow_host)]
    for cache in caches:
        cache.append(k, v)
    assert same_bits(caches[0].pages, caches[1].pages)
    q = rng.normal(size=(8, 6 * Cache.dim_k)).astype(np.float32)
    for rows, first, window, softcap, together in (
        (8, 142, 1 << 40, 0.0, 3), (5, 60, 37, 2.0, 3), (1, 149, 1 << 40, 0.0, 3), (1, 63, 20, 5.0, 1),
    ):  # fmt: skip
        results = [cache.attend(q[:rows], first, window, softcap, together) for cache in (caches[0], caches[2])]
        assert same_bits(*results), (rows, first)
