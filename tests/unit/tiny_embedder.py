"""Model files with random weights that make vectors of texts: an architecture's sketch, and a tokenizer of letters."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

from qrun.formats import GGUFWriter, ValueType
from tests.sketches import load, load_embedders, model, write_metadata, write_tensors

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LETTERS = string.ascii_lowercase + string.digits
# As GGUF spells WordPiece: a letter that begins a word, and one within.
PIECES = [*SPECIAL, *(f"▁{letter}" for letter in LETTERS), *LETTERS]


def write_embedder(path: Path, name: str = "bert", metadata: dict[str, Any] | None = None) -> Path:
    """A sketch by its name, with other metadata where they are given."""
    reader = model({**load(), **load_embedders()}[name])
    pieces = [*PIECES, *(f"[unused{i}]" for i in range(128 - len(PIECES)))]
    told = {
        "tokenizer.ggml.model": "bert", "tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.unknown_token_id": 1, **(metadata or {}),
    }  # fmt: skip
    with GGUFWriter(path) as writer:
        write_metadata(writer, {**reader.metadata, **told})
        writer.set_metadata("tokenizer.ggml.tokens", pieces, ValueType.ARRAY, ValueType.STRING)
        types = [3 if piece in SPECIAL else 1 for piece in pieces]
        writer.set_metadata("tokenizer.ggml.token_type", types, ValueType.ARRAY, ValueType.INT32)
        write_tensors(writer, reader)
    return path
