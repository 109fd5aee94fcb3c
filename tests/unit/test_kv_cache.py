"""Pages: shared, copied when written, given back as windows pass."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from qrun.engine.program.kv_cache import CacheLayout, KVSequence
from qrun.engine.program.pages import PagePool
from qrun.models.graph import CacheLayer

FULL, SLIDING = CacheLayer(4, 2, 40, 24, None), CacheLayer(4, 2, 32, 32, 100)


@pytest.fixture
def pools() -> list[PagePool]:
    return [PagePool(size) for size in CacheLayout([FULL, SLIDING, FULL], "f16").page_bytes]


@pytest.fixture
def sequence(pools: list[PagePool]) -> KVSequence:
    return KVSequence(CacheLayout([FULL, SLIDING, FULL], "f16"), pools, 1000, threading.RLock())


def write(sequence: KVSequence, count: int, mark: int) -> None:
    """Advance by `count` positions, writing `mark` into the first byte of the last page of each group."""
    sequence.reserve(count)
    last = (sequence.n_past + count - 1) // 64
    for pages in sequence._pages:
        pages[last].memory[0] = mark
    sequence.advance(count)


def marks(sequence: KVSequence, index: int) -> list[int]:
    return [int(pages[index].memory[0]) for pages in sequence._pages if index in pages]


def test_layout_has_no_overlaps() -> None:
    for cache_type, bits in (("f16", 16), ("q8_0", 8 + 0.5), ("q4_0", 4 + 0.5)):
        layout = CacheLayout([FULL, SLIDING, FULL], cache_type)
        assert layout.groups == [(None, 1), (100, 1)]
        # Dimensions are padded to 32: 2 layers of 2 heads of (64 + 32), 1 of 2 heads of (32 + 32).
        assert layout.page_bytes == [2 * 2 * 96 * 64 * bits / 8, 2 * 64 * 64 * bits / 8]
        spans = []
        for layer, place in zip([FULL, SLIDING, FULL], layout.places, strict=True):
            spans.append((place.group, place.k_offset, place.k_offset + layer.n_kv_heads * place.k_head_bytes))
            spans.append((place.group, place.v_offset, place.v_offset + layer.n_kv_heads * place.v_head_bytes))
        for group in (0, 1):
            mine = sorted(span[1:] for span in spans if span[0] == group)
            assert [start for start, _ in mine] == [0, *[end for _, end in mine[:-1]]]


def test_values_that_are_a_part_of_keys_take_nothing() -> None:
    layer = CacheLayer(16, 1, 576, 512, None, values_in_keys=True)
    assert CacheLayout([layer], "f16").page_bytes == [576 * 64 * 2]
    assert CacheLayout([replace(layer, values_in_keys=False)], "f16").page_bytes == [(576 + 512) * 64 * 2]


def test_layers_that_need_every_digit_are_kept_in_float32() -> None:
    layers = [FULL, replace(FULL, precise=True)]
    for cache_type, kinds in (("f16", ["f16", "f32"]), ("q8_0", ["q8_0", "q8_0"])):
        assert [place.kind for place in CacheLayout(layers, cache_type).places] == kinds
    assert CacheLayout(layers, "f16").page_bytes == [2 * 96 * 64 * (2 + 4)]


def test_layers_of_exact_rows_are_in_float32_whatever_the_cache_is() -> None:
    layers = [replace(FULL, exact=True), FULL]
    for cache_type in ("f16", "q8_0"):
        assert [place.kind for place in CacheLayout(layers, cache_type).places] == ["f32", cache_type]


def test_entries_for_several_positions_take_a_page_for_as_many_times_64() -> None:
    """They are pages as others: shared, copied when written, dropped when the sequence goes back."""
    coarse = CacheLayer(4, 1, 32, 32, None, values_in_keys=True, every=4)
    layout = CacheLayout([FULL, coarse], "f16")
    assert layout.groups == [(None, 1), (None, 4)]
    assert layout.bytes_at(257) == 5 * layout.page_bytes[0] + 2 * layout.page_bytes[1]
    pools = [PagePool(size) for size in layout.page_bytes]
    sequence = KVSequence(layout, pools, 1000, threading.RLock())
    sequence.reserve(257)
    sequence.advance(257)
    assert [sorted(pages) for pages in sequence._pages] == [[0, 1, 2, 3, 4], [0, 1]]
    twin = sequence.fork()
    assert twin.truncate(255) == 255
    assert [sorted(pages) for pages in twin._pages] == [[0, 1, 2, 3], [0]]
    twin.reserve(1)
    assert twin._pages[0][3] is not sequence._pages[0][3] and twin._pages[1][0] is not sequence._pages[1][0]
    other = KVSequence(layout, pools, 1000, threading.RLock())
    other.restore(sequence.state())
    assert other.n_past == 257 and [len(pages) for pages in other._pages] == [5, 2]
    broken = sequence.state() | {"pages1": np.array([0, 5], np.int64)}
    with pytest.raises(ValueError, match="of another model"):
        other.restore(broken)


def test_an_unknown_cache_type_is_named() -> None:
    with pytest.raises(ValueError, match="'f8' is not one of f16, q8_0, q4_0"):
        CacheLayout([FULL], "f8")


def test_tables_hold_the_pages_addresses(sequence: KVSequence) -> None:
    sequence.reserve(130)
    for table, pages in zip(sequence.tables, sequence._pages, strict=True):
        assert sorted(pages) == [0, 1, 2]
        assert table[:3].tolist() == [pages[i].address for i in range(3)]
        assert not table[3:].any() and not (table[:3] % 64).any()


def test_a_fork_shares_pages_until_one_writes(sequence: KVSequence, pools: list[PagePool]) -> None:
    write(sequence, 70, 1)
    before = [pool.allocated for pool in pools]
    twin = sequence.fork()
    assert [pool.allocated for pool in pools] == before and twin.n_past == 70
    write(twin, 1, 2)
    assert marks(sequence, 1) == [1, 1] and marks(twin, 1) == [2, 2]
    assert [pool.allocated for pool in pools] == [n + 1 for n in before]
    assert twin.tables[0, 0] == sequence.tables[0, 0]
    sequence.close()
    assert marks(twin, 0) == [0, 0] and twin.n_past == 71


def test_a_window_gives_pages_back(sequence: KVSequence, pools: list[PagePool]) -> None:
    for _ in range(9):
        write(sequence, 64, 1)
    # Position 576 sees 477 to 576: pages 7 and 8 are left.
    assert sorted(sequence._pages[1]) == [7, 8] and sorted(sequence._pages[0]) == list(range(9))
    assert pools[1].allocated == 3
    assert sequence.tables[1, :7].tolist() == [0] * 7


def test_truncate_keeps_what_windows_allow(sequence: KVSequence) -> None:
    write(sequence, 70, 1)
    assert sequence.truncate(100) == 70
    assert sequence.truncate(66) == 66
    assert sequence.truncate(64) == 64 and sorted(sequence._pages[0]) == [0]
    for _ in range(8):
        write(sequence, 64, 1)
    assert sequence.truncate(575) == 575
    assert sequence.truncate(300) == 0 and sequence.n_past == 0
    assert not sequence.tables.any()


def test_pages_are_reused(sequence: KVSequence, pools: list[PagePool]) -> None:
    write(sequence, 200, 1)
    before = [pool.allocated for pool in pools]
    sequence.truncate(0)
    write(sequence, 200, 2)
    assert [pool.allocated for pool in pools] == before


def test_state_is_restored(sequence: KVSequence, pools: list[PagePool]) -> None:
    for mark in range(1, 10):
        write(sequence, 64, mark)
    other = KVSequence(sequence.layout, pools, 1000, threading.RLock())
    other.restore(sequence.state())
    assert other.n_past == 576 and marks(other, 8) == [9, 9] and marks(other, 0) == [1]
    assert not set(other.tables[0, :9].tolist()) & set(sequence.tables[0, :9].tolist())


def test_a_state_of_another_shape_is_refused(sequence: KVSequence) -> None:
    write(sequence, 100, 1)
    state = sequence.state()
    bad = [
        {**state, "n_past": np.array(5000)},
        {**state, "n_past": np.array(-1)},
        {**state, "data0": state["data0"][:, 1:]},
        {**state, "pages0": state["pages0"][:1]},
        {**state, "pages1": state["pages1"] + 7},
        {key: value for key, value in state.items() if key != "data1"},
    ]
    for damaged in bad:
        with pytest.raises(ValueError, match="the saved state"):
            sequence.restore(damaged)
    assert sequence.n_past == 100 and marks(sequence, 1) == [1, 1]


def test_a_closed_sequence_says_so(sequence: KVSequence) -> None:
    write(sequence, 1, 1)
    sequence.close()
    with pytest.raises(ValueError, match="closed"):
        sequence.reserve(1)
