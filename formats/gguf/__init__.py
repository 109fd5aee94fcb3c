"""GGUF files: read, written, split. The format is specified in docs/gguf.md of the ggml project."""

from qrun.formats.gguf.file import TensorInfo
from qrun.formats.gguf.metadata import ValueType
from qrun.formats.gguf.reader import GGUFReader
from qrun.formats.gguf.writer import GGUFWriter, write_split

__all__ = ["GGUFReader", "GGUFWriter", "TensorInfo", "ValueType", "write_split"]
