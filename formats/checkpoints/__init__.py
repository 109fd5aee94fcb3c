"""Checkpoints: the tensors of a folder, each with what its numbers mean.

Most are plain floats. Others are packed: the numbers of one weight lie in several tensors, by a method that config.json
names under `quantization_config`. Each method has a file here; whatever the method, what comes out are tensors that are
decoded to float32 row by row.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from qrun.formats.checkpoints import microscaled, mlx, packed, scaled
from qrun.formats.checkpoints.plain import FLOATS, PlainTensor
from qrun.formats.checkpoints.scaled import DEVICES, ScaledTensor, parts_of
from qrun.formats.checkpoints.unread import UnreadTensor
from qrun.formats.errors import FormatError
from qrun.formats.gguf.cursor import quote
from qrun.formats.safetensors import StoredTensor
from qrun.formats.tensors import SourceTensor

__all__ = ["DEVICES", "QUANT_METHODS", "PlainTensor", "ScaledTensor", "UnreadTensor", "decode_tensors", "parts_of"]

Decoder = Callable[[dict[str, StoredTensor], Mapping[str, Any], Path], dict[str, SourceTensor]]
"""decode(tensors, quantization, path): takes the tensors of its method out of the dict, and returns the weights that
they make, under the names that those would have if they were plain ("...q_proj.weight"). quantization: the settings,
from the file `path`. Raises FormatError where they, or the tensors, contradict themselves."""

QUANT_METHODS: dict[str, Decoder] = {
    "fp8": microscaled.decode,
    "fbgemm_fp8": scaled.decode,
    "compressed-tensors": microscaled.decode,
    "modelopt": microscaled.decode,
    "mxfp4": microscaled.decode,
    "gptq": packed.decoder("gptq"),
    "awq": packed.decoder("awq"),
    "bitsandbytes": packed.decoder("bitsandbytes"),
    "mlx": mlx.decode,
}
"""By `quant_method`."""

# Methods that compute with other weights than those they store, which may well be plain.
ALWAYS_REFUSED = ("bitnet",)
# What tensors have that are neither weights nor parts of them: masks, positions.
NO_WEIGHTS = ("BOOL", "I64", "U64")
WIDE_FLOATS = ("F32", "F16", "BF16", "F64")
# Scales of activations, which are not quantised here.
UNUSED = (
    ".input_scale", ".input_global_scale", ".input_zero_point", ".input_scale_ub", ".activation_scale",
    ".output_scale", ".q_scale", ".prob_scale",
)  # fmt: skip


def decode_tensors(
    tensors: Mapping[str, StoredTensor],
    quantization: Mapping[str, Any] | None,
    path: Path,
    notice: Callable[[str], None] = lambda text: None,
    *,
    keep: bool = False,
) -> dict[str, SourceTensor]:
    """All weights of a checkpoint, by name. quantization: what `path`, mostly its config.json, says of that.

    keep: weights of four-bit floats have the type of GGUF that holds the same numbers, instead of single precision.

    What is neither floats nor part of a packed weight is an UnreadTensor. notice: called with a line where the settings
    say that weights are quantised and none is.
    """
    rest = {name: tensor for name, tensor in tensors.items() if not name.endswith(UNUSED)}
    weights: dict[str, SourceTensor] = {}
    method = "" if quantization is None else str(quantization.get("quant_method"))
    if not method and mlx.is_quantized(rest):  # whatever was lost of config.json
        method = "mlx"
    if quantization is not None and method not in ALWAYS_REFUSED and _are_plain(rest.values()):
        notice(f"{path}: the weights, said to be quantised ({quote(method)}), are not: they are read as they are")
    elif method:
        if method not in QUANT_METHODS:
            known = ", ".join(QUANT_METHODS)
            raise FormatError(path, f"the quantisation method {quote(method)} is not supported (supported: {known})")
        weights = QUANT_METHODS[method](rest, quantization or {}, path)
    return (microscaled.kept(weights) if keep else weights) | {
        name: PlainTensor.of(tensor) if tensor.dtype in FLOATS else UnreadTensor.of(tensor)
        for name, tensor in rest.items()
    }


def _are_plain(tensors: Iterable[StoredTensor]) -> bool:
    return all(tensor.dtype in (*WIDE_FLOATS, *NO_WEIGHTS) for tensor in tensors)
