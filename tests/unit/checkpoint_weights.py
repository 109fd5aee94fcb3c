"""Checkpoints made of names and shapes: weights follow from a tensor's name, so that nothing but these need be kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

DATA = Path(__file__).parent.parent / "data"
TOKENIZER = DATA / "huggingface" / "qwen3"
CLASSES: dict[str, Any] = json.loads((DATA / "classes.json").read_text()) if (DATA / "classes.json").is_file() else {}
"""By the class's name: config, shapes, dtypes of tensors that are not BF16, and the metadata and tensors that
llama.cpp's converter makes of them."""


def bfloat16(name: str, shape: Sequence[int]) -> np.ndarray:
    """Random numbers from 2**-9 to 1 of both signs, as codes: the raw bits of a generator, which no release changes."""
    raw = np.random.PCG64(crc32(name.encode())).random_raw(prod(shape))
    sign, exponent, fraction = raw & 1, 118 + (raw >> 1) % 9, (raw >> 8) & 0x7F
    return (sign << 15 | exponent << 7 | fraction).astype("<u2").reshape(tuple(shape))


def stored(name: str, shape: Sequence[int], dtype: str) -> bytes:
    """Random numbers of a type: few bits, none NaN or infinite, and those of F32 greater than 0."""
    if dtype in ("BF16", "F32"):
        codes = bfloat16(name, shape)
        return (codes if dtype == "BF16" else (codes.astype("<u4") & 0x7FFF) << 16).tobytes()
    raw = np.random.PCG64(crc32(name.encode())).random_raw(prod(shape))
    match dtype:
        case "F8_E4M3":  # up to 1.875 of both signs
            codes = (raw & 1) << 7 | (raw >> 1) % 64
        case "F8_E8M0":
            codes = 120 + raw % 8
        case "I64" | "I32":  # numbers of experts, sizes
            codes = 1 + raw % 3
        case _:
            codes = raw % 256
    return codes.astype({"I64": "<i8", "I32": "<i4"}.get(dtype, "u1")).tobytes()


def digest(name: str, data: np.ndarray) -> str:
    """Of a tensor's bytes. Exponentials are not the same to the last bit everywhere: of those the first 24 bits."""
    data = np.ascontiguousarray(data)
    if name.endswith("ssm_a"):
        data = (data.reshape(-1).view(np.uint32) + 0x80) >> 8
    return sha256(data.tobytes()).hexdigest()[:8]


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]],
    dtypes: Mapping[str, str] | None = None, *, tokenizer: bool = True,
) -> Path:  # fmt: skip
    """A folder with config.json, model.safetensors and a small tokenizer. dtypes: of tensors that are not BF16."""
    from safetensors_builder import build

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    types = {name: (dtypes or {}).get(name, "BF16") for name in shapes}
    held = {name: (types[name], tuple(shape), stored(name, shape, types[name])) for name, shape in shapes.items()}
    (folder / "model.safetensors").write_bytes(build(held))
    for name in ("tokenizer.json", "tokenizer_config.json") if tokenizer else ():
        shutil.copy(TOKENIZER / name, folder / name)
    return folder
