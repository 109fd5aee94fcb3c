"""Models in several files read as one."""

from pathlib import Path

import pytest
from gguf_builder import Tensor, build, scalar

from qrun.formats import FormatError, GGUFReader, GGUFWriter, TensorType, ValueType
from qrun.formats.gguf import write_split

V = ValueType


def tensor(name: str) -> Tensor:
    return Tensor(name, TensorType.I8, (4,), name.encode() * 4)


WHOLE = build(
    [("general.alignment", scalar(V.UINT32, 64)), ("general.name", scalar(V.STRING, "whole"))],
    [tensor("a"), tensor("b"), tensor("c")],
    alignment=64,
)


def part(no: int, count: int, *names: str, total: int = 3, first: tuple[tuple[str, bytes], ...] = ()) -> bytes:
    split = [
        ("split.no", scalar(V.UINT16, no)),
        ("split.count", scalar(V.UINT16, count)),
        ("split.tensors.count", scalar(V.INT32, total)),
    ]
    return build([*first, *split], [tensor(name) for name in names])


def lay(folder: Path, *parts: bytes) -> Path:
    """Write parts under their names. Returns the first."""
    paths = [folder / f"m-{no:05}-of-{len(parts):05}.gguf" for no in range(1, len(parts) + 1)]
    for path, data in zip(paths, parts, strict=True):
        path.write_bytes(data)
    return paths[0]


def test_the_first_part_opens_all(tmp_path: Path) -> None:
    name = ("general.name", scalar(V.STRING, "model"))
    path = lay(tmp_path, part(0, 3, "a", first=(name,)), part(1, 3, "b"), part(2, 3, "c"))
    with GGUFReader(path) as reader:
        assert [file.name for file in reader.files] == [f"m-0000{no}-of-00003.gguf" for no in (1, 2, 3)]
        assert reader.metadata["general.name"] == "model"
        assert {name: tensor.raw.tobytes() for name, tensor in reader.tensors.items()} == {
            "a": b"aaaa", "b": b"bbbb", "c": b"cccc"
        }  # fmt: skip
        assert [tensor.file for tensor in reader.tensors.values()] == list(reader.files)


def test_a_model_is_split_and_joined_to_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "whole.gguf").write_bytes(WHOLE)
    with GGUFReader(tmp_path / "whole.gguf") as whole:
        paths = write_split(whole, tmp_path / "m", max_bytes=8)
    assert [path.name for path in paths] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    with GGUFReader(paths[0]) as reader:
        assert [tensor.file for tensor in reader.tensors.values()] == [paths[0], paths[0], paths[1]]
        with GGUFWriter.from_reader(tmp_path / "joined.gguf", reader) as writer:
            writer.copy_tensors(reader)
    assert (tmp_path / "joined.gguf").read_bytes() == WHOLE


def test_a_split_of_one_part_stands_alone(tmp_path: Path) -> None:
    (tmp_path / "any.gguf").write_bytes(part(0, 1, "a", total=1))
    with GGUFReader(tmp_path / "any.gguf") as reader:
        assert list(reader.tensors) == ["a"] and list(reader.files) == [tmp_path / "any.gguf"]


def test_a_later_part_names_the_first(tmp_path: Path) -> None:
    first = lay(tmp_path, part(0, 2, "a"), part(1, 2, "b", "c"))
    with pytest.raises(FormatError, match=r"this is part 2 of 2: name the first part, m-00001-of-00002\.gguf$"):
        GGUFReader(first.with_name("m-00002-of-00002.gguf"))


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    first = lay(tmp_path, part(0, 2, "a"), part(1, 2, "b", "c"))
    first.with_name("m-00002-of-00002.gguf").unlink()
    with pytest.raises(FormatError, match=r"part 2 of 2 is missing: m-00002-of-00002\.gguf should lie beside it$"):
        GGUFReader(first)


def test_a_first_part_of_another_name_is_told_its_own(tmp_path: Path) -> None:
    lay(tmp_path, part(0, 2, "a"), part(1, 2, "b", "c")).rename(tmp_path / "renamed.gguf")
    with pytest.raises(FormatError, match=r"the first of 2 parts, and is to be called MODEL-00001-of-00002\.gguf$"):
        GGUFReader(tmp_path / "renamed.gguf")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (part(0, 2, "b", "c"), "this is not part 2 of 2 of m-00001-of-00002.gguf"),
        (part(1, 3, "b", "c"), "this is not part 2 of 2 of m-00001-of-00002.gguf"),
        (part(1, 2, "b"), "the 2 parts have 2 tensors together, not 3"),
        (part(1, 2, "a", "b"), "a tensor is in two of the parts"),
        (part(1, 2, "b", "c")[:-40], "it is damaged, or its download was cut short"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, second: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        GGUFReader(lay(tmp_path, part(0, 2, "a"), second))


def test_split_counts_of_the_wrong_type(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(build([("split.count", scalar(V.STRING, "2"))]))
    with pytest.raises(FormatError, match=r"split\.count is not an integer"):
        GGUFReader(tmp_path / "m.gguf")
