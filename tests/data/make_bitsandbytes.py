"""Makes bitsandbytes.npz: weights that bitsandbytes has quantised, and what it decodes them to in single precision.

    pip install torch==2.13.0 bitsandbytes==0.50.2 numpy
    python tests/data/make_bitsandbytes.py

Each case has its parts under "CASE/NAME", named as in a checkpoint, and the decoded weight under "CASE/decoded".
"""

from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch

# name: quant_type, shape, blocksize, double quantisation. 130 * 131 weights are more blocks than a nested block has.
FOUR_BITS = {
    "nf4": ("nf4", (13, 70), 64, False),
    "nf4-nested": ("nf4", (130, 131), 64, True),
    "nf4-odd": ("nf4", (7, 33), 128, True),
    "fp4": ("fp4", (9, 50), 64, False),
    "fp4-nested": ("fp4", (21, 40), 256, True),
}


def parts_of(tensors: dict[str, torch.Tensor], case: str) -> dict[str, np.ndarray]:
    return {f"{case}/{name}": tensor.numpy() for name, tensor in tensors.items()}


def main() -> None:
    torch.manual_seed(7)
    arrays: dict[str, np.ndarray] = {}
    for case, (quant_type, shape, blocksize, nested) in FOUR_BITS.items():
        weight = torch.randn(shape, dtype=torch.float32) * 0.02
        packed, state = bnb.quantize_4bit(
            weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
        )
        tensors = {"weight": packed} | {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
        decoded = bnb.dequantize_4bit(packed, state)
        assert decoded.dtype == torch.float32
        arrays |= parts_of(tensors | {"decoded": decoded}, case)
    codes, scb, _ = bnb.int8_vectorwise_quant(torch.randn(11, 37, dtype=torch.float16))
    decoded = bnb.int8_vectorwise_dequant(codes, scb)
    weight_format = torch.tensor(0, dtype=torch.uint8)
    arrays |= parts_of({"weight": codes, "SCB": scb, "weight_format": weight_format, "decoded": decoded}, "int8")
    np.savez_compressed(Path(__file__).with_name("bitsandbytes.npz"), **arrays)


if __name__ == "__main__":
    main()
