"""Model files of T5's kind with random weights: a sketch, and a tokenizer of letters."""

from __future__ import annotations

import string
from pathlib import Path

from qrun.formats import GGUFWriter, ValueType
from tests.sketches import load, model, write_metadata, write_tensors

PIECES = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_letters, *string.digits, ".", ",", ":"]


def write_t5(path: Path, name: str = "t5-dense", **changes: object) -> Path:
    """changes: of metadata, with "__" for each dot."""
    reader = model(load()[name])
    pieces = [*PIECES, *(f"<extra_id_{i}>" for i in range(128 - len(PIECES)))]
    types = [3, 3, 2, *[1] * (len(PIECES) - 3), *[3] * (128 - len(PIECES))]
    told = {f"t5.{key.replace('__', '.')}": value for key, value in changes.items()}
    with GGUFWriter(path) as writer:
        write_metadata(writer, {**reader.metadata, "tokenizer.ggml.model": "t5", **told})
        writer.set_metadata("tokenizer.ggml.tokens", pieces, ValueType.ARRAY, ValueType.STRING)
        writer.set_metadata("tokenizer.ggml.token_type", types, ValueType.ARRAY, ValueType.INT32)
        scores = [-float(i) for i in range(128)]
        writer.set_metadata("tokenizer.ggml.scores", scores, ValueType.ARRAY, ValueType.FLOAT32)
        write_tensors(writer, reader)
    return path
