"""Bytes on disk <-> arrays: GGUF files and the block formats of their tensors."""

from typing import TYPE_CHECKING

from qrun.formats.errors import FormatError, QrunError
from qrun.formats.on_demand import on_demand

if TYPE_CHECKING:
    from qrun.formats.blocks import TensorType, dequantize
    from qrun.formats.gguf import GGUFReader, GGUFWriter, TensorInfo, ValueType

__all__ = [
    "FormatError", "GGUFReader", "GGUFWriter", "QrunError", "TensorInfo", "TensorType", "ValueType", "dequantize",
]  # fmt: skip

# Imported when first asked for: the errors alone need no NumPy.
_MODULES = {
    "GGUFReader": "qrun.formats.gguf", "GGUFWriter": "qrun.formats.gguf", "TensorInfo": "qrun.formats.gguf",
    "ValueType": "qrun.formats.gguf",
    "TensorType": "qrun.formats.blocks", "dequantize": "qrun.formats.blocks",
}  # fmt: skip

__getattr__, __dir__ = on_demand(__name__, _MODULES)
