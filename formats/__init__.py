"""Bytes on disk <-> arrays: GGUF files and the block formats of their tensors."""

from qrun.formats.blocks import TensorType, dequantize
from qrun.formats.errors import FormatError
from qrun.formats.gguf import GGUFReader, GGUFWriter, TensorInfo, ValueType

__all__ = ["FormatError", "GGUFReader", "GGUFWriter", "TensorInfo", "TensorType", "ValueType", "dequantize"]
