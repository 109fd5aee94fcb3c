"""Writes a llama of 1.2 billion random weights, in any type: for speed, what the weights say does not matter.

    python tests/bench/random_model.py q4_k_m llama-1b-q4_k_m.gguf
    python tests/bench/random_model.py q5_0 llama-1b-q5_0.gguf

`q4_k_m` is the mix of llama-quantize; any other type is that of all matrices. There is no tokenizer in the file.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qrun.formats import GGUFWriter, TensorType, ValueType, dequantize
from qrun.formats.blocks import BLOCK_FORMATS, nvfp4

# Where a block's float16 scale lies; and its minimum, as a multiple of the scale that makes the weights' mean zero.
SCALES = {
    "Q4_0": 0, "Q4_1": 0, "Q5_0": 0, "Q5_1": 0, "Q8_0": 0, "Q2_K": 80, "Q3_K": 108, "Q4_K": 0, "Q5_K": 0, "Q6_K": 208,
    "IQ4_NL": 0, "IQ4_XS": 0, "IQ1_S": 0, "IQ2_XXS": 0, "IQ2_XS": 0, "IQ2_S": 0, "IQ3_XXS": 0, "IQ3_S": 0, "TQ1_0": 52,
    "TQ2_0": 64, "Q1_0": 0, "Q2_0": 0,
}  # fmt: skip
# The types of all matrices that there can be: those, and two whose scales lie elsewhere.
QUANTISED = [*SCALES, "IQ1_M", "NVFP4"]
MINIMUMS = {"Q4_1": (2, -7.5), "Q5_1": (2, -15.5), "Q2_K": (82, 1.5), "Q4_K": (2, 7.5), "Q5_K": (2, 15.5)}
MIX = "Q4_K_M"


@dataclass(frozen=True)
class Shape:
    """Hyper-parameters of a llama; by default those of Llama 3.2 1B, whose head is its embedding."""

    layers: int = 16
    width: int = 2048
    ffn: int = 8192
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128_256
    context: int = 131_072

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Names and shapes of all matrices."""
        width, kv_width = self.width, self.width // self.heads * self.kv_heads
        shapes = {"token_embd": (self.vocabulary, width)}
        for i in range(self.layers):
            for name, rows, columns in (
                ("attn_q", width, width), ("attn_k", kv_width, width), ("attn_v", kv_width, width),
                ("attn_output", width, width), ("ffn_gate", self.ffn, width), ("ffn_up", self.ffn, width),
                ("ffn_down", width, self.ffn),
            ):  # fmt: skip
                shapes[f"blk.{i}.{name}"] = (rows, columns)
        return shapes


LLAMA_1B = Shape()


def type_of(name: str, mix: str, layers: int) -> TensorType:
    """The type of a matrix."""
    if mix != MIX:
        return TensorType[mix]
    if name == "token_embd":  # it is the head as well
        return TensorType.Q6_K
    _, layer, kind = name.split(".")
    # llama-quantize gives the first and last eighth of the layers, and every third between, more bits.
    eighth, i = layers // 8, int(layer)
    more = i < eighth or i >= 7 * layers // 8 or (i - eighth) % 3 == 2
    return TensorType.Q6_K if more and kind in ("attn_v", "ffn_down") else TensorType.Q4_K


def random_blocks(rng: np.random.Generator, type_: TensorType, n_weights: int, deviation: float) -> np.ndarray:
    """Bytes of random weights with mean near zero and that standard deviation: uint8 [n_bytes]."""
    layout, name = BLOCK_FORMATS[type_], type_.name
    if name in ("F32", "F16", "BF16"):
        values = rng.standard_normal(n_weights, np.float32) * np.float32(deviation)
        if name == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.astype(np.float32 if name == "F32" else np.float16).view(np.uint8)
    raw = np.frombuffer(rng.bytes(n_weights // layout.block_size * layout.block_bytes), np.uint8).copy()
    blocks = raw.reshape(-1, layout.block_bytes)
    if name in ("Q2_0", "TQ2_0"):  # of the four levels three are in use, the middle one twice as often
        blocks &= ~((blocks & blocks >> 1 & 0x55) << 1)

    def set_scale(scale: float) -> None:
        if name == "NVFP4":
            blocks[:, :4] = np.abs(nvfp4.SCALES[:127] - scale).argmin()
            return
        if name == "IQ1_M":
            quarters = np.float16(scale).view(np.uint16) >> np.arange(0, 16, 4) & 15
            blocks[:, 49::2] = blocks[:, 49::2] & 15 | quarters << 4
            return
        fields = [(SCALES[name], scale)]
        if name in MINIMUMS:
            place, factor = MINIMUMS[name]
            fields.append((place, scale * factor))
        for place, value in fields:
            blocks[:, place : place + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)

    # Scale 1 shows how far the quants spread.
    set_scale(1.0)
    sample = blocks[:256]
    spread = float(dequantize(sample.reshape(-1), type_, (sample.shape[0] * layout.block_size,)).std())
    set_scale(deviation / spread)
    return raw


def write(path: Path, mix: str, shape: Shape = LLAMA_1B, seed: int = 1) -> None:
    """Write the model. mix: "Q4_K_M", or the name of a TensorType."""
    rng = np.random.default_rng(seed)
    with GGUFWriter(path) as writer:
        writer.set_metadata("general.architecture", "llama", ValueType.STRING)
        writer.set_metadata("general.name", f"random {mix}", ValueType.STRING)
        for key, value in (
            ("context_length", shape.context), ("embedding_length", shape.width), ("block_count", shape.layers),
            ("feed_forward_length", shape.ffn), ("attention.head_count", shape.heads),
            ("attention.head_count_kv", shape.kv_heads), ("rope.dimension_count", shape.width // shape.heads),
            ("vocab_size", shape.vocabulary),
        ):  # fmt: skip
            writer.set_metadata(f"llama.{key}", value, ValueType.UINT32)
        writer.set_metadata("llama.attention.layer_norm_rms_epsilon", 1e-5, ValueType.FLOAT32)
        writer.set_metadata("llama.rope.freq_base", 500_000.0, ValueType.FLOAT32)
        writer.set_metadata("tokenizer.ggml.model", "no_vocab", ValueType.STRING)
        norms = [f"blk.{i}.{kind}_norm" for i in range(shape.layers) for kind in ("attn", "ffn")] + ["output_norm"]
        matrices = shape.matrices()
        for name, size in matrices.items():
            writer.add_tensor(f"{name}.weight", type_of(name, mix, shape.layers), size)
        for name in norms:
            writer.add_tensor(f"{name}.weight", TensorType.F32, (shape.width,))
        for name, (rows, columns) in matrices.items():
            type_ = type_of(name, mix, shape.layers)
            writer.write_tensor(f"{name}.weight", random_blocks(rng, type_, rows * columns, columns**-0.5))
        for name in norms:
            writer.write_tensor(f"{name}.weight", np.ones(shape.width, np.float32).view(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mix", type=str.upper, choices=[MIX, *QUANTISED, "F16", "BF16", "F32"])
    parser.add_argument("path", type=Path)
    args = parser.parse_args()
    write(args.path, args.mix)


if __name__ == "__main__":
    main()
