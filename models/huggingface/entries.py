"""Metadata that are being put together for a GGUF file."""

import os
from collections.abc import Sequence
from typing import Any

from qrun.formats import GGUFWriter, ValueType


class Entries:
    """Keys with their values and types, in order. A key that is set again keeps its place and gets the new value."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.types: dict[str, tuple[ValueType, ValueType | None]] = {}

    def text(self, key: str, value: str) -> None:
        self._set(key, value, ValueType.STRING)

    def count(self, key: str, value: int) -> None:
        self._set(key, value, ValueType.UINT32)

    def integer(self, key: str, value: int) -> None:
        self._set(key, value, ValueType.INT32)

    def real(self, key: str, value: float) -> None:
        self._set(key, value, ValueType.FLOAT32)

    def flag(self, key: str, value: bool) -> None:
        self._set(key, value, ValueType.BOOL)

    def array(self, key: str, values: Sequence[Any], item_type: ValueType) -> None:
        self._set(key, values, ValueType.ARRAY, item_type)

    def writer(self, path: str | os.PathLike[str]) -> GGUFWriter:
        """A writer that has all of them, and as yet no tensors."""
        writer = GGUFWriter(path)
        for key, value in self.values.items():
            writer.set_metadata(key, value, *self.types[key])
        return writer

    def _set(self, key: str, value: Any, type: ValueType, item_type: ValueType | None = None) -> None:
        self.values[key] = value
        self.types[key] = (type, item_type)
