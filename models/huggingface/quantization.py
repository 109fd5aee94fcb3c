"""What a checkpoint says of how its weights are quantised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qrun.formats.json_file import read_json
from qrun.models.huggingface.config import Config

KEY = "quantization_config"
# The files in which AutoGPTQ and AutoAWQ said it before config.json had a place for it, and the method that each means.
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def read_quantization(config: Config) -> tuple[Mapping[str, Any] | None, Path]:
    """The settings, with their `quant_method`, or None if nothing is quantised; and the file that they come from."""
    settings = config.get(KEY)
    if settings is None:
        for name, method in FILES.items():
            path = config.path.parent / name
            if path.is_file():
                return {"quant_method": method, **read_json(path)}, path
        return None, config.path
    if not isinstance(settings, dict):
        raise config.error(KEY, "is not an object")
    if settings.get("quant_method") is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        settings = {**settings, "quant_method": "bitsandbytes"}  # as files were written when there was no other method
    return settings, config.path
