"""Attention of several rows at once, where a lane of a vector is a query: it is the definition, and every row has the
bits that it has alone, with all that attention can be told to do."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qrun.engine.kernels import records as R
from qrun.engine.program.kv_cache import head_bytes
from qrun.engine.simd.target import host_target
from qrun.models import graph as G
from tests.kernel_harness import Harness
from tests.reference import attention

POSITIONS = 150
REACH = 20


@pytest.fixture(scope="module")
def harness() -> Callable[[str], Harness]:
    made: dict[str, Harness] = {}

    def of(kind: str) -> Harness:
        if kind not in made:
            keys = [f"append-{kind}", *(f"attention-{kind}-{together}" for together in (1, 3))]
            made[kind] = Harness(host_target(), keys)
        return made[kind]

    return of


class Heads:
    """Random keys and values of a sequence in pages, and queries for every position."""

    def __init__(
        self, rng: np.random.Generator, harness: Harness, kind: str, heads: int, kv_heads: int, dim_k: int, dim_v: int
    ) -> None:
        self.harness, self.kind, self.heads, self.kv_heads = harness, kind, heads, kv_heads
        self.dim_k, self.dim_v = dim_k, dim_v
        self.scale = 2.5 * dim_k**-0.5  # scores are as large in wide heads as in narrow ones, and so are their errors
        self.k_bytes, self.v_bytes = head_bytes(dim_k, kind), head_bytes(dim_v, kind)
        pages = -(-POSITIONS // R.PAGE_POSITIONS)
        self.pages = np.full((pages, kv_heads * (self.k_bytes + self.v_bytes)), 0xFF, np.uint8)  # NaN until written
        self.table = np.array([page.ctypes.data for page in self.pages], np.int64)
        self.q = rng.normal(size=(POSITIONS, heads * dim_k)).astype(np.float32)
        k = rng.normal(size=(POSITIONS, kv_heads * dim_k)).astype(np.float32)
        v = rng.normal(size=(POSITIONS, kv_heads * dim_v)).astype(np.float32)
        self.tables = np.full(POSITIONS, self.table.ctypes.data)
        positions = np.arange(POSITIONS)
        fields = {
            R.KV_K: k.ctypes.data, R.KV_K_STRIDE: k.strides[0], R.KV_V: v.ctypes.data, R.KV_V_STRIDE: v.strides[0],
            R.KV_HEADS: kv_heads, R.KV_DIM_K: dim_k, R.KV_DIM_V: dim_v, R.KV_V_OFFSET: kv_heads * self.k_bytes,
            R.KV_K_HEAD_BYTES: self.k_bytes, R.KV_V_HEAD_BYTES: self.v_bytes, R.KV_EVERY: 1,
        }  # fmt: skip
        step = {R.POSITIONS: positions.ctypes.data, R.PAGE_TABLES: self.tables.ctypes.data}
        harness.run(f"append-{kind}", fields, POSITIONS, step)
        dtype = np.float16 if kind == "f16" else np.float32
        self.k, self.v = k.astype(dtype).astype(np.float64), v.astype(dtype).astype(np.float64)

    def attend(self, first: int, rows: int, fields: dict[int, int | float]) -> np.ndarray:
        """The rows of positions `first` .. first + rows - 1, together."""
        out = np.full((rows, self.heads * self.dim_v), np.nan, np.float32)
        tile = np.array([0, rows, first, POSITIONS if fields.get(R.ATT_AHEAD) else first + rows, 0])
        q = self.q[first : first + rows]
        of_heads = {
            R.ATT_Q: q.ctypes.data, R.ATT_Q_STRIDE: q.strides[0], R.ATT_OUT: out.ctypes.data,
            R.ATT_OUT_STRIDE: out.strides[0], R.ATT_HEADS: self.heads, R.ATT_KV_HEADS: self.kv_heads,
            R.ATT_DIM_K: self.dim_k, R.ATT_DIM_V: self.dim_v, R.ATT_V_OFFSET: self.kv_heads * self.k_bytes,
            R.ATT_K_HEAD_BYTES: self.k_bytes, R.ATT_V_HEAD_BYTES: self.v_bytes, R.ATT_SCALE: self.scale,
            R.ATT_WINDOW: 1 << 40, R.ATT_OF_TILE: R.TILE_END, R.ATT_REACH: REACH, R.ATT_BEFORE: 1 << 40,
        }  # fmt: skip
        together = 3 if self.heads // self.kv_heads % 3 == 0 else 1
        step = {R.N_TILES: 1, R.TILES: tile.ctypes.data, R.PAGE_TABLES: self.tables.ctypes.data}
        self.harness.run(f"attention-{self.kind}-{together}", of_heads | fields, rows, step)
        return out


SHAPES = [(6, 2, 80, 48), (2, 2, 20, 33), (3, 1, 576, 576)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 37},
    {"window": 50, "chunked": True},
    {"causal": False},
    {"window": 41, "causal": False, "slopes": True},
    {"softcap": 2.0, "sinks": True},
    {"biases": True, "causal": False},
    {"slopes": True},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["f16", "f32"])
def test_rows_together_are_the_definition_and_have_the_bits_of_each_alone(
    rng: np.random.Generator, harness: Callable[[str], Harness], kind: str, shape: tuple[int, int, int, int]
) -> None:
    heads = Heads(rng, harness(kind), kind, *shape)
    for options in OPTIONS:
        layer = G.CacheLayer(
            heads.heads, heads.kv_heads, heads.dim_k, heads.dim_v, options.get("window"),
            causal=options.get("causal", True), chunked=options.get("chunked", False),
        )  # fmt: skip
        sinks = rng.normal(size=heads.heads).astype(np.float32) if "sinks" in options else None
        slopes = rng.uniform(0, 0.3, heads.heads).astype(np.float32) if "slopes" in options else None
        biases = rng.normal(size=(heads.heads, 2 * REACH + 1)).astype(np.float32) if "biases" in options else None
        page = R.PAGE_POSITIONS
        padded = None if biases is None else np.pad(biases, ((0, 0), (page, page - 1)), "edge")
        fields: dict[int, int | float] = {
            R.ATT_WINDOW: layer.behind or 1 << 40, R.ATT_CHUNKED: int(layer.chunked), R.ATT_AHEAD: layer.ahead,
            R.ATT_SOFTCAP: options.get("softcap", 0.0), R.ATT_SINKS: 0 if sinks is None else sinks.ctypes.data,
            R.ATT_SLOPES: 0 if slopes is None else slopes.ctypes.data,
            R.ATT_BIASES: 0 if padded is None else padded.ctypes.data,
        }  # fmt: skip
        expected = attention(
            heads.q.astype(np.float64), heads.k, heads.v, layer, heads.scale, options.get("softcap"), sinks, slopes,
            biases=biases,
        )  # fmt: skip
        alone = np.concatenate([heads.attend(i, 1, fields) for i in range(POSITIONS)])
        assert np.abs(alone - expected).max() < 2e-5 * np.abs(expected).max(), options
        for first, rows in ((0, 16), (45, 16), (0, 3), (63, 2), (100, 11), (POSITIONS - 5, 5)):
            together = heads.attend(first, rows, fields)
            assert np.array_equal(together, alone[first : first + rows]), (options, first, rows)


def test_a_small_stack_has_room(rng: np.random.Generator, harness: Callable[[str], Harness]) -> None:
    """Threads of an app have 512 KB on some systems. Some of that has been used, and more heads together take more."""
    heads = Heads(rng, harness("f16"), "f16", 3, 1, 256, 256)
    alone = [heads.attend(i, 1, {}) for i in range(40, 56)]
    results: list[np.ndarray] = []
    before = threading.stack_size(400 << 10)
    try:
        thread = threading.Thread(target=lambda: results.append(heads.attend(40, 16, {})))
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert np.array_equal(results[0], np.concatenate(alone))
