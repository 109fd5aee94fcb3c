"""Adapters of random weights for tests, and models with adapters merged into them by plain NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qrun.formats import GGUFReader, GGUFWriter, TensorType, ValueType
from qrun.formats.blocks import quantize

Array = np.ndarray
Pair = tuple[Array, Array]
EMBEDDING = "token_embd.weight"


def random_pair(rng: np.random.Generator, name: str, shape: Sequence[int], rank: int, size: float = 0.3) -> Pair:
    """A and B of a tensor of this shape, whose product has weights of about `size` of those of a usual matrix."""
    *experts, rows, columns = shape
    if name == EMBEDDING:
        rows, columns = columns, rows
    a = rng.normal(size=(*experts, rank, columns)).astype(np.float32)
    b = rng.normal(0, size * columns**-0.5 * rank**-0.5, (*experts, rows, rank)).astype(np.float32)
    return (np.ascontiguousarray(a.T) if name == EMBEDDING else a), b


def product(name: str, pair: Pair) -> Array:
    """B A in float64, of the shape of the tensor that it changes."""
    a, b = (matrix.astype(np.float64) for matrix in pair)
    return a @ b.T if name == EMBEDDING else b @ a


def write_adapter(
    path: Path,
    pairs: Mapping[str, Pair],
    *,
    alpha: float | None = 16.0,
    type: TensorType = TensorType.F32,
    architecture: str = "llama",
    metadata: Mapping[str, str] | None = None,
    extra: Mapping[str, Array] | None = None,
) -> Path:
    """The file as the reference converter writes it. B stays F32 where its rows are no whole blocks of `type`."""
    tensors = {f"{name}.lora_{'ab'[i]}": pair[i] for name, pair in pairs.items() for i in range(2)} | dict(extra or {})
    with GGUFWriter(path) as writer:
        known = {"general.architecture": architecture, "general.type": "adapter", "adapter.type": "lora"}
        for key, value in (known | dict(metadata or {})).items():
            writer.set_metadata(key, value, ValueType.STRING)
        if alpha is not None:
            writer.set_metadata("adapter.lora.alpha", alpha, ValueType.FLOAT32)
        types = {name: type if values.shape[-1] % 32 == 0 else TensorType.F32 for name, values in tensors.items()}
        if type in (TensorType.F16, TensorType.BF16):
            types = dict.fromkeys(tensors, type)
        for name, values in tensors.items():
            writer.add_tensor(name, types[name], values.shape)
        for name, values in tensors.items():
            writer.write_tensor(name, quantize(values.astype(np.float32), types[name]))
    return path


def read_pairs(path: Path) -> tuple[dict[str, Pair], float | None]:
    """The pairs of an adapter file as they are after rounding, and its alpha."""
    with GGUFReader(path) as reader:
        names = [name.removesuffix(".lora_a") for name in reader.tensors if name.endswith(".lora_a")]
        values = {name: tensor.dequantize() for name, tensor in reader.tensors.items()}
        alpha = reader.metadata.get("adapter.lora.alpha")
    return {name: (values[f"{name}.lora_a"], values[f"{name}.lora_b"]) for name in names}, alpha


def merged_model(model: Path, out: Path, adapters: Sequence[tuple[Path, float]]) -> Path:
    """The F32 model with the adapters added to its weights. A head of its own stays what it was, also if it is the
    embedding."""
    with GGUFReader(model) as reader:
        weights = {name: tensor.dequantize().astype(np.float64) for name, tensor in reader.tensors.items()}
        if "output.weight" not in weights:
            weights["output.weight"] = weights[EMBEDDING].copy()
        for path, scale in adapters:
            pairs, alpha = read_pairs(path)
            for name, pair in pairs.items():
                rank = pair[1].shape[-1]
                weights[name] += scale * (alpha / rank if alpha else 1.0) * product(name, pair)
        with GGUFWriter(out, reader.version) as writer:
            for key, (type, item_type) in reader.metadata_types.items():
                writer.set_metadata(key, reader.metadata[key], type, item_type)
            for name, values in weights.items():
                writer.add_tensor(name, TensorType.F32, values.shape)
            for name, values in weights.items():
                writer.write_tensor(name, values.astype(np.float32).reshape(-1).view(np.uint8))
    return out


def matrices(model: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what adapters can change in a model, its head among them."""
    with GGUFReader(model) as reader:
        shapes = {name: tensor.shape for name, tensor in reader.tensors.items()}
    shapes.setdefault("output.weight", shapes[EMBEDDING])
    return {name: shape for name, shape in shapes.items() if len(shape) > 1}
