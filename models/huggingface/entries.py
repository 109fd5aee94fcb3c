"""Metadata that are being put together for a GGUF file."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from qrun.formats import GGUFWriter, ValueType
from qrun.models.huggingface.config import Config

GATING = {"softmax": 1, "sigmoid": 2, "sqrtsoftplus": 4}  # expert_gating_func


class Entries:
    """Keys with their values and types, in order. A key that is set again keeps its place and gets the new value."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.types: dict[str, tuple[ValueType, ValueType | None]] = {}

    def text(self, key: str, value: str) -> None:
        """Halves of characters, which JSON can spell and names of files can hold, are replaced: no text has them."""
        self._set(key, value.encode("utf-8", "replace").decode(), ValueType.STRING)

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

    def remove(self, key: str) -> None:
        self.values.pop(key, None)
        self.types.pop(key, None)

    def writer(self, path: str | os.PathLike[str]) -> GGUFWriter:
        """A writer that has all of them, and as yet no tensors."""
        writer = GGUFWriter(path)
        for key, value in self.values.items():
            writer.set_metadata(key, value, *self.types[key])
        return writer

    def _set(self, key: str, value: Any, type: ValueType, item_type: ValueType | None = None) -> None:
        self.values[key] = value
        self.types[key] = (type, item_type)


class Facts:
    """What is known of a model's metadata while they are written: keys go by the architecture's name."""

    def __init__(self, entries: Entries, name: str, config: Config, sizes: Mapping[str, int]) -> None:
        self.entries = entries
        self.name = name
        self.config = config
        self.sizes = sizes

    def count(self, key: str, value: int) -> None:
        self.entries.count(f"{self.name}.{key}", value)

    def real(self, key: str, value: float) -> None:
        self.entries.real(f"{self.name}.{key}", value)

    def flag(self, key: str, value: bool) -> None:
        self.entries.flag(f"{self.name}.{key}", value)

    def text(self, key: str, value: str) -> None:
        self.entries.text(f"{self.name}.{key}", value)

    def array(self, key: str, values: Sequence[Any], item_type: ValueType = ValueType.INT32) -> None:
        self.entries.array(f"{self.name}.{key}", values, item_type)

    def flags(self, key: str, values: Sequence[bool]) -> None:
        self.array(key, list(values), ValueType.BOOL)
