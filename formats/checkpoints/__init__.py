"""Checkpoints: the tensors of a folder, each with what its numbers mean.

Most are plain floats. Others are packed: the numbers of one weight lie in several tensors, by a method that config.json
names under `quantization_config`. Each method has a file here; whatever the method, what comes out are tensors that are
decoded to float32 row by row.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qrun.formats.checkpoints import packed, scaled
from qrun.formats.checkpoints.plain import FLOATS, PlainTensor
from qrun.formats.errors import FormatError
from qrun.formats.gguf.cursor import quote
from qrun.formats.safetensors import StoredTensor
from qrun.formats.tensors import SourceTensor

__all__ = ["QUANT_METHODS", "PlainTensor", "decode_tensors"]

Decoder = Callable[[dict[str, StoredTensor], Mapping[str, Any], Path], dict[str, SourceTensor]]
"""decode(tensors, quantization, path): takes the tensors of its method out of the dict, and returns the weights that
they make, under the names that those would have if they were plain ("...q_proj.weight"). quantization: the settings,
from the file `path`. Raises FormatError where they, or the tensors, contradict themselves."""

QUANT_METHODS: dict[str, Decoder] = {
    "fp8": scaled.decode,
    "fbgemm_fp8": scaled.decode,
    "compressed-tensors": scaled.decode,
    "gptq": packed.decoder("gptq"),
    "awq": packed.decoder("awq"),
    "bitsandbytes": packed.decoder("bitsandbytes"),
}
"""By `quant_method`."""


def decode_tensors(
    tensors: Mapping[str, StoredTensor], quantization: Mapping[str, Any] | None, path: Path
) -> dict[str, SourceTensor]:
    """All weights of a checkpoint, by name. quantization: what `path`, mostly its config.json, says of that.

    Tensors that are neither floats nor part of a packed weight are left out.
    """
    rest = dict(tensors)
    weights: dict[str, SourceTensor] = {}
    if quantization is not None:
        method = str(quantization.get("quant_method"))
        if method not in QUANT_METHODS:
            known = ", ".join(QUANT_METHODS)
            raise FormatError(path, f"the quantisation method {quote(method)} is not supported (supported: {known})")
        weights = QUANT_METHODS[method](rest, quantization, path)
    return weights | {name: PlainTensor.of(tensor) for name, tensor in rest.items() if tensor.dtype in FLOATS}
