"""What a checkpoint says of how its weights are quantised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qrun.formats.json_file import read_json
from qrun.models.huggingface.config import Config

KEY = "quantization_config"
MLX_KEY = "quantization"
OLD_KEY = "compression_config"  # of compressed-tensors
# The files in which it is said where config.json does not, and the method that each means.
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}


def read_quantization(config: Config) -> tuple[Mapping[str, Any] | None, Path]:
    """The settings, with their `quant_method`, or None if nothing is quantised; and the file that they come from."""
    settings = config.get(KEY) or config.get(MLX_KEY)
    if not settings and config.get(OLD_KEY):
        settings = {"quant_method": "compressed-tensors", **config.section(OLD_KEY).given()}
    if not settings:
        for name, method in FILES.items():
            path = config.path.parent / name
            if path.is_file():
                found = read_json(path)
                inner = found.get("quantization")  # beside which ModelOpt names itself
                return {"quant_method": method, **(inner if isinstance(inner, dict) else found)}, path
        return None, config.path
    if not isinstance(settings, dict):
        raise config.error(KEY, "is not an object")
    if settings.get("quant_method") is None:
        if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
            return {**settings, "quant_method": "bitsandbytes"}, config.path  # as it was when there was no other method
        if "bits" in settings and "group_size" in settings:
            return {**settings, "quant_method": "mlx"}, config.path
    return settings, config.path
