"""Files on file systems that have no maps: they are read into memory, and everything works as with a map."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors_builder
from gguf_builder import Tensor, build

from qrun.cli import main
from qrun.engine import Model
from qrun.formats import FormatError, GGUFReader
from qrun.formats.mapping import Copy, FileMap, forget_pages, map_file
from qrun.formats.safetensors import SafetensorsFolder

DATA = Path(__file__).parents[1] / "data"
MODEL = DATA / "arch" / "llama-dense.gguf"
REFUSALS: list[OSError | ValueError] = [
    OSError(errno.ENODEV, "No such device"),
    OSError(errno.EINVAL, "Invalid argument"),
    PermissionError(errno.EACCES, "Permission denied"),
    ValueError("mmap length is greater than file size"),
]


class Maps:
    """Makes maps of files; refuses those of some, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: OSError | ValueError, count: int | None = None) -> None:
        self.error, self.left = error, count
        self.refused = 0
        monkeypatch.setattr(FileMap, "__new__", self)

    def __call__(self, kind: type[FileMap], *args: Any, **options: Any) -> mmap.mmap:
        if self.left != 0:
            self.left = None if self.left is None else self.left - 1
            self.refused += 1
            raise type(self.error)(*self.error.args)  # one that lasts would hold on to whoever asked
        return mmap.mmap.__new__(kind, *args, **options)


@pytest.mark.parametrize("error", REFUSALS, ids=lambda error: type(error).__name__)
def test_a_model_runs_without_a_map(error: OSError | ValueError, monkeypatch: pytest.MonkeyPatch) -> None:
    with Model.load(MODEL, threads=2, context=64) as model:
        expected = model.logits([1, 2, 3])
    maps = Maps(monkeypatch, error)
    model = Model.load(MODEL, threads=2, context=64)
    assert maps.refused == 1
    np.testing.assert_array_equal(model.logits([1, 2, 3]), expected)
    (part,) = model.reader.parts
    model.close()
    assert isinstance(part.data, Copy)


def test_what_is_read_is_aligned_read_only_and_held(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = np.random.default_rng(1).bytes(3 * mmap.PAGESIZE + 5)
    path = tmp_path / "file"
    path.write_bytes(content)
    Maps(monkeypatch, REFUSALS[0])
    data = map_file(path)
    path.unlink()
    forget_pages(data, 0, len(content))  # what is not mapped would not come back
    assert data[:] == content and len(data) == len(content)
    assert np.frombuffer(data, np.uint8).ctypes.data % mmap.PAGESIZE == 0

    path.write_bytes(build(tensors=[Tensor("t", 0, (8,), np.arange(8, dtype="<f4").tobytes())]))
    with GGUFReader(path) as reader:
        tensor, data = reader.tensors["t"], reader.parts[0].data
    assert not tensor.raw.flags.writeable and not data.closed
    assert tensor.dequantize().tolist() == list(range(8))
    reader = GGUFReader(path)
    data = reader.parts[0].data
    reader.close()
    assert data.closed  # the memory is free again, though the reader is still there


def test_one_part_of_a_split_model_without_a_map(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ["--type", "copy", "--split-max-size", "50K"]
    assert main.main(["convert", str(MODEL), str(tmp_path / "m.gguf"), *options]) == 0
    first = min(tmp_path.glob("*.gguf"))
    with GGUFReader(first) as reader:
        expected = {name: tensor.raw.tobytes() for name, tensor in reader.tensors.items()}
    Maps(monkeypatch, REFUSALS[0], count=1)
    with GGUFReader(first) as reader:
        assert [isinstance(part.data, Copy) for part in reader.parts] == [True] + [False] * (len(reader.parts) - 1)
        assert {name: tensor.raw.tobytes() for name, tensor in reader.tensors.items()} == expected
    assert len(reader.files) > 1


def test_a_checkpoint_is_converted_without_a_map(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / "huggingface" / "qwen3", tmp_path / "qwen3")
    outs = [tmp_path / name for name in ("mapped.gguf", "read.gguf")]
    assert main.main(["convert", str(folder), str(outs[0]), "--type", "q8_0"]) == 0
    maps = Maps(monkeypatch, REFUSALS[1])
    assert main.main(["convert", str(folder), str(outs[1]), "--type", "q8_0"]) == 0
    assert maps.refused >= 1
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_a_file_that_is_refused_and_does_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stored = {"t": safetensors_builder.tensor(np.ones(3, "<f4"))}
    path = safetensors_builder.write(tmp_path / "model.safetensors", stored)
    Maps(monkeypatch, REFUSALS[0])

    def refuse(*_: Any, **__: Any) -> Copy:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("qrun.formats.mapping.Copy", refuse)
    with pytest.raises(FormatError) as caught:
        SafetensorsFolder(tmp_path)
    n_bytes = path.stat().st_size
    reason = f"the file cannot be mapped (No such device), and memory has no room for its {n_bytes} bytes"
    assert str(caught.value) == f"{path}: {reason}"


@pytest.mark.skipif(os.name != "posix", reason="Windows cuts no file that is mapped")
def test_a_file_that_is_cut_while_it_is_in_use_is_an_error(tmp_path: Path) -> None:
    """Else the system would end the process."""
    path = Path(shutil.copy(MODEL, tmp_path / "cut.gguf"))
    n_bytes = path.stat().st_size
    model = Model.load(path, threads=2, context=64)
    session = model.session()
    expected = model.logits([1, 2, 3])
    os.truncate(path, 5000)
    reason = f"{path}: the file was {n_bytes} bytes long and is cut to 5000, while it was in use"
    for use in (
        lambda: model.logits([1, 2, 3]), lambda: list(model.generate([1, 2, 3], max_tokens=2)),
        lambda: list(session.generate([1], max_tokens=2)), lambda: model.reader.metadata["general.name"],
        lambda: model.reader.parts[0].metadata.encoded("general.name"),
    ):  # fmt: skip
        with pytest.raises(FormatError) as caught:
            use()
        assert str(caught.value) == reason
    model.close()

    path = Path(shutil.copy(MODEL, path))
    with Model.load(path, threads=2, context=64) as model:
        path.rename(tmp_path / "elsewhere.gguf")
        path.write_bytes(b"another file in its place")
        np.testing.assert_array_equal(model.logits([1, 2, 3]), expected)
