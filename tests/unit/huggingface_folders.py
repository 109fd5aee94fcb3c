"""The checkpoints of tests/data/huggingface, copied with changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors_builder import Tensor, build

from qrun.formats.safetensors import SafetensorsFolder

DATA = Path(__file__).parent.parent / "data" / "huggingface"
Edit = Callable[[dict[str, Any]], object]


def copy(name: str, folder: Path, config: Edit | None = None, tensors: Edit | None = None) -> Path:
    """A checkpoint of the fixtures, with changes to its config.json and its tensors."""
    target = folder / name
    shutil.copytree(DATA / name, target)
    if config:
        edit(target / "config.json", config)
    if tensors:
        source = SafetensorsFolder(target)
        held: dict[str, Tensor] = {n: (t.dtype, t.shape, t.raw.tobytes()) for n, t in source.tensors.items()}
        source.close()
        for path in [*target.glob("*.safetensors"), *target.glob("*.index.json")]:
            path.unlink()
        tensors(held)
        (target / "model.safetensors").write_bytes(build(held))
    return target


def edit(path: Path, change: Edit) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def stored(folder: Path, name: str) -> np.ndarray:
    source = SafetensorsFolder(folder)
    found = source.tensors[name]
    values = (found.array().astype(np.uint32) << 16).view(np.float32) if found.dtype == "BF16" else found.array()
    source.close()
    return np.array(values, np.float32)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in JSON where a value stands: what it is in, and its key or index."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from places(inner)
