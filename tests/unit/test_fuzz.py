"""Damaged files: every one opens or is one FormatError, in no time and no more memory than its size accounts for."""

import random
import signal
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from gguf_builder import FORMATS, Tensor, array, build, scalar

from qrun.formats import FormatError, GGUFReader, TensorType, ValueType
from qrun.formats.blocks import BLOCK_FORMATS, BLOCK_SIZES

V = ValueType

SECONDS = 2.0  # on a machine that is busy with other things; a variant takes a few milliseconds
# The worst that a byte of a file can turn into: 12 bytes are an empty array within an array, over 100 in NumPy, and
# 24 are a tensor of no weights, described by several objects.
MEMORY_PER_BYTE = 64
MEMORY_AT_LEAST = 1 << 16


def tensors(rng: random.Random) -> list[Tensor]:
    """One of every type, decodable or not."""
    made = []
    for type in TensorType:
        block_size, block_bytes = BLOCK_SIZES[type]
        made.append(Tensor(f"blk.{type.value}.weight", type, (2 * block_size, 2), rng.randbytes(4 * block_bytes)))
    return made


def valid_files() -> list[bytes]:
    rng = random.Random(0)
    one_of_each = [(type.name, scalar(type, 1)) for type in FORMATS]
    arrays = [(f"{type.name}s", array(type, [0, 1, 1])) for type in FORMATS]
    nested = array(V.ARRAY, [array(V.STRING, ["a", "b"]), array(V.ARRAY, [array(V.BOOL, [1]), array(V.INT8, [])])])
    vocabulary = [
        ("general.architecture", scalar(V.STRING, "llama")),
        ("tokenizer.ggml.tokens", array(V.STRING, [f"token {i}" for i in range(50)])),
        ("tokenizer.ggml.scores", array(V.FLOAT32, list(range(50)))),
    ]
    split = [("split.no", scalar(V.UINT16, 0)), ("split.count", scalar(V.UINT16, 1))]
    alignment = [("general.alignment", scalar(V.UINT32, 64))]
    return [
        build([*one_of_each, *arrays, ("nested", nested)], tensors(rng)[:3]),
        build([*vocabulary, *split], tensors(rng)),
        build([*alignment, *vocabulary[:1]], tensors(rng)[:8], version=2, alignment=64),
    ]


def flip_bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 1, 1, 4, 32])):
        data[position(data, rng)] ^= 1 << rng.randrange(8)


def truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def splice_number(data: bytearray, rng: random.Random) -> None:
    """Put a length, count or offset where one may stand, and where none does."""
    size = len(data)
    number = rng.choice(
        [0, 1, size - 1, size, size + 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
    )
    code = rng.choice(["<I", "<Q"])
    encoded = struct.pack(code, number & (2**32 - 1 if code == "<I" else 2**64 - 1))
    at = position(data, rng)
    data[at : at + len(encoded)] = encoded


def splice_count(data: bytearray, rng: random.Random) -> None:
    """One of the two counts of the header."""
    struct.pack_into("<Q", data, rng.choice([8, 16]), rng.choice([0, 1, 2, 2**16, 2**32, 2**63, 2**64 - 1]))


def scramble_header(data: bytearray, rng: random.Random) -> None:
    start = rng.choice([4, 24, position(data, rng)])
    length = rng.randrange(1, 64)
    data[start : start + length] = rng.randbytes(length)


def move_bytes(data: bytearray, rng: random.Random) -> None:
    """Delete some, or insert a copy of some, so that all that follows is out of step."""
    start, length, at = position(data, rng), rng.randrange(1, 40), position(data, rng)
    piece = data[start : start + length]
    if rng.random() < 0.5:
        del data[start : start + length]
    data[at:at] = piece


def position(data: bytearray, rng: random.Random) -> int:
    """Somewhere, mostly in the header, where damage does most."""
    return rng.randrange(len(data) if rng.random() < 0.2 else min(len(data), 2000))


DAMAGES: list[Callable[[bytearray, random.Random], None]] = [
    flip_bits, truncate, splice_number, splice_number, splice_count, scramble_header, move_bytes
]  # fmt: skip


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Fail if the block takes more of the processor's time, even if it never ends."""

    def fail(*_: object) -> None:
        raise AssertionError(f"still busy after {seconds} seconds")

    if not hasattr(signal, "setitimer"):
        yield
        return
    previous = signal.signal(signal.SIGPROF, fail)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def touch_everything(path: Path) -> bool:
    """Open a file and look at all that is in it. Whether it was found right."""
    try:
        with GGUFReader(path) as reader:
            for key, (_, item_type) in reader.metadata_types.items():
                assert key in reader.metadata
                repr(reader.metadata[key])
                if item_type == V.STRING:
                    assert len(reader.raw_strings(key)) == len(reader.metadata[key])
            for tensor in reader.tensors.values():
                assert tensor.raw.size == tensor.n_bytes
                if tensor.type in BLOCK_FORMATS:
                    assert tensor.dequantize().shape == tensor.shape
                else:
                    with pytest.raises(FormatError):
                        tensor.dequantize()
    except FormatError as error:
        assert "\n" not in str(error)
        assert str(error).startswith(f"{path}: ")
        return False
    return True


@pytest.fixture
def peak_memory() -> Iterator[Callable[[], int]]:
    """The peak since it was last asked for, in bytes, of what Python and NumPy allocate."""
    tracemalloc.start()

    def peak() -> int:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        return most

    yield peak
    tracemalloc.stop()


def test_the_undamaged_files_are_right(tmp_path: Path) -> None:
    for data in valid_files():
        (tmp_path / "valid.gguf").write_bytes(data)
        assert touch_everything(tmp_path / "valid.gguf")


@pytest.mark.parametrize("batch", range(10))
def test_a_hundred_damaged_files(tmp_path: Path, batch: int, peak_memory: Callable[[], int]) -> None:
    files = valid_files()
    outcomes = []
    for seed in range(100 * batch, 100 * (batch + 1)):
        rng = random.Random(seed)
        data = bytearray(rng.choice(files))
        damages = rng.choices(DAMAGES, k=rng.choice([1, 1, 2]))
        for damage in damages:
            if len(data) >= 24:
                damage(data, rng)
        path = tmp_path / f"damaged-{seed}.gguf"
        path.write_bytes(data)
        held, _ = tracemalloc.get_traced_memory()
        peak_memory()
        with time_limit(SECONDS):
            outcomes.append(touch_everything(path))
        used = peak_memory() - held
        assert used < MEMORY_AT_LEAST + MEMORY_PER_BYTE * len(data), f"{used} bytes for a file of {len(data)}"
    # Damage that is always, or never, noticed would test nothing.
    assert 5 < np.sum(outcomes) < 95
