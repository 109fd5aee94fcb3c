"""Importance matrices: both formats, and files that are not right."""

import struct
from pathlib import Path

import numpy as np
import pytest

from qrun.engine.quantize.imatrix import InputSums, read_imatrix, unused_experts, write_imatrix
from qrun.formats import FormatError, GGUFReader, GGUFWriter, TensorType, ValueType


def write_gguf(path: Path, sums: np.ndarray, counts: np.ndarray) -> Path:
    with GGUFWriter(path) as writer:
        writer.set_metadata("general.type", "imatrix", ValueType.STRING)
        writer.set_metadata("imatrix.datasets", ["wiki.txt"], ValueType.ARRAY, ValueType.STRING)
        writer.set_metadata("imatrix.chunk_count", 7, ValueType.UINT32)
        writer.set_metadata("imatrix.chunk_size", 512, ValueType.UINT32)
        writer.add_tensor("a.weight.in_sum2", TensorType.F32, sums.shape)
        writer.add_tensor("a.weight.counts", TensorType.F32, counts.shape)
        writer.write_tensor("a.weight.in_sum2", sums.astype(np.float32))
        writer.write_tensor("a.weight.counts", counts.astype(np.float32))
    return path


def dat(entries: list[tuple[str, int, list[float]]], trailer: bytes = b"") -> bytes:
    data = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        data += struct.pack(f"<{len(values)}f", *values)
    return data + trailer


def test_gguf_holds_sums_and_counts_of_each_expert(tmp_path: Path) -> None:
    sums, counts = np.array([[2.0, 6.0], [0.0, 0.0]]), np.array([[2.0], [0.0]])
    found = read_imatrix(write_gguf(tmp_path / "i.gguf", sums, counts))
    np.testing.assert_array_equal(found.values["a.weight"], np.float32([1, 3, 1, 1]))
    assert (found.datasets, found.chunks) == (["wiki.txt"], 7)
    importance = found.importance("a.weight", (2, 5, 2))
    assert importance is not None
    np.testing.assert_array_equal(importance, np.float32([[0.5, 1.5], [1, 1]]))


def test_what_is_written_is_read_again(tmp_path: Path, rng: np.random.Generator) -> None:
    path, counts = tmp_path / "i.gguf", np.array([3, 0, 70])
    sums = {
        "b.weight": InputSums(rng.uniform(1, 9, (1, 33)), np.array([512])),
        "a_exps.weight": InputSums(rng.uniform(1, 9, (3, 7)) * (counts > 0)[:, None], counts),
    }
    write_imatrix(path, sums, dataset="wiki.txt", chunks=4, chunk_size=128)
    found = read_imatrix(path)
    assert (found.datasets, found.chunks) == (["wiki.txt"], 4)
    assert list(found.values) == ["a_exps.weight", "b.weight"]
    np.testing.assert_allclose(found.values["b.weight"], sums["b.weight"].sums[0] / 512, rtol=1e-6)
    experts = found.values["a_exps.weight"].reshape(3, 7)
    np.testing.assert_allclose(experts[[0, 2]], sums["a_exps.weight"].sums[[0, 2]] / [[3], [70]], rtol=1e-6)
    np.testing.assert_array_equal(experts[1], 1)  # never used
    assert unused_experts(sums) == 1


def test_what_is_written_is_llama_cpp_s_format(tmp_path: Path) -> None:
    sums = {"a.weight": InputSums(np.ones((1, 3)), np.array([5])), "e": InputSums(np.ones((2, 3)), np.array([5, 6]))}
    write_imatrix(tmp_path / "i.gguf", sums, dataset="wiki.txt", chunks=4, chunk_size=128)
    with GGUFReader(tmp_path / "i.gguf") as reader:
        assert reader.metadata == {
            "general.type": "imatrix", "imatrix.datasets": ["wiki.txt"], "imatrix.chunk_count": 4,
            "imatrix.chunk_size": 128,
        }  # fmt: skip
        assert {name: (tensor.type, tensor.shape) for name, tensor in reader.tensors.items()} == {
            "a.weight.in_sum2": (TensorType.F32, (3,)), "a.weight.counts": (TensorType.F32, (1,)),
            "e.in_sum2": (TensorType.F32, (2, 3)), "e.counts": (TensorType.F32, (2, 1)),
        }  # fmt: skip
        assert reader.tensors["e.counts"].dequantize().tolist() == [[5], [6]]


def test_dat_holds_means_times_calls(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(dat([("a", 4, [4.0, 12.0]), ("b", 0, [1.0])], struct.pack("<ii", 3, 4) + b"wiki"))
    found = read_imatrix(path)
    np.testing.assert_array_equal(found.values["a"], np.float32([1, 3]))
    np.testing.assert_array_equal(found.values["b"], np.float32([1]))
    assert (found.datasets, found.chunks) == (["wiki"], 3)


def test_a_tensor_without_importance_has_none(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(dat([("a", 1, [0.0, 2.0])]))
    found = read_imatrix(path)
    assert found.importance("other", (4, 2)) is None
    importance = found.importance("a", (4, 2))
    assert importance is not None and (importance > 0).all()


def test_another_models_matrix_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(dat([("a", 1, [1.0, 2.0]), ("token_embd.weight", 1, [1.0])]))
    found = read_imatrix(path)
    with pytest.raises(FormatError, match="'a' has 2 values, but in the model 3 inputs: it is of another model"):
        found.importance("a", (4, 3))
    assert found.importance("token_embd.weight", (4, 3)) is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ends within the number of entries"),
        (dat([]), "empty"),
        (dat([("a", 1, [1.0])])[:-2], "the values of entry 1 takes 4 bytes, but 2 remain"),
        (struct.pack("<ii", 1, -5), "the name of entry 1 takes -5 bytes"),
        (struct.pack("<ii", 1, 2**31 - 1), "takes 2147483647 bytes"),
        (struct.pack("<i", 10**9), "ends within entry 1"),
        (dat([("a", 1, [float("nan")])]), "'a' is not a finite positive number"),
        (dat([("a", 1, [-1.0])]), "'a' is not a finite positive number"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "i.dat"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message):
        read_imatrix(path)


def test_a_model_is_no_importance_matrix(tmp_path: Path) -> None:
    with GGUFWriter(tmp_path / "m.gguf") as writer:
        writer.set_metadata("general.architecture", "llama", ValueType.STRING)
    with pytest.raises(FormatError, match="not of an importance matrix"):
        read_imatrix(tmp_path / "m.gguf")


def test_counts_must_fit(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="do not fit together"):
        read_imatrix(write_gguf(tmp_path / "i.gguf", np.ones((1, 3)), np.ones((2, 1))))


@pytest.mark.parametrize("count", [float("nan"), float("inf"), -1.0])
def test_counts_are_numbers(count: float, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "i.gguf", np.ones((1, 3)), np.array([[count]]))
    with pytest.raises(FormatError, match=r"the counts of 'a.weight' are not finite positive numbers throughout"):
        read_imatrix(path)
