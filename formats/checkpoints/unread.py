"""Tensors that nothing here reads: parts of packed weights of a kind that is not known, or not said."""

from __future__ import annotations

from dataclasses import dataclass

from qrun.formats.blocks import TensorType
from qrun.formats.blocks.layout import F32Array
from qrun.formats.errors import FormatError
from qrun.formats.safetensors import StoredTensor
from qrun.formats.tensors import SourceTensor


@dataclass(frozen=True, eq=False)
class UnreadTensor(SourceTensor):
    """Integers, of which nothing says what they mean. Where one is left over, the weights would be wrong."""

    stored: StoredTensor

    @classmethod
    def of(cls, stored: StoredTensor) -> UnreadTensor:
        return cls(stored.name, TensorType.F32, stored.shape, stored)

    def rows(self, start: int, end: int) -> F32Array:
        raise self.unread()

    def forget(self) -> None:
        self.stored.forget()

    def error(self, reason: str) -> FormatError:
        return self.stored.error(reason)

    def unread(self) -> FormatError:
        """The error to raise."""
        what = f"holds numbers of type {self.stored.dtype}, as quantised weights have them"
        return self.error(f"{what}: how they are to be read is not said, or not known here")
