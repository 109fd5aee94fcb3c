"""What a GGUF file says is what the reader gives, and what cannot be right is one FormatError."""

import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf_builder import Tensor, array, build, scalar, string

from qrun.formats import FormatError, GGUFReader, TensorType, ValueType

V = ValueType


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(data: bytes, name: str = "model.gguf") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def floats(name: str | bytes = "t", ne: tuple[int, ...] = (8,), offset: int | None = None) -> Tensor:
    return Tensor(name, TensorType.F32, ne, np.arange(np.prod(ne), dtype="<f4").tobytes(), offset)


# What is right


SCALARS = [
    (V.UINT8, 255), (V.INT8, -128), (V.UINT16, 65535), (V.INT16, -32768), (V.UINT32, 2**32 - 1), (V.INT32, -(2**31)),
    (V.UINT64, 2**64 - 1), (V.INT64, -(2**63)), (V.FLOAT32, 0.5), (V.FLOAT64, 1e-300), (V.BOOL, True), (V.BOOL, False),
    (V.STRING, "naïve 🦙"), (V.STRING, ""),
]  # fmt: skip


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(("type", "value"), SCALARS)
def test_scalars(write: Write, type: ValueType, value: object, version: int) -> None:
    with GGUFReader(write(build([("k", scalar(type, value))], version=version))) as reader:
        assert reader.version == version
        assert dict(reader.metadata) == {"k": value}
        assert reader.metadata["k"].__class__ is value.__class__
        assert reader.metadata_types == {"k": (type, None)}


def test_arrays_of_numbers_are_numpy_arrays(write: Write) -> None:
    path = write(build([("i", array(V.INT16, [1, -2])), ("b", array(V.BOOL, [1, 0])), ("none", array(V.FLOAT64, []))]))
    with GGUFReader(path) as reader:
        metadata = dict(reader.metadata)
    for key, expected in {"i": np.int16([1, -2]), "b": np.array([True, False]), "none": np.float64([])}.items():
        np.testing.assert_array_equal(metadata[key], expected, strict=True)
        assert not metadata[key].flags.writeable
    assert reader.metadata_types["b"] == (V.ARRAY, V.BOOL)


def test_arrays_of_strings_are_lists(write: Write) -> None:
    with GGUFReader(write(build([("s", array(V.STRING, ["a", "", b"\xff\n"])), ("n", scalar(V.INT8, 1))]))) as reader:
        assert reader.metadata["s"] == ["a", "", "\udcff\n"]
        assert reader.raw_strings("s") == [b"a", b"", b"\xff\n"]
        with pytest.raises(KeyError):
            reader.raw_strings("missing")
        with pytest.raises(FormatError, match=r"at byte \d+: 'n' is not an array of strings but of INT8"):
            reader.raw_strings("n")


def test_nested_arrays_are_lists_of_arrays(write: Write) -> None:
    inner = [array(V.UINT8, [1, 2]), array(V.STRING, ["x"]), array(V.ARRAY, []), array(V.ARRAY, [array(V.INT8, [])])]
    with GGUFReader(write(build([("n", array(V.ARRAY, inner))]))) as reader:
        numbers, strings, empty, deeper = reader.metadata["n"]
    assert numbers.tolist() == [1, 2]
    assert (strings, empty) == (["x"], [])
    assert [items.tolist() for items in deeper] == [[]]


def test_tensors_have_numpy_shapes_and_lie_in_the_map(write: Write) -> None:
    tensors = [floats("matrix", (3, 2)), floats("scalar", ()), Tensor("none", TensorType.Q4_0, (32, 0), b"")]
    path = write(build(tensors=tensors))
    with GGUFReader(path) as reader:
        assert list(reader.tensors) == ["matrix", "scalar", "none"]
        matrix = reader.tensors["matrix"]
        assert (matrix.shape, matrix.n_bytes, matrix.file) == ((2, 3), 24, path)
        assert path.read_bytes()[matrix.offset :][:24] == matrix.raw.tobytes()
        assert not matrix.raw.flags.writeable
        np.testing.assert_array_equal(matrix.dequantize(), np.float32([[0, 1, 2], [3, 4, 5]]), strict=True)
        assert reader.tensors["scalar"].dequantize().shape == ()
        assert reader.tensors["none"].dequantize().shape == (0, 32)


def test_custom_alignment(write: Write) -> None:
    pairs = [("general.alignment", scalar(V.UINT32, 1024))]
    with GGUFReader(write(build(pairs, [floats("a"), floats("b")], alignment=1024))) as reader:
        assert reader.alignment == 1024
        assert [tensor.offset for tensor in reader.tensors.values()] == [1024, 2048]
        assert reader.tensors["b"].dequantize().tolist() == list(range(8))


def test_a_type_that_cannot_be_decoded_still_lists(write: Write) -> None:
    with GGUFReader(write(build(tensors=[Tensor("t", TensorType.Q4_0_4_4, (32, 2), bytes(36))]))) as reader:
        tensor = reader.tensors["t"]
        assert (tensor.type, tensor.shape, tensor.n_bytes) == (TensorType.Q4_0_4_4, (2, 32), 36)
        with pytest.raises(FormatError, match="tensor 't' is of type Q4_0_4_4, which cannot be decoded"):
            tensor.dequantize()


def test_tensors_may_lie_in_any_order_and_leave_gaps(write: Write) -> None:
    path = write(build(tensors=[floats("last", offset=128), floats("first", offset=0)]) + bytes(128))
    with GGUFReader(path) as reader:
        assert [tensor.name for tensor in reader.tensors.values()] == ["last", "first"]


def test_a_tensor_outlives_its_reader(write: Write) -> None:
    with GGUFReader(write(build(tensors=[floats()]))) as reader:
        tensor = reader.tensors["t"]
    assert not reader.tensors
    assert tensor.dequantize().tolist() == list(range(8))


def test_closing_unmaps(write: Write) -> None:
    reader = GGUFReader(write(build(tensors=[floats()])))
    (part,) = reader.parts
    reader.close()
    assert part.data.closed


def test_a_large_vocabulary_opens_in_a_tenth_of_a_second(write: Write) -> None:
    n_tokens = 262_144
    tokens = struct.pack("<IIQ", V.ARRAY, V.STRING, n_tokens) + b"".join(string(f"<{i}>") for i in range(n_tokens))
    scores = struct.pack("<IIQ", V.ARRAY, V.FLOAT32, n_tokens) + bytes(4 * n_tokens)
    path = write(build([("tokens", tokens), ("scores", scores)]))
    seconds = []
    for _ in range(5):
        start = time.process_time()
        reader = GGUFReader(path)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.1
    assert reader.raw_strings("tokens")[-1] == b"<262143>"


# What is wrong

GOOD = build([("k", scalar(V.UINT32, 7))], [floats()])
HUGE = 2**64 - 1


def nested(depth: int) -> bytes:
    return array(V.ARRAY, [nested(depth - 1)]) if depth > 1 else array(V.UINT8, [1])


WRONG = {
    "the file is empty: get it again": b"",
    "at byte 0: this is not a GGUF file; it begins with b'GG'": b"GG",
    "at byte 0: this is not a GGUF file; it begins with b'abcd'": b"abcdefgh",
    "not a GGUF file; it is a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "not a GGUF file; it is a web page": b"<!DOCTYPE html>",
    "at byte 4: the version takes at least 4 bytes, but 2 remain": b"GGUF\3\0",
    "at byte 4: this is a big-endian GGUF file": b"GGUF\0\0\0\3" + bytes(16),
    "at byte 4: GGUF version 1 is no longer in use": build(version=1),
    "at byte 4: GGUF version 0 is not known": build(version=0),
    "at byte 4: GGUF version 4 is not known": build(version=4),
    "the metadata count takes at least 8 bytes, but 0 remain": GOOD[:16],
    f"the metadata of {HUGE} pairs takes at least": build(n_pairs=HUGE),
    f"the description of {HUGE} tensors takes at least": build(n_tensors=HUGE),
    f"a metadata key takes at least {HUGE} bytes": build([("k", b"")])[:24] + struct.pack("<Q", HUGE) + bytes(20),
    "at byte 38: there are two metadata keys 'k'": build([("k", scalar(V.BOOL, 1)), ("k", scalar(V.BOOL, 1))]),
    "metadata 'k' has the unknown type 13": build([("k", struct.pack("<I", 13))]),
    "metadata 'k' is a bool that is neither 0 nor 1": build([("k", scalar(V.BOOL, 2))]),
    "metadata 'b' is a bool that is neither 0 nor 1": build([("b", array(V.BOOL, [0, 1, 255]))]),
    f"metadata 's' takes at least {HUGE} bytes": build([("s", struct.pack("<IQ", V.STRING, HUGE))]),
    f"metadata 'a' takes at least {4 * HUGE} bytes": build([("a", struct.pack("<IIQ", V.ARRAY, V.INT32, HUGE))]),
    f"metadata 'a' takes at least {8 * HUGE} bytes": build([("a", struct.pack("<IIQ", V.ARRAY, V.STRING, HUGE))]),
    f"metadata 'a' takes at least {12 * HUGE} bytes": build([("a", struct.pack("<IIQ", V.ARRAY, V.ARRAY, HUGE))]),
    "a string of metadata 'a' runs past the end": build(
        [("a", struct.pack("<IIQQQ", V.ARRAY, V.STRING, 2, HUGE, 0))]
    ),
    "metadata 'n' nests arrays more than 16 deep": build([("n", nested(17))]),
    "general.alignment is not a power of two": build([("general.alignment", scalar(V.UINT32, 48))]),
    "general.alignment is not a power of two of type": build([("general.alignment", scalar(V.UINT64, 32))]),
    "there are two tensors named 't'": build(tensors=[floats(), floats()]),
    "tensor 't' has 5 dimensions, more than 4": build(tensors=[floats(ne=(1,) * 5)]),
    "tensor 't' has the unknown type 43": build(tensors=[Tensor("t", 43, (8,), bytes(32))]),
    "tensor 't' has rows of 40 weights, not whole Q8_0 blocks of 32": build(
        tensors=[Tensor("t", TensorType.Q8_0, (40,), bytes(68))]
    ),
    "tensor 't' has the impossible shape": build(tensors=[Tensor("t", TensorType.F32, (0, 2**63, 2), b"")]),
    "tensor 't' has the offset 8, not a multiple of 32": build(tensors=[floats(offset=8)]),
    "tensor 't' would end at byte 96, but the file has only 95": build(tensors=[floats()])[:-1],
    "would end at byte 18446744073709551648, but": build(tensors=[floats(offset=2**64 - 64)]),
    "tensors 'a' and 'b' overlap": build(tensors=[floats("a", (16,)), floats("b", offset=32)]),
    "tensors 'b' and 'a' overlap": build(tensors=[floats("a", offset=32), floats("b", (16,), offset=0)]),
}


@pytest.mark.parametrize(("message", "data"), WRONG.items(), ids=[message[:60] for message in WRONG])
def test_what_cannot_be_right_is_one_error_of_one_line(write: Write, message: str, data: bytes) -> None:
    path = write(data)
    with pytest.raises(FormatError) as caught:
        GGUFReader(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert message in line
    assert "\n" not in line
    assert caught.value.path == str(path)
    assert line.endswith(caught.value.reason)
    if caught.value.offset is not None:
        assert f"at byte {caught.value.offset}: " in line


def test_sixteen_nested_arrays_are_not_too_deep(write: Write) -> None:
    with GGUFReader(write(build([("n", nested(16))]))) as reader:
        value = reader.metadata["n"]
    for _ in range(15):
        (value,) = value
    assert len(value) <= 1


def test_names_out_of_a_file_cannot_break_a_message(write: Write) -> None:
    name = b"\x1b[31m\n\xff" + b"x" * 500
    with pytest.raises(FormatError) as caught:
        GGUFReader(write(build(tensors=[floats(name), floats(name)])))
    assert caught.value.reason.isprintable() and "\ufffd" in caught.value.reason and "udc" not in str(caught.value)
    assert len(caught.value.reason) < 150


def test_a_file_cut_short_anywhere(write: Write) -> None:
    for length in range(len(GOOD)):
        with pytest.raises(FormatError):
            GGUFReader(write(GOOD[:length]))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"none\.gguf: there is no such file$"):
        GGUFReader(tmp_path / "none.gguf")


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"this is a folder: name the \.gguf file in it$"):
        GGUFReader(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="this is not a regular file"):
        GGUFReader(tmp_path / "pipe")
