"""What the writer writes reads back, here and by the reference library; and a copy is the same bytes."""

import errno
import io
import os
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_builder import Tensor, array, build, scalar

from qrun.formats import GGUFReader, GGUFWriter, TensorType, ValueType, write_behind

V = ValueType

VALUES: dict[str, tuple[Any, ValueType, ValueType | None]] = {
    "uint8": (200, V.UINT8, None),
    "int8": (-100, V.INT8, None),
    "uint16": (60000, V.UINT16, None),
    "int16": (-30000, V.INT16, None),
    "uint32": (4_000_000_000, V.UINT32, None),
    "int32": (-2_000_000_000, V.INT32, None),
    "uint64": (2**64 - 1, V.UINT64, None),
    "int64": (-(2**63), V.INT64, None),
    "float32": (0.1, V.FLOAT32, None),
    "float64": (0.1, V.FLOAT64, None),
    "bool": (True, V.BOOL, None),
    "string": ("naïve\n", V.STRING, None),
    "not utf-8": ("\udcff", V.STRING, None),
    "numbers": ([1, 2, 3], V.ARRAY, V.INT32),
    "numpy": (np.array([1.5, 2.5]), V.ARRAY, V.FLOAT32),
    "bools": ([True, False], V.ARRAY, V.BOOL),
    "strings": (["a", "", "c"], V.ARRAY, V.STRING),
    "no numbers": ([], V.ARRAY, V.UINT64),
    "no strings": ([], V.ARRAY, V.STRING),
    "nested": ([np.array([1, 2], dtype="u1"), ["x", "y"], [["z"]]], V.ARRAY, V.ARRAY),
}


def write(path: Path, values: dict[str, tuple[Any, ValueType, ValueType | None]] = VALUES, version: int = 3) -> Path:
    with GGUFWriter(path, version) as writer:
        for key, value in values.items():
            writer.set_metadata(key, *value)
        writer.add_tensor("a", TensorType.F32, (2, 3))
        writer.add_tensor("b", TensorType.Q8_0, (1, 32))
        writer.write_tensor("a", np.arange(6, dtype=np.float32).reshape(2, 3))
        writer.write_tensor("b", bytes(34))
    return path


def plain(value: Any) -> Any:
    """Arrays as lists, to be compared."""
    if isinstance(value, list | np.ndarray):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


@pytest.mark.parametrize("version", [2, 3])
def test_all_that_is_written_reads_back(tmp_path: Path, version: int) -> None:
    with GGUFReader(write(tmp_path / "m.gguf", version=version)) as reader:
        assert reader.version == version
        assert reader.metadata_types == {key: (type, item_type) for key, (_, type, item_type) in VALUES.items()}
        expected = {key: plain(value) for key, (value, _, _) in VALUES.items()} | {"float32": float(np.float32(0.1))}
        assert {key: plain(value) for key, value in reader.metadata.items()} == expected
        assert reader.tensors["a"].dequantize().tolist() == [[0, 1, 2], [3, 4, 5]]
        assert reader.tensors["b"].shape == (1, 32)


def test_what_was_read_can_be_written_as_it_is(tmp_path: Path) -> None:
    first, second = write(tmp_path / "first.gguf"), tmp_path / "second.gguf"
    with GGUFReader(first) as reader, GGUFWriter(second) as writer:
        for key, value in reader.metadata.items():
            writer.set_metadata(key, value, *reader.metadata_types[key])
        writer.copy_tensors(reader)
    assert second.read_bytes() == first.read_bytes()


def test_the_reference_library_reads_it(tmp_path: Path) -> None:
    values = {key: value for key, value in VALUES.items() if key not in ("not utf-8", "nested")}
    reader = gguf.GGUFReader(write(tmp_path / "m.gguf", values))
    assert reader.fields["uint32"].contents() == 4_000_000_000
    assert reader.fields["strings"].contents() == ["a", "", "c"]
    assert [(tensor.name, tensor.shape.tolist()) for tensor in reader.tensors] == [("a", [3, 2]), ("b", [32, 1])]
    np.testing.assert_array_equal(reader.tensors[0].data, np.arange(6, dtype=np.float32).reshape(2, 3))


Q4_0 = Tensor("weird \xff name", TensorType.Q4_0, (64, 2), bytes(range(72)))
IQ1_S = Tensor("unknown", TensorType.IQ1_S, (256,), bytes(range(50)))
NAN = b"\6\0\0\0\1\0\xa0\x7f"  # a signalling NaN, which arithmetic would turn into a quiet one

COPIED = {
    "nothing": build(),
    "no tensors and no padding": build([("k", scalar(V.UINT8, 1))])[:40],
    "version 2": build([("k", scalar(V.STRING, "v"))], [Q4_0], version=2),
    "alignment of 8": build([("general.alignment", scalar(V.UINT32, 8))], [Q4_0, IQ1_S], alignment=8),
    "alignment of 4096": build([("general.alignment", scalar(V.UINT32, 4096))], [Q4_0, IQ1_S], alignment=4096),
    "huge alignment of nothing": build([("general.alignment", scalar(V.UINT32, 2**31))]),
    "bytes that are not text": build([(b"\xff\xfe", scalar(V.STRING, b"\x80")), ("f", NAN)]),
    "nested and empty arrays": build(
        [("n", array(V.ARRAY, [array(V.ARRAY, []), array(V.STRING, []), array(V.BOOL, [1])])), ("e", array(V.INT8, []))]
    ),
    "no padding at the end": build(tensors=[Q4_0])[:-24],
    "more than its tensors at the end": build(tensors=[Q4_0]) + b"trailer",
    "padding that is not zeros": build(tensors=[Q4_0], filler=b"x"),
    "tensors out of order, with gaps": build(
        tensors=[Tensor("b", TensorType.I8, (4,), b"bbbb", 128), Tensor("a", TensorType.I8, (4,), b"aaaa", 0)]
    ) + b"c" * 128,
    "tensors of no weights": build(tensors=[Tensor("none", TensorType.F32, (0, 4), b""), Q4_0]),
}


@pytest.mark.parametrize("data", COPIED.values(), ids=COPIED)
def test_a_copy_is_the_same_bytes(tmp_path: Path, data: bytes) -> None:
    source, target = tmp_path / "source.gguf", tmp_path / "target.gguf"
    source.write_bytes(data)
    with GGUFReader(source) as reader, GGUFWriter.from_reader(target, reader) as writer:
        writer.copy_tensors(reader)
    assert target.read_bytes() == data


def test_a_copy_can_change_metadata_and_alignment(tmp_path: Path) -> None:
    source, target = write(tmp_path / "source.gguf"), tmp_path / "target.gguf"
    with GGUFReader(source) as reader, GGUFWriter.from_reader(target, reader) as writer:
        writer.set_metadata("string", "longer than it was before", V.STRING)
        writer.remove_metadata("nested")
        writer.set_metadata("general.alignment", 256, V.UINT32)
        writer.copy_tensors(reader)
    with GGUFReader(target) as copy:
        assert copy.metadata["string"] == "longer than it was before"
        assert list(copy.metadata) == [*(key for key in VALUES if key != "nested"), "general.alignment"]
        assert [tensor.offset % 256 for tensor in copy.tensors.values()] == [0, 0]
        assert copy.tensors["a"].dequantize().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_file_can_be_rewritten_in_place(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    with GGUFReader(path) as reader, GGUFWriter.from_reader(path, reader) as writer:
        writer.set_metadata("string", "new", V.STRING)
        writer.copy_tensors(reader)
    with GGUFReader(path) as reader:
        assert reader.metadata["string"] == "new"
        assert reader.tensors["a"].dequantize().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_tensors_are_written_in_pieces_of_any_size(tmp_path: Path) -> None:
    data = np.arange(100, dtype=np.float32)
    with GGUFWriter(tmp_path / "m.gguf") as writer:
        writer.add_tensor("t", TensorType.F32, (10, 10))
        for start in range(0, 100, 7):
            writer.write_tensor("t", data[start : start + 7])
    with GGUFReader(tmp_path / "m.gguf") as reader:
        np.testing.assert_array_equal(reader.tensors["t"].dequantize(), data.reshape(10, 10))


# What goes wrong leaves nothing behind


def test_a_failure_leaves_the_target_as_it_was(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="halfway"), GGUFWriter(path) as writer:
        writer.add_tensor("t", TensorType.F32, (4,))
        writer.write_tensor("t", bytes(8))
        assert len(list(tmp_path.iterdir())) == 2
        raise RuntimeError("halfway")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_a_tensor_that_is_not_whole_fails_the_file(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf")
    writer.add_tensor("t", TensorType.F32, (4,))
    writer.write_tensor("t", bytes(8))
    with pytest.raises(ValueError, match="tensor 't' has not been written in full"):
        writer.close()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_told_by_the_files_own_name(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "m.gguf"
    with pytest.raises(FileNotFoundError) as caught, GGUFWriter(path):
        pass
    assert caught.value.filename == str(path)


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """No file can grow beyond that: the nearest thing to a full disk that needs no disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("piece", [1 << 10, 1 << 20])  # through the file object's buffer, and past it
def test_a_disk_that_takes_no_more(tmp_path: Path, piece: int) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(OSError) as caught, files_of_at_most(1 << 18), GGUFWriter(path) as writer:
        writer.add_tensor("t", TensorType.I8, (1 << 20,))
        for _ in range(0, 1 << 20, piece):
            writer.write_tensor("t", bytes(piece))
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("n_tensors", [1, 3])  # the failure is seen by close, and by a write
def test_what_fails_in_the_background_fails_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_tensors: int
) -> None:
    def failing(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write_behind, "_sync", failing)
    monkeypatch.setattr(write_behind, "PART_BYTES", 1000)
    path, written = tmp_path / "m.gguf", 0
    with pytest.raises(OSError, match="No space left") as caught, GGUFWriter(path) as writer:
        for i in range(n_tensors):
            writer.add_tensor(f"t{i}", TensorType.I8, (1000,))
        for i in range(n_tensors):
            writer.write_tensor(f"t{i}", bytes(1000))
            written += 1
            assert writer._disk._running is not None
            wait([writer._disk._running])
    assert written == 1 and caught.value.filename == str(path)
    with pytest.raises(OSError, match="No space left"):  # again: what was lost stays lost
        writer._disk.finish(io.BytesIO())
    assert not list(tmp_path.iterdir())


def test_data_is_on_its_way_to_the_disk_before_the_file_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all of it is there when the file gets its name."""
    synced: list[int] = []
    monkeypatch.setattr(write_behind, "_sync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    monkeypatch.setattr(write_behind, "PART_BYTES", 1000)
    whole: list[int] = []
    monkeypatch.setattr(write_behind.os, "fsync", lambda descriptor: whole.append(os.fstat(descriptor).st_size))
    path = tmp_path / "m.gguf"
    with GGUFWriter(path) as writer:
        writer.add_tensor("t", TensorType.I8, (2560,))
        for _ in range(10):
            writer.write_tensor("t", bytes(256))
            if writer._disk._running is not None:
                wait([writer._disk._running])
    assert len(synced) == 2 and 1000 <= synced[0] < synced[1]  # after every fourth piece
    assert whole == [path.stat().st_size]


@pytest.mark.parametrize(
    ("value", "types"),
    [(256, (V.UINT8,)), (-1, (V.UINT32,)), (2**64, (V.UINT64,)), (1.5, (V.INT32,)), ("1", (V.INT32,)), (2, (V.BOOL,)),
     ([1, -1], (V.ARRAY, V.UINT8)), ([1], (V.ARRAY,)), ([1, "a"], (V.ARRAY, V.INT8)), ([[1]], (V.ARRAY, V.ARRAY))],
)  # fmt: skip
def test_values_that_do_not_fit_their_type(tmp_path: Path, value: Any, types: tuple[ValueType, ...]) -> None:
    with pytest.raises(ValueError, match=r"type|fit|array"):
        GGUFWriter(tmp_path / "m.gguf").set_metadata("k", value, *types)


def test_misuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="version 1 cannot be written"):
        GGUFWriter(tmp_path / "m.gguf", version=1)
    writer = GGUFWriter(tmp_path / "m.gguf")
    for alignment in (0, 48):
        with pytest.raises(ValueError, match="must be a power of two"):
            writer.set_metadata("general.alignment", alignment, V.UINT32)
    for shape in [(31,), (1, 1, 1, 1, 32), (-1, 32), ()]:
        with pytest.raises(ValueError, match="cannot have the shape"):
            writer.add_tensor("t", TensorType.Q4_0, shape)
    writer.add_tensor("t", TensorType.Q4_0, (32,))
    writer.add_tensor("u", TensorType.Q4_0, (32,))
    with pytest.raises(ValueError, match="there is a tensor 't' already"):
        writer.add_tensor("t", TensorType.F32, (1,))
    with pytest.raises(ValueError, match="cannot change once tensors are added"):
        writer.set_metadata("general.alignment", 64, V.UINT32)
    with pytest.raises(ValueError, match="'u' is not the next to be written, which is 't'"):
        writer.write_tensor("u", bytes(18))
    with pytest.raises(ValueError, match="'t' has 18 bytes, and more were written"):
        writer.write_tensor("t", bytes(19))
    with pytest.raises(ValueError, match="the header is written already"):
        writer.set_metadata("k", 1, V.UINT8)
    writer.abort()
    with pytest.raises(ValueError, match="the file is closed"):
        writer.write_tensor("t", bytes(18))
    assert not list(tmp_path.iterdir())
