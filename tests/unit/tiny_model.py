"""Model files with random weights that can read text: one of the small architectures, and a tokenizer of characters."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qrun.formats import GGUFReader, GGUFWriter, TensorType, ValueType
from tests.bench.random_model import llama, write

ARCHITECTURES = Path(__file__).parents[1] / "data" / "arch"
# Printable ASCII, a space and a newline in GPT-2's spelling, and a piece that one merge makes.
PIECES = ["<|endoftext|>", *map(chr, range(0x21, 0x7F)), "Ġ", "Ċ", "th"]
# The same without a token that ends a text: what is written has as many tokens as were asked for.
ENDLESS = ["[none]", *PIECES[1:]]
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 40


def set_tokenizer(writer: GGUFWriter, pieces: list[str] = PIECES) -> None:
    """These pieces, and so many more that there are 128."""
    pieces = [*pieces, *(f"[{i}]" for i in range(128 - len(pieces)))]
    writer.set_metadata("tokenizer.ggml.model", "gpt2", ValueType.STRING)
    writer.set_metadata("tokenizer.ggml.pre", "gpt-2", ValueType.STRING)
    writer.set_metadata("tokenizer.ggml.tokens", pieces, ValueType.ARRAY, ValueType.STRING)
    writer.set_metadata("tokenizer.ggml.merges", ["t h"], ValueType.ARRAY, ValueType.STRING)


def write_slow_model(path: Path) -> Path:
    """A model of 88 million random weights, which reads a prompt of 3,000 tokens in seconds."""
    model = llama(layers=12, width=512, ffn=4096, heads=8, kv_heads=8, vocabulary=128)
    write(path, "Q4_0", model, set_tokenizer=set_tokenizer)
    return path


def write_half_model(path: Path) -> Path:
    """A small model of random weights in float16."""
    model = llama(layers=1, width=64, ffn=64, heads=2, kv_heads=2, vocabulary=128)
    write(path, "F16", model, set_tokenizer=set_tokenizer)
    return path


def write_tiny_model(
    path: Path, *, architecture: str = "llama-dense", pieces: list[str] | None = None, experts: int | None = None
) -> Path:
    """experts: where the architecture has some, so many with new random weights, of which each token goes to two."""
    rng = np.random.default_rng(7)
    with GGUFReader(ARCHITECTURES / f"{architecture}.gguf") as reader, GGUFWriter.from_reader(path, reader) as writer:
        set_tokenizer(writer, PIECES if pieces is None else pieces)
        arrays = {name: tensor.dequantize() for name, tensor in reader.tensors.items()}
        if experts:
            writer.set_metadata(f"{reader.metadata['general.architecture']}.expert_count", experts, ValueType.UINT32)
            for name, array in arrays.items():
                if "_exps.weight" in name or "ffn_gate_inp.weight" in name:
                    shape = (experts, *array.shape[1:])
                    arrays[name] = rng.normal(0, array.std(), shape).astype(np.float32)
        for name, array in arrays.items():
            writer.add_tensor(name, TensorType.F32, array.shape)
        for name, array in arrays.items():
            writer.write_tensor(name, np.ascontiguousarray(array))
    return path
