"""The tokenizer of a model, as the other parts see it."""

import codecs
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from importlib.util import find_spec
from os import PathLike
from typing import Self

from qrun.engine.errors import OfThisProcess
from qrun.engine.text.tokenizer.special import SpecialPieces
from qrun.engine.text.tokenizer.vocabulary import SPACE, PieceType, SpacePrefix, Vocabulary
from qrun.formats import GGUFReader


class Tokenizer(OfThisProcess):
    """Text to token ids and back, by the metadata of a GGUF file.

    n_vocab: number of tokens. bos_id, eos_id: None if the model has none. stop_ids: tokens that end an answer.
    add_bos: whether `encode` starts a text with `bos_id`. kind, pre: the tokenizer's kind and pre-tokenizer as the file
    names them. notices: what in the file cannot be meant and was passed over, a line each.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.n_vocab = len(vocabulary)
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.stop_ids = vocabulary.stop_ids
        self.add_bos = vocabulary.add_bos and vocabulary.bos_id is not None
        self.kind = vocabulary.kind
        self.pre = vocabulary.pre
        self.notices = tuple(vocabulary.notices)

    @classmethod
    def load(cls, source: str | PathLike[str] | GGUFReader) -> Self:
        """From a file, or from one that is open (and stays open as long as this tokenizer is used).

        Raises FormatError if the file has no tokenizer, or one that is damaged or of a kind that is not supported.
        """
        return cls(Vocabulary(source if isinstance(source, GGUFReader) else GGUFReader(source)))

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False, *, mark: str = "") -> list[int]:
        """add_special: with the tokens that the model wants at the start and end of a text (bos, eos).
        parse_special: control tokens that are spelt in the text ("<|im_start|>") become those tokens.
        mark: a character that is no part of the text, and keeps a spelling in which it stands from being found."""
        text = _whole_characters(text)
        ids = [self.bos_id] if add_special and self.add_bos and self.bos_id is not None else []
        at_start = True
        for part in self._special.split(text, control=parse_special):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._encode_part(part, at_start, parse_special, mark)
            at_start = False
        end_id = self._vocabulary.end_id
        return [*ids, end_id] if add_special and end_id is not None else ids

    def _encode_part(self, part: str, at_start: bool, parse_special: bool, mark: str) -> list[int]:
        """Of a text, what lies between special pieces. at_start: it begins the text."""
        normalized = self._vocabulary.normalizer(part)
        if mark and mark in part and mark not in normalized:  # gone with all private use: then no special piece counts
            return self._encode_text(self._with_space(normalized, at_start))
        ids: list[int] = []
        for piece in self._special.split_normalized(normalized, control=parse_special):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                ids += self._encode_marked(self._with_space(piece, at_start), mark)
            at_start = False
        return ids

    def _encode_marked(self, text: str, mark: str) -> list[int]:
        if not mark or mark not in text:
            return self._encode_text(text)
        ids = self._encode_text(text.replace(mark, ""))
        if self._special.ids.isdisjoint(ids):
            return ids
        # ordinary pieces can merge into a special one in some vocabularies; not across the mark, then
        return [id for part in text.split(mark) if part for id in self._encode_text(part)]

    def _with_space(self, text: str, at_start: bool) -> str:
        prefix = self._vocabulary.space_prefix
        if prefix == SpacePrefix.NEVER or (prefix == SpacePrefix.START and not at_start):
            return text
        return text if prefix != SpacePrefix.ALWAYS and text.startswith(self._spaces) else " " + text

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of a whole sequence; bytes that are not UTF-8 become U+FFFD.

        skip_special: leave out control tokens. Raises ValueError if an id is not in the vocabulary."""
        stream = self.stream(skip_special, at_start=True)
        return "".join([stream.push(id) for id in ids]) + stream.flush()

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for, on its own. Raises ValueError if the id is not in the vocabulary."""
        if not 0 <= id < self.n_vocab:
            raise ValueError(f"token {id} is not in the vocabulary of {self.n_vocab}")
        return self._vocabulary.text(id)

    def all_bytes(self) -> list[bytes]:
        """The bytes of all tokens, in the order of their ids."""
        return self._vocabulary.texts()

    @property
    def control_ids(self) -> frozenset[int]:
        """Tokens that no text spells: they are found where `encode` parses special tokens."""
        return self._hidden

    @property
    def end_id(self) -> int | None:
        """The token that `encode` puts behind a text; None where it adds none."""
        return self._vocabulary.end_id

    def encode_pair(self, first: str, second: str) -> list[int]:
        """The token ids of two texts as a model takes them that says how well they go together: each with the tokens
        that it wants around a text."""
        end = self.end_id
        begun = [self.bos_id] if self.add_bos and self.bos_id is not None else []
        ended = [end] if end is not None else []
        return [
            *begun, *self.encode(first, add_special=False), *self._vocabulary.between_ids,
            *self.encode(second, add_special=False), *ended,
        ]  # fmt: skip

    def encode_further(self, text: str, parse_special: bool = False) -> list[int]:
        """The token ids of a text that goes on from another: without the space that some models put before a text."""
        ids: list[int] = []
        for part in self._special.split(_whole_characters(text), control=parse_special):
            ids += [part] if isinstance(part, int) else self._encode_text(self._vocabulary.normalizer(part))
        return ids

    def has_piece(self, piece: str) -> bool:
        """Whether one token is spelt so."""
        return self._vocabulary.spellings.first(piece.encode()) is not None

    @property
    def special_spellings(self) -> tuple[frozenset[str], frozenset[str]]:
        """How special tokens are spelt: those that `encode` finds if asked to, and those that it finds in any text."""

        def spelt(*types: PieceType) -> frozenset[str]:
            pieces = self._vocabulary.pieces.some(self._vocabulary.ids_of(*types))
            return frozenset(piece.decode(errors="replace") for piece in pieces)

        always = spelt(PieceType.USER_DEFINED)
        return spelt(PieceType.CONTROL, PieceType.UNKNOWN) - always, always

    def stream(
        self, skip_special: bool = False, after: Sequence[int] = (), *, at_start: bool = False
    ) -> "StreamDecoder":
        """A decoder for tokens as they are generated.

        after: the tokens before them; if the last is special, or the tokens are `at_start` of a text, a space that
        models of SentencePiece's kind put at the start of every text is left out, as `decode` does."""
        at_start = at_start or (len(after) > 0 and after[-1] in self._special.ids)
        return StreamDecoder(self, skip_special, at_start)

    @property
    def _prefixes_space(self) -> bool:
        """Whether decoding leaves out the space that encoding puts before a text."""
        return self.kind in ("llama", "t5") and self._vocabulary.add_space_prefix

    @property
    def _spaces(self) -> str | tuple[str, ...]:
        """How a text may begin that has a space already. Models of SentencePiece's kind take one for the other."""
        return (" ", SPACE) if self.kind == "llama" else " "

    @property
    def packages(self) -> list[str]:
        """The packages that cut its texts: an app has to bring them along."""
        of_kind = {"rwkv": [], "llama": ["sentencepiece"], "t5": ["sentencepiece"]}.get(self.kind, ["tokenizers"])
        return sorted({*of_kind, *(["tokenizers"] if self._vocabulary.normalizer else [])})

    @cached_property
    def _special(self) -> SpecialPieces:
        return SpecialPieces(self._vocabulary)

    @cached_property
    def _hidden(self) -> frozenset[int]:
        return frozenset(self._vocabulary.ids_of(PieceType.CONTROL, PieceType.UNKNOWN))

    @cached_property
    def _encode_text(self) -> Callable[[str], list[int]]:
        """Built when a text is first encoded: a model that is only given token ids does not pay for it."""
        for package in self.packages:  # some are first used for long texts
            if find_spec(package) is None:
                raise ImportError(
                    f"the package {package} cuts this model's texts into tokens, and is not there: install it, or have "
                    f"it packed with the app",
                    name=package,
                )
        if self._vocabulary.is_byte_pair:
            from qrun.engine.text.tokenizer.bytepair import byte_pair_encoder

            return byte_pair_encoder(self._vocabulary)
        if self.kind == "bert":
            from qrun.engine.text.tokenizer.wordpiece import word_piece_encoder

            return word_piece_encoder(self._vocabulary)
        if self.kind == "rwkv":
            from qrun.engine.text.tokenizer.longest_match import longest_match_encoder

            return longest_match_encoder(self._vocabulary)
        from qrun.engine.text.tokenizer.sentencepiece_model import merging_encoder, unigram_encoder

        return (merging_encoder if self.kind == "llama" else unigram_encoder)(self._vocabulary)


def _whole_characters(text: str) -> str:
    """Halves of surrogate pairs are not text: no encoder takes them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class StreamDecoder:
    """Turns tokens into text one at a time, and never gives out half a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False, at_start: bool = False) -> None:
        """at_start: the next token starts a text, so that a space which `encode` put before it is left out."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._at_start = at_start
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The characters that this token completes: none, if its last character is still incomplete."""
        tokenizer = self._tokenizer
        text = tokenizer.token_bytes(id)
        if id in tokenizer._special.ids:
            if tokenizer._vocabulary.space_prefix != SpacePrefix.START:
                self._at_start = True
            if self._skip_special and id in tokenizer._hidden:
                return ""
        else:
            if self._at_start and tokenizer._prefixes_space:
                text = text.removeprefix(b" ")
            self._at_start = False
        return self._utf8.decode(text)

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the last character never was completed."""
        return self._utf8.decode(b"", final=True)
