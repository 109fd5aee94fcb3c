"""The pieces of a model's tokenizer as its GGUF file gives them, checked."""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from enum import IntEnum, StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from qrun.engine.text.tokenizer.pretokenizers import PreTokenizer, pre_tokenizer
from qrun.engine.text.tokenizer.spellings import Spellings
from qrun.formats import FormatError, GGUFReader
from qrun.formats.gguf.cursor import quote
from qrun.formats.gguf.strings import Strings
from qrun.models.normalizer import USUAL_WORD_LENGTH, Normalizer, NormalizerError

SPACE = "▁"
"""U+2581, by which SentencePiece spells a space."""

KINDS = {"llama", "gpt2", "gemma4", "whitespace", "t5", "bert", "rwkv"}
"""The values of `tokenizer.ggml.model` that can be encoded with."""

_SEPARATED = ("jina-v1-en", "jina-v2-code", "roberta-bpe")  # pre-tokenizers of models that put one between two texts


class PieceType(IntEnum):
    """The values of `tokenizer.ggml.token_type` (SentencePiece's ModelProto.SentencePiece.Type)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class SpacePrefix(StrEnum):
    """Where a space is put before a text, which models of SentencePiece's kind were trained with.

    ALWAYS: before the text, and again behind every special piece. UNLESS_THERE: likewise, but not where one is.
    START: before the whole text, unless it begins with a space or a special piece.
    """

    NEVER = "never"
    ALWAYS = "always"
    UNLESS_THERE = "unless_there"
    START = "start"


# Pieces that end an answer, known by their text: not every file names them in its metadata.
_END_OF_GENERATION = frozenset(
    (
        "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> "
        "<|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> "
        "<｜end▁of▁sentence｜> [e~["  # noqa: RUF001 (DeepSeek writes its bars in full width)
    )
    .encode()
    .split()
)
# Pieces for code infilling that follow a finished file; they end an answer too.
_END_OF_FILE = frozenset(
    b"<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> "
    b"<|file_sep|>".split()
)
_INFILL = frozenset(
    (
        "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|> "  # noqa: RUF001
        "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|> "  # noqa: RUF001
        "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>"  # noqa: RUF001
    )
    .encode()
    .split()
)
# The marks of gpt-oss's message format, which is text that a caller wants to see.
_CHANNEL_MARKS = frozenset(b"<|channel|> <|message|> <|start|> <|constrain|>".split())

# Lists of all tokens that end an answer; the reference engine reads neither. Ollama has the first.
_END_LISTS = ("tokenizer.ggml.eos_token_ids", "tokenizer.ggml.eog_token_ids")

_ESCAPED = re.compile(rb"\\(x([0-9A-Fa-f]{2})|.)", re.DOTALL)
_ESCAPES = {b"t": b"\t", b"n": b"\n", b"r": b"\r"}
_BYTE_PIECE = re.compile(rb"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """pieces: the bytes of every token as the file spells them; types: uint8 [n], of PieceType; scores: float32 [n].
    notices: what in the file cannot be meant and was passed over, a line each.

    Beside what every engine reads, the keys under `qrun.tokenizer.` say what Transformers does to a text and GGUF has
    no key for. The converter writes them, and other engines pass them over:
    normalizer: a step as tokenizer.json describes it, or null. Where it is, other keys that are missing say no.
    lstrip_token_ids, rstrip_token_ids, single_word_token_ids, normalized_token_ids: special pieces that take the white
    space before or behind them, that are found only where no word goes on, and only in normalised text.
    space_prefix: see SpacePrefix.
    ignore_merges, unknown_token_id, fuse_unknown: of byte-pair models; as in tokenizer.json.
    max_word_length: of word pieces: a word of more characters is unknown.
    """

    def __init__(self, reader: GGUFReader) -> None:
        """Raises FormatError: no tokenizer, a kind that is not supported, or metadata which contradicts itself."""
        self._reader = reader
        self._metadata = reader.metadata
        self.path: Path = reader.path
        self.notices: list[str] = []
        self.kind: str = self._value("tokenizer.ggml.model", str, "none")
        if self.kind in ("none", "no_vocab"):
            raise self.error("the file has no tokenizer")
        if self.kind not in KINDS:
            raise self.error(f"tokenizer kind {quote(self.kind)} is not supported")
        self.pre: str | None = self._value("tokenizer.ggml.pre", str, None)

        self.pieces = self._pieces()
        self.types = self._types()
        self.scores = self._numbers("tokenizer.ggml.scores", np.float32, 0)
        if not np.isfinite(self.scores).all():
            raise self.error("tokenizer.ggml.scores has a value that is not finite")
        self._check_byte_pieces()

        sentencepiece = self.kind == "llama"
        self.bos_id = self._token_id("bos", {"llama": 1, "bert": 101}.get(self.kind))
        self.eos_id = self._token_id("eos", {"llama": 2, "t5": 1}.get(self.kind))
        self.unknown_id = self._token_id("unknown", {"llama": 0, "t5": 2, "bert": 100}.get(self.kind))
        add_bos = sentencepiece or self.kind == "bert" or (self.is_byte_pair and self.pre_tokenizer.add_bos)
        self.add_bos: bool = self._value("tokenizer.ggml.add_bos_token", bool, add_bos)
        add_eos = self._value("tokenizer.ggml.add_eos_token", bool, self.kind == "t5")
        self.end_id = self.eos_id if add_eos else None
        if self.kind == "bert":
            self.end_id = self._token_id("seperator", 102)  # spelt so in the format
        self.between_ids = self._between()
        self.add_space_prefix: bool = self._value("tokenizer.ggml.add_space_prefix", bool, sentencepiece)

        stops = self._mark_known_spellings()
        named = [self._token_id(name) for name in ("eot", "eom", "fim_pad", "fim_rep", "fim_sep")]
        for key in _END_LISTS:
            named += self._token_ids(key)
        self.stop_ids = frozenset(stops.union(id for id in [self.eos_id, *named] if id is not None))
        self._describe_text()

    def __len__(self) -> int:
        return len(self.pieces)

    def error(self, reason: str) -> FormatError:
        return FormatError(self.path, reason)

    @property
    def is_byte_pair(self) -> bool:
        return self.kind in ("gpt2", "gemma4", "whitespace")

    @cached_property
    def pre_tokenizer(self) -> PreTokenizer:
        pre = pre_tokenizer(self.kind if self.kind in ("gemma4", "whitespace") else self.pre)
        return replace(pre, ignore_merges=self._value("qrun.tokenizer.ignore_merges", bool, pre.ignore_merges))

    @cached_property
    def byte_pair_unknown(self) -> str | None:
        """The piece for a character that has none in a byte-pair vocabulary; None: it is left out."""
        ids = [self._metadata[key]] if (key := "qrun.tokenizer.unknown_token_id") in self._metadata else []
        if not all(type(id) is int and 0 <= id < len(self) for id in ids):
            raise self.error(f"{key} is no token")
        return self.pieces[ids[0]].decode(errors="replace") if ids else None

    @cached_property
    def fuse_unknown(self) -> bool:
        """Whether neighbours of that kind make one such piece together."""
        return bool(self._value("qrun.tokenizer.fuse_unknown", bool, False))

    @property
    def max_word_length(self) -> int:
        """The most characters of a word that is cut into word pieces."""
        key = "qrun.tokenizer.max_word_length"
        length = self._metadata.get(key, USUAL_WORD_LENGTH)
        if isinstance(length, bool) or not isinstance(length, int) or length < 0:
            raise self.error(f"{key} is no length")
        return length

    @cached_property
    def spellings(self) -> Spellings:
        """The ids of pieces."""
        return Spellings(self.pieces)

    def merges(self) -> Strings:
        """Byte-pair merges, first the one that was learnt first: b"left right"."""
        return self._strings("tokenizer.ggml.merges")

    def charsmap(self) -> bytes:
        """SentencePiece's compiled table of text normalisation, unchecked; empty where the model has none."""
        table = self._metadata.get("tokenizer.ggml.precompiled_charsmap", np.empty(0, np.uint8))
        if not isinstance(table, np.ndarray) or table.dtype.itemsize != 1:
            raise self.error("tokenizer.ggml.precompiled_charsmap is not an array of bytes")
        return table.tobytes()

    def flag(self, name: str, default: bool) -> bool:
        value: bool = self._value(f"tokenizer.ggml.{name}", bool, default)
        return value

    def _between(self) -> list[int]:
        """What stands between two texts that are compared: as after each, and in RoBERTa's family a separator more."""
        ended = [] if self.end_id is None else [self.end_id]
        if self.kind == "bert":
            return ended
        separator = self._token_id("seperator")
        adds = self._value("tokenizer.ggml.add_sep_token", bool, self.pre in _SEPARATED)
        # BERT's spelling: a text that ends with [SEP] has had it.
        if separator is None or not adds or (separator in ended and self.pieces[separator] == b"[SEP]"):
            return ended
        return [*ended, separator]

    def ids_of(self, *types: PieceType) -> list[int]:
        ids: list[int] = np.flatnonzero(np.isin(self.types, types)).tolist()
        return ids

    def _describe_text(self) -> None:
        """What is done to a text before its words are looked up."""
        self.lstrip_ids = self._piece_set("lstrip")
        self.rstrip_ids = self._piece_set("rstrip")
        self.single_word_ids = self._piece_set("single_word")
        self.normalized_ids = self._piece_set("normalized")
        described = self._value("qrun.tokenizer.normalizer", str, None)
        if described is None and self._is_phi3:
            self.rstrip_ids = self._phi3_rstrip_ids()
        if described is None:
            described = self._usual_normalizer()
        try:
            self.normalizer = Normalizer.of(described)
        except NormalizerError as error:
            raise self.error(f"qrun.tokenizer.normalizer: {error}") from None
        # The normalizer that a file describes puts the space there itself.
        unsaid = "qrun.tokenizer.normalizer" not in self._metadata
        spaced = unsaid and self.kind == "llama" and self.add_space_prefix
        default = SpacePrefix.ALWAYS if spaced else SpacePrefix.NEVER
        prefix = self._value("qrun.tokenizer.space_prefix", str, default)
        if prefix not in set(SpacePrefix):
            raise self.error(f"qrun.tokenizer.space_prefix is {quote(str(prefix))}")
        self.space_prefix = SpacePrefix(prefix)

    def _usual_normalizer(self) -> str:
        """What a file that does not say so leaves to those who know the model's family."""
        steps = []
        if self.kind == "gpt2" and self.pre_tokenizer.normalizer:
            steps.append({"type": self.pre_tokenizer.normalizer})
        if self.is_byte_pair and self.flag("normalizer.lowercase", False):
            steps.append({"type": "Lowercase"})
        return json.dumps({"type": "Sequence", "normalizers": steps})

    @property
    def _is_phi3(self) -> bool:
        name = self._value("general.name", str, "").lower()
        return "phi-3" in name or "phi3" in name

    def _phi3_rstrip_ids(self) -> frozenset[int]:
        """White space behind a special piece of Phi-3 belongs to it; files of other converters do not say so."""
        special = self.ids_of(PieceType.CONTROL, PieceType.USER_DEFINED, PieceType.UNKNOWN)
        return frozenset(id for id in special if self.pieces[id] not in (b"<unk>", b"<s>", b"<|endoftext|>"))

    def _piece_set(self, name: str) -> frozenset[int]:
        return frozenset(self._token_ids(f"qrun.tokenizer.{name}_token_ids"))

    def _value(self, key: str, kind: type, default: Any) -> Any:
        value = self._metadata.get(key, default)
        if value is not default and not isinstance(value, kind):
            raise self.error(f"{key} is not of type {kind.__name__}")
        return value

    def _token_id(self, name: str, default: int | None = None) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in self._metadata:
            return self._default_id(default)
        id = self._metadata[key]
        if isinstance(id, bool) or not isinstance(id, int):
            raise self.error(f"{key} is {id!r}, which is no token")
        if not 0 <= id < len(self):
            self._pass_over(key, id)
            return self._default_id(default)
        return id

    def _default_id(self, default: int | None) -> int | None:
        return default if default is not None and default < len(self) else None

    def _token_ids(self, key: str) -> list[int]:
        """The ids in a list that the file may have."""
        ids = self._metadata.get(key, np.empty(0, np.int32))
        if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu":
            raise self.error(f"{key} is not an array of token ids")
        is_bad = (ids < 0) | (ids >= len(self))
        if is_bad.any():  # one line, however many there are
            self._pass_over(key, int(ids[is_bad][0]))
        known: list[int] = ids[~is_bad].tolist()
        return known

    def _pass_over(self, key: str, id: int) -> None:
        self.notices.append(f"{self.path}: {key} is {id}, and the vocabulary has {len(self)} tokens: it is passed over")

    def _strings(self, key: str) -> Strings:
        if key not in self._metadata:
            raise self.error(f"{key} is missing")
        return self._reader.strings(key)

    def _pieces(self) -> Strings:
        pieces = self._strings("tokenizer.ggml.tokens")
        if not len(pieces):
            raise self.error("tokenizer.ggml.tokens is empty")
        if not pieces.lengths.all():
            return Strings.of([piece or b"[EMPTY_%d]" % i for i, piece in enumerate(pieces)])
        return pieces

    def _numbers(self, key: str, dtype: type, default: float) -> np.ndarray:
        values = self._metadata.get(key)
        if values is None:
            return np.full(len(self), default, dtype)
        if not isinstance(values, np.ndarray) or values.dtype.kind not in "iuf":
            raise self.error(f"{key} is not an array of numbers")
        if len(values) != len(self):
            raise self.error(f"{key} has {len(values)} values for {len(self)} tokens")
        with np.errstate(all="ignore"):  # what does not fit becomes infinite, or a type that does not exist
            return values.astype(dtype)

    def _types(self) -> np.ndarray:
        types = self._numbers("tokenizer.ggml.token_type", np.int64, PieceType.NORMAL)
        if self.kind == "llama" and "tokenizer.ggml.token_type" not in self._metadata:
            types[[bool(_BYTE_PIECE.fullmatch(piece)) for piece in self.pieces]] = PieceType.BYTE
        types[(types < PieceType.NORMAL) | (types > PieceType.BYTE)] = PieceType.UNUSED
        return types.astype(np.uint8)

    def _check_byte_pieces(self) -> None:
        for id in self.ids_of(PieceType.BYTE):
            if not _BYTE_PIECE.fullmatch(self.pieces[id]):
                raise self.error(f"token {id} is of type byte, but spelt {self.pieces[id]!r}")

    def _mark_known_spellings(self) -> set[int]:
        """Give special pieces the type that their spelling tells, as llama.cpp does; the ids of those that stop."""
        known = {
            piece: id
            for piece in _END_OF_GENERATION | _END_OF_FILE | _INFILL | _CHANNEL_MARKS
            if (id := self.spellings.first(piece)) is not None
        }

        def ids(spellings: Iterable[bytes]) -> set[int]:
            return {known[piece] for piece in spellings if piece in known}

        stops = ids(_END_OF_GENERATION | _END_OF_FILE)
        self.types[list(stops | ids(_INFILL))] = PieceType.CONTROL
        self.types[list(ids(_CHANNEL_MARKS))] = PieceType.USER_DEFINED
        # Where "<|end|>" ends a message and another piece ends the answer (gpt-oss, Solar), it is no stop.
        if b"<|end|>" in known and (
            known.keys() >= {b"<|call|>", b"<|return|>"}
            or known.keys() >= {b"<|call|>", b"<|flush|>"}
            or known.keys() >= {b"<|calls|>", b"<|flush|>"}
        ):
            self.types[known[b"<|end|>"]] = PieceType.USER_DEFINED
            stops.remove(known[b"<|end|>"])
        # Gemma 4 has a "</s>" that is an HTML tag and nothing more.
        if b"</s>" in known and b"<|tool_response>" in known:
            self.types[known[b"</s>"]] = PieceType.NORMAL
            stops.remove(known[b"</s>"])
        return stops

    def text(self, id: int) -> bytes:
        """The bytes that token `id` stands for."""
        piece, kind = self.pieces[id], int(self.types[id])
        if kind == PieceType.NORMAL:
            if self.is_byte_pair and self.pre_tokenizer.alphabet == "bytes":
                try:
                    return piece.decode().translate(_BYTES_OF).encode("latin-1")
                except ValueError:  # a character that stands for no byte
                    characters = piece.decode(errors="replace")
                    return b"".join(_BYTE_OF.get(c, c.encode(errors="replace")) for c in characters)
            return unescaped(piece) if self.kind == "rwkv" else piece.replace(SPACE.encode(), b" ")
        if kind == PieceType.BYTE:
            return bytes.fromhex(piece[3:5].decode())
        return b"" if kind == PieceType.UNUSED else piece

    def texts(self) -> list[bytes]:
        """Those of all tokens: mostly ten times as fast as one by one."""
        kinds = self.types.tolist()
        normal, space = int(PieceType.NORMAL), SPACE.encode()
        if self.kind == "rwkv":
            return [self.text(id) for id in range(len(kinds))]
        if not (self.is_byte_pair and self.pre_tokenizer.alphabet == "bytes"):
            return [
                piece.replace(space, b" ") if kind == normal else self.text(id)
                for id, (piece, kind) in enumerate(zip(self.pieces, kinds, strict=True))
            ]
        texts: list[bytes] = []
        for id, (piece, kind) in enumerate(zip(self.pieces, kinds, strict=True)):
            try:
                texts.append(piece.decode().translate(_BYTES_OF).encode("latin-1") if kind == normal else self.text(id))
            except ValueError:  # a character that stands for no byte
                texts.append(self.text(id))
        return texts


def unescaped(piece: bytes) -> bytes:
    """A piece as Python spells bytes; a character behind a backslash that means nothing is itself."""
    return _ESCAPED.sub(
        lambda match: bytes.fromhex(match[2].decode()) if match[2] else _ESCAPES.get(match[1], match[1]), piece
    )


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's spelling of bytes: a printable Latin-1 character is itself, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): bytes([byte]) for byte in printable},
        **{chr(0x100 + i): bytes([byte]) for i, byte in enumerate(others)},
    }


_BYTE_OF = _byte_alphabet()
# The same for `str.translate`; the others below U+0100 stand for no byte.
_BYTES_OF = dict.fromkeys(range(0x80, 0x100), "\uffff") | {ord(c): byte[0] for c, byte in _BYTE_OF.items()}
