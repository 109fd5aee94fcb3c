"""tokenizer.model: a SentencePiece model, read for its pieces.

It is a protobuf message (sentencepiece_model.proto). Of its fields: ModelProto {1: pieces, 2: trainer_spec,
3: normalizer_spec}; SentencePiece {1: piece, 2: float score, 3: type}; TrainerSpec {3: model_type,
24: treat_whitespace_as_suffix}; NormalizerSpec {2: precompiled_charsmap, 3: add_dummy_prefix,
4: remove_extra_whitespaces, 5: escape_whitespaces}. In a message each field is a varint, of which the lowest three bits
give the kind of the value and the others the field's number, and then the value: a varint (0), 8 bytes (1), a length
and so many bytes (2), or 4 bytes (5).
"""

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qrun.formats import FormatError
from qrun.formats.mapping import lookalike, read_file

UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
NORMAL = 1  # SentencePiece.Type
MAX_BYTES = 1 << 28

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass
class SentencePieceModel:
    """pieces, scores, types: of each token, by id. add_dummy_prefix: a text begins with a space. charsmap: a table of
    characters and what stands for them, as the library compiles it; empty if nothing does. remove_extra_whitespaces:
    of several spaces one is left, and none at the ends."""

    pieces: list[bytes]
    scores: list[float]
    types: list[int]
    add_dummy_prefix: bool = True
    charsmap: bytes = b""
    remove_extra_whitespaces: bool = True


def read_sentencepiece(path: Path, wanted: int = BPE) -> SentencePieceModel:
    """Raises FormatError if the file is missing, damaged, or of another kind than is wanted."""
    data = read_file(path, MAX_BYTES)
    if kind := lookalike(data):
        raise FormatError(path, f"this is no SentencePiece model; it is {kind}")
    if re.match(rb"[A-Za-z0-9+/]+=* [0-9]+\n", data):
        raise FormatError(path, "this is a vocabulary of tiktoken: save the tokenizer as tokenizer.json")
    try:
        return _parse(path, data, wanted)
    except (IndexError, struct.error):
        raise FormatError(path, "this is no SentencePiece model, or a damaged one") from None


def _parse(path: Path, data: bytes, wanted: int) -> SentencePieceModel:
    model = SentencePieceModel([], [], [])
    model_type: int | bytes = 1
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            _add_piece(path, model, value)
        elif number == 2 and isinstance(value, bytes):
            trainer = dict(_fields(value))
            model_type = trainer.get(3, model_type)
            if trainer.get(24):
                raise FormatError(path, "a SentencePiece model that puts spaces behind words is not supported")
        elif number == 3 and isinstance(value, bytes):
            _read_normalizer(path, model, dict(_fields(value)))
    if not model.pieces:
        raise FormatError(path, "this is no SentencePiece model: it has no pieces")
    if model_type != wanted:
        kind = "BPE" if wanted == BPE else "unigram"
        problem = f"the SentencePiece model is of type {model_type!r}, and only {wanted} ({kind}) is supported here"
        raise FormatError(path, problem)
    return model


def _read_normalizer(path: Path, model: SentencePieceModel, fields: dict[int, int | bytes]) -> None:
    charsmap = fields.get(2, b"")
    model.charsmap = charsmap if isinstance(charsmap, bytes) else b""
    model.add_dummy_prefix = bool(fields.get(3, True))
    model.remove_extra_whitespaces = bool(fields.get(4, True))
    if not fields.get(5, True):
        raise FormatError(path, "a SentencePiece model that spells spaces as they are is not supported")


def _add_piece(path: Path, model: SentencePieceModel, message: bytes) -> None:
    piece, score, type = b"", 0.0, NORMAL
    for number, value in _fields(message):
        if number == 1 and isinstance(value, bytes):
            piece = value
        elif number == 2 and isinstance(value, bytes) and len(value) == 4:
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            type = value
    if not math.isfinite(score) or not 1 <= type <= 6:
        raise FormatError(path, f"piece {len(model.pieces)} has the score {score} and the type {type}")
    model.pieces.append(piece)
    model.scores.append(score)
    model.types.append(type)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: number, and a varint or bytes. Raises IndexError where the message ends too early."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise IndexError
        if size > len(data) - at:
            raise IndexError
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Seven bits a byte, the lowest first; the top bit says that more follow. The value, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise IndexError
