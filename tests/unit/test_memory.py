"""What takes more memory than there is: said in a line, with what is needed and what is free."""

from typing import Any

import numpy as np
import pytest

from qrun.cli.main import one_line
from qrun.engine import NotEnoughMemory
from qrun.engine.native.compiler import default_target
from qrun.engine.native.machine import Memory
from qrun.engine.program import arena
from qrun.engine.program.kv_cache import CacheLayout
from qrun.engine.program.lowering import Lowering
from qrun.engine.program.pages import PagePool
from qrun.engine.program.state_blocks import state_sizes
from qrun.formats import FormatError, TensorInfo, TensorType
from qrun.models import build_graph
from tests.sketches import load, model

SKETCHES = load()


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "memory", lambda: Memory(6_000_000_000, 2_000_000_000))


def resized(name: str, numbers: dict[str, int], tensors: dict[str, tuple[int, ...]]) -> Any:
    """A model with other hyper-parameters, and tensors of zeros whose names end so in other shapes."""
    reader = model(SKETCHES[name])
    for key, number in numbers.items():
        reader.metadata[f"{reader.metadata['general.architecture']}.{key}"] = number
    for tensor in reader.tensors:
        for ending, shape in tensors.items():
            if tensor.endswith(ending):
                raw = np.zeros(4 * int(np.prod(shape)), np.uint8)
                reader.tensors[tensor] = TensorInfo(tensor, TensorType.F32, shape, raw.size, 0, reader.path, raw)
    return reader


def place(reader: Any, context: int) -> Lowering:
    graph = build_graph(reader, context)
    layout = CacheLayout(graph.cache_layers, "f16", state_sizes(graph))
    settings = {"batch": 512, "head_rows": 16, "context": context, "threads": 1}
    lowering = Lowering(graph, layout, default_target(), **settings)
    lowering.arena.place(path=graph.path, what="a step of 512 tokens")
    return lowering


@pytest.mark.parametrize(
    ("name", "numbers", "tensors"),
    [
        (
            "minimax-m3-moe-sparse",
            {"attention.head_count": 4096, "attention.head_count_kv": 4096, "attention.indexer.head_count": 4096,
             "attention.indexer.top_k": 1000},
            {"attn_q.weight": (65536, 64), "attn_k.weight": (65536, 64), "attn_v.weight": (65536, 64),
             "attn_output.weight": (64, 65536), "indexer.q_proj.weight": (65536, 64)},
        ),
        (
            "llama-dense",
            {"feed_forward_length": 1 << 20},
            {"ffn_up.weight": (1 << 20, 64), "ffn_up.bias": (1 << 20,), "ffn_gate.bias": (1 << 20,),
              "ffn_gate.weight": (1 << 20, 64), "ffn_down.weight": (64, 1 << 20)},
        ),
    ],
    ids=["chosen positions", "feed forward"],
)  # fmt: skip
def test_a_file_whose_numbers_make_a_step_too_large_is_named(
    name: str, numbers: dict[str, int], tensors: dict[str, tuple[int, ...]]
) -> None:
    reader = resized(name, numbers, tensors)
    with pytest.raises(NotEnoughMemory) as error:
        place(reader, 4096)
    message = str(error.value)
    assert message.startswith(f"{reader.path}: not enough memory: a step of 512 tokens takes ")
    assert message.endswith(" GB, and 2.0 GB are free") and one_line(error.value) == message


def test_memory_that_the_machine_has_but_does_not_give_is_said_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_is_left(*_: object) -> None:
        raise MemoryError("Unable to allocate")

    monkeypatch.setattr(arena.np, "empty", nothing_is_left)
    with pytest.raises(NotEnoughMemory, match=r"^not enough memory: it takes 3.0 GB, and 2.0 GB are free$"):
        arena.reserve(3_000_000_000, "it")


def test_a_context_that_is_too_long_is_named() -> None:
    with pytest.raises(NotEnoughMemory, match=r"a context of 1000000000 tokens takes 128.0 GB, and 2.0 GB are free$"):
        place(model(SKETCHES["llama-dense"]), 1_000_000_000)


def test_pages_that_there_is_no_room_for_are_not_counted() -> None:
    pool = PagePool(1 << 60)
    with pytest.raises(NotEnoughMemory, match=r"the next tokens takes 1152921504.6 GB"):
        pool.take()
    assert pool.allocated == 0 and pool.used_bytes == 0


def test_heads_that_no_kernel_can_compute_are_a_fault_of_the_file() -> None:
    shapes = {"attn_q.weight": (2048, 64), "attn_k.weight": (2048, 64), "attn_v.weight": (2048, 64),
              "attn_output.weight": (64, 2048), "attn_q.bias": (2048,), "attn_k.bias": (2048,),
              "attn_v.bias": (2048,)}  # fmt: skip
    reader = resized("llama-dense", {"attention.key_length": 1024, "attention.value_length": 1024}, shapes)
    with pytest.raises(FormatError, match="has heads of more than 576 dimensions") as error:
        place(reader, 64)
    assert error.value.path == str(reader.path)
