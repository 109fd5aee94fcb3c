"""Bytes on disk <-> arrays: GGUF files and the block formats of their tensors."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qrun.formats.errors import FormatError, QrunError

if TYPE_CHECKING:
    from qrun.formats.blocks import TensorType, dequantize
    from qrun.formats.gguf import GGUFReader, GGUFWriter, TensorInfo, ValueType

__all__ = [
    "FormatError", "GGUFReader", "GGUFWriter", "QrunError", "TensorInfo", "TensorType", "ValueType", "dequantize",
]  # fmt: skip

# Imported when first asked for: the errors alone need no NumPy.
_MODULES = {
    "GGUFReader": "gguf", "GGUFWriter": "gguf", "TensorInfo": "gguf", "ValueType": "gguf",
    "TensorType": "blocks", "dequantize": "blocks",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
