"""Models split over several files.

The parts are called PREFIX-00001-of-00003.gguf and so on. Each has `split.no` (from 0), `split.count` and
`split.tensors.count` (of all parts together); everything else of the metadata is in the first.
"""

import re
from pathlib import Path

from qrun.formats.errors import FormatError
from qrun.formats.gguf.file import GGUFFile

SPLIT_NO = "split.no"
SPLIT_COUNT = "split.count"
SPLIT_TENSORS = "split.tensors.count"
SPLIT_KEYS = frozenset({SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS})


def part_name(prefix: str, no: int, count: int) -> str:
    """The file name of part `no`, counted from 0."""
    return f"{prefix}-{no + 1:05}-of-{count:05}.gguf"


def open_parts(path: Path) -> list[GGUFFile]:
    """Open a model: a file that stands alone, or all the parts of which the first is given."""
    first = GGUFFile(path)
    count = _integer(first, SPLIT_COUNT, 1)
    if count <= 1:
        return [first]
    no = _integer(first, SPLIT_NO, 0)
    match = re.fullmatch(r"(.+)-\d{5}-of-\d{5}\.gguf", path.name, re.DOTALL)
    prefix = match[1] if match else "MODEL"
    first_name = part_name(prefix, 0, count)
    if no != 0:
        raise FormatError(path, f"this is part {no + 1} of {count}: name the first part, {first_name}")
    if path.name != first_name:
        raise FormatError(path, f"this is the first of {count} parts, and is to be called {first_name}")
    parts = [first]
    for no in range(1, count):
        part_path = path.with_name(part_name(prefix, no, count))
        if not part_path.exists():
            raise FormatError(path, f"part {no + 1} of {count} is missing: {part_path.name} should lie beside it")
        part = GGUFFile(part_path)
        if (_integer(part, SPLIT_NO, 0), _integer(part, SPLIT_COUNT, 1)) != (no, count):
            raise FormatError(part_path, f"this is not part {no + 1} of {count} of {path.name}")
        parts.append(part)
    n_tensors = sum(len(part.tensors) for part in parts)
    if n_tensors != (expected := _integer(first, SPLIT_TENSORS, n_tensors)):
        raise FormatError(path, f"the {count} parts have {n_tensors} tensors together, not {expected}")
    if n_tensors != len(set().union(*(part.tensors for part in parts))):
        raise FormatError(path, "a tensor is in two of the parts")
    return parts


def _integer(file: GGUFFile, key: str, default: int) -> int:
    value = file.metadata.get(key, default)
    if not isinstance(value, int):
        raise FormatError(file.path, f"{key} is not an integer")
    return value
