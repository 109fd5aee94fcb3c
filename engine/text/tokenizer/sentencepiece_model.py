"""SentencePiece models, built as the protobuf message that the `sentencepiece` library loads.

The message (sentencepiece_model.proto) is written as bytes, because a quarter of a million protobuf objects take
seconds. Its fields: ModelProto {1: pieces, 2: trainer_spec, 3: normalizer_spec}; SentencePiece {1: piece, 2: float
score, 3: type}; TrainerSpec {3: model_type, 35: byte_fallback}; NormalizerSpec {2: precompiled_charsmap,
3: add_dummy_prefix, 4: remove_extra_whitespaces, 5: escape_whitespaces}.
"""

from collections.abc import Callable

import numpy as np

from qrun.engine.text.tokenizer.merging import StagedEncoder, first_scored
from qrun.engine.text.tokenizer.vocabulary import PieceType, SpacePrefix, Vocabulary

_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_MAX_PIECE = 1 << 20


def merging_encoder(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """The "llama" kind: pieces merge by score. Special pieces were cut out of the text before, so to the library all
    pieces are ordinary text, as they are to llama.cpp."""
    _check_lengths(vocabulary)
    found = [vocabulary.spellings.last(b"<0x%02X>" % byte) for byte in range(256)]
    byte_ids = [id for id in found if id is not None]
    has_all_bytes = len(byte_ids) == 256  # the library wants all or none
    types = np.full(len(vocabulary), PieceType.NORMAL)
    if has_all_bytes:
        types[byte_ids] = PieceType.BYTE
    # Where the library takes spaces away from the ends of a text, it must put the one in front by itself.
    removes_spaces = vocabulary.flag("remove_extra_whitespaces", False)
    adds_prefix = removes_spaces and vocabulary.space_prefix == SpacePrefix.ALWAYS
    normalizer = _normalizer(vocabulary, adds_prefix, removes_spaces)
    is_plain = has_all_bytes and not removes_spaces and not vocabulary.charsmap()
    first = first_scored(vocabulary, byte_ids) if is_plain else None
    return StagedEncoder(
        first, lambda: _encoder(vocabulary, types, _BPE, has_all_bytes, normalizer), len(vocabulary)
    )


def unigram_encoder(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    """The "t5" kind: the likeliest sequence of pieces, of a text that the model's own table has normalised."""
    _check_lengths(vocabulary)
    types = vocabulary.types.copy()
    types[types == PieceType.UNKNOWN] = PieceType.CONTROL
    types[np.isin(types, (PieceType.UNUSED, PieceType.BYTE))] = PieceType.NORMAL
    removes_spaces = vocabulary.flag("remove_extra_whitespaces", False)
    normalizer = _normalizer(vocabulary, vocabulary.add_space_prefix, removes_spaces)
    return _encoder(vocabulary, types, _UNIGRAM, False, normalizer)


def _normalizer(vocabulary: Vocabulary, adds_prefix: bool, removes_spaces: bool) -> bytes:
    """The message NormalizerSpec, with the model's own table."""
    charsmap = vocabulary.charsmap()
    _check_charsmap(vocabulary, charsmap)
    table = _field(2, charsmap) if charsmap else b""
    return table + b"\x18%c\x20%c\x28\x01" % (adds_prefix, removes_spaces)


def _encoder(
    vocabulary: Vocabulary, types: np.ndarray, model_type: int, byte_fallback: bool, normalizer: bytes
) -> Callable[[str], list[int]]:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    trainer = b"\x18%c\x98\x02%c" % (model_type, byte_fallback)
    try:
        processor.LoadFromSerializedProto(_pieces(vocabulary, types) + _field(2, trainer) + _field(3, normalizer))
    except RuntimeError as error:
        raise vocabulary.error(f"the pieces do not make a SentencePiece model: {error}") from None
    # The library insists on an unknown piece of its own, and it has the id after the last.
    library_unknown = len(vocabulary)
    unknown = [] if vocabulary.unknown_id is None else [vocabulary.unknown_id]

    def encode(text: str) -> list[int]:
        ids: list[int] = processor.encode(text)
        if library_unknown in ids:
            return [known for id in ids for known in (unknown if id == library_unknown else [id])]
        return ids

    return encode


def _pieces(vocabulary: Vocabulary, types: np.ndarray) -> bytes:
    """All pieces as ModelProto.pieces. Lengths are written as varints of three bytes, so that every record has the
    same frame: 8 bytes before its text (message tag and length, text tag and length), 7 after it (score and type)."""
    pieces = _distinct(vocabulary)
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    # frames[i] ends record i - 1 and begins record i.
    frames = np.zeros((len(pieces) + 1, 15), np.uint8)
    frames[1:, 0] = 0x15
    frames[1:, 1:5] = vocabulary.scores.astype("<f4").view(np.uint8).reshape(-1, 4)
    frames[1:, 5] = 0x18
    frames[1:, 6] = types
    frames[:-1, 7] = 0x0A
    frames[:-1, 8:11] = _wide_varints(lengths + 11)
    frames[:-1, 11] = 0x0A
    frames[:-1, 12:15] = _wide_varints(lengths)
    parts: list[bytes] = [b""] * (2 * len(pieces) + 1)
    parts[0::2] = frames.view("V15")[:, 0].tolist()
    parts[1::2] = pieces
    unknown = b"\x0a\x01\xff\x18%c" % PieceType.UNKNOWN
    return b"".join(parts)[7:-8] + _field(1, unknown)


def _check_lengths(vocabulary: Vocabulary) -> None:
    lengths = vocabulary.pieces.lengths
    if lengths.max() > _MAX_PIECE:
        raise vocabulary.error(f"token {lengths.argmax()} is {lengths.max()} bytes long")


def _distinct(vocabulary: Vocabulary) -> list[bytes]:
    """The library refuses two pieces of one spelling. The last is the one that counts; the others get a name that is
    not UTF-8, so that no text contains it."""
    pieces = list(vocabulary.pieces)
    ids = dict(zip(pieces, range(len(pieces)), strict=True))
    if len(ids) == len(pieces):
        return pieces
    return [piece if ids[piece] == id else b"\xff%d" % id for id, piece in enumerate(pieces)]


def _wide_varints(values: np.ndarray) -> np.ndarray:
    return np.stack([values & 0x7F | 0x80, values >> 7 & 0x7F | 0x80, values >> 14], axis=1)


def _varint(value: int) -> bytes:
    return b"%c%c%c%c" % (value & 0x7F | 0x80, value >> 7 & 0x7F | 0x80, value >> 14 & 0x7F | 0x80, value >> 21)


def _field(number: int, message: bytes) -> bytes:
    return b"%c" % (number << 3 | 2) + _varint(len(message)) + message


def _check_charsmap(vocabulary: Vocabulary, charsmap: bytes) -> None:
    """The library walks this table without looking where it steps, so every step must stay inside.

    uint32 size of the trie, the trie (a Darts double array of uint32 units), then the replacements, which end in NUL.
    From unit i with offset o, the byte c leads to unit i ^ o ^ c; a unit with the top bit set is a value, the position
    of its replacement."""
    if not charsmap:
        return
    size = int.from_bytes(charsmap[:4], "little")
    texts = len(charsmap) - 4 - size
    if size % 1024 or size == 0 or texts <= 0 or charsmap[-1] != 0:
        raise vocabulary.error("tokenizer.ggml.precompiled_charsmap is damaged")
    units = np.frombuffer(charsmap, "<u4", size // 4, 4).astype(np.int64)
    is_value = units >= 1 << 31
    offsets = units >> 10 << ((units & 1 << 9) >> 6)
    steps = (np.arange(len(units)) ^ offsets) | 0xFF
    if (steps[~is_value] >= len(units)).any() or ((units[is_value] & (1 << 31) - 1) >= texts).any():
        raise vocabulary.error("tokenizer.ggml.precompiled_charsmap points outside itself")
