"""The tokens of a checkpoint's tokenizer, with types, scores or merges, as a GGUF file lists them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qrun.formats import FormatError
from qrun.formats.gguf.cursor import quote
from qrun.models.huggingface.pretokenizers import pre_tokenizer_name
from qrun.models.huggingface.sentencepiece import SentencePieceModel, read_sentencepiece

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

SPACE = "▁"  # by which SentencePiece spells a space
UNUSED_SCORE, ADDED_SCORE = -10000.0, -1000.0
# Added tokens that files call ordinary text by mistake (Gemma, DeepSeek, Command-R).
_LOOK_SPECIAL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL)  # noqa: RUF001
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass
class TokenizerFiles:
    """What a folder says of its tokenizer: the contents of its files, empty where there is none."""

    folder: Path
    tokenizer: Mapping[str, Any]  # tokenizer.json
    config: Mapping[str, Any]  # tokenizer_config.json
    added: Mapping[str, Any]  # added_tokens.json
    special: Mapping[str, Any]  # special_tokens_map.json

    @property
    def path(self) -> Path:
        return self.folder / "tokenizer.json"

    def added_tokens(self) -> Iterator[tuple[int, str, bool]]:
        """Tokens beside the model's own: id, text, whether special. Later ones replace earlier ones."""
        for text, id in self.added.items():
            yield self._id(id), text, False
        decoder = self.config.get("added_tokens_decoder")
        if isinstance(decoder, dict):
            for id, token in decoder.items():
                yield self._added_token(id, token)
        tokens = self.tokenizer.get("added_tokens")
        if isinstance(tokens, list):
            for token in tokens:
                yield self._added_token(token.get("id") if isinstance(token, dict) else None, token)

    def _added_token(self, id: Any, token: Any) -> tuple[int, str, bool]:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise FormatError(self.path, f"the added token {quote(str(token))} has no content")
        return self._id(id), token["content"], bool(token.get("special"))

    def _id(self, id: Any) -> int:
        if isinstance(id, str) and id.isdecimal() and len(id) < 10:
            id = int(id)
        if isinstance(id, bool) or not isinstance(id, int) or id < 0:
            raise FormatError(self.path, f"an added token has the id {quote(str(id))}")
        return id


@dataclass
class Vocabulary:
    """model, pre: the values of tokenizer.ggml.model and .pre. scores, merges: of the models that have them."""

    model: str
    pre: str
    tokens: list[str | bytes]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    add_space_prefix: bool | None = None
    ids: dict[str, int] = field(default_factory=dict)  # of the tokens that are text

    def put(self, id: int, token: str | bytes, type: int, score: float = 0.0) -> None:
        """A token; one that is beyond the vocabulary has no embedding, and is left out."""
        if id >= len(self.tokens):
            return
        self.tokens[id] = token
        self.types[id] = type
        if self.scores is not None:
            self.scores[id] = score
        if isinstance(token, str):
            self.ids[token] = id


def read_vocabulary(files: TokenizerFiles, n_vocab: int) -> Vocabulary:
    """n_vocab: rows of the embedding. Raises FormatError if there is no tokenizer, or none of a known kind."""
    model = files.tokenizer.get("model")
    path = files.folder / "tokenizer.model"
    if isinstance(model, dict) and model.get("type", "BPE") == "BPE" and not model.get("byte_fallback"):
        return _byte_pair(files, model, n_vocab)
    if path.is_file():
        return _sentencepiece(files, read_sentencepiece(path), n_vocab)
    if isinstance(model, dict) and model.get("type", "BPE") == "BPE":
        return _sentencepiece(files, _pieces_of_merges(files.path, files.tokenizer, model), n_vocab)
    if files.tokenizer:
        kind = model.get("type") if isinstance(model, dict) else None
        raise FormatError(files.path, f"a tokenizer of the kind {quote(str(kind))} is not supported")
    raise FormatError(files.folder, "there is neither tokenizer.json nor tokenizer.model")


def _empty(model: str, pre: str, n_vocab: int, scored: bool) -> Vocabulary:
    tokens: list[str | bytes] = [f"[PAD{id}]" for id in range(n_vocab)]
    return Vocabulary(model, pre, tokens, [UNUSED] * n_vocab, [UNUSED_SCORE] * n_vocab if scored else None)


def _put_added(vocabulary: Vocabulary, files: TokenizerFiles) -> None:
    """The tokens beside the model's own, in the place of what has their ids."""
    for id, text, special in files.added_tokens():
        control = special or _LOOK_SPECIAL.fullmatch(text) is not None
        spelt = text if control else text.replace(SPACE, " ")
        vocabulary.put(id, spelt, CONTROL if control else USER_DEFINED, ADDED_SCORE)
        vocabulary.ids[text] = id


def _byte_pair(files: TokenizerFiles, model: Mapping[str, Any], n_vocab: int) -> Vocabulary:
    """The bytes of a text are spelt in characters, and those merge: GPT-2's way."""
    vocabulary = _empty("gpt2", pre_tokenizer_name(files.path, files.tokenizer), n_vocab, False)
    for token, id in _vocab(files.path, model).items():
        if id >= n_vocab:
            raise FormatError(files.path, f"token {quote(token)} has the id {id}, and there are {n_vocab} embeddings")
        vocabulary.put(id, token, NORMAL)
    _put_added(vocabulary, files)
    vocabulary.merges = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in _merges(files.path, model)]
    return vocabulary


def _sentencepiece(files: TokenizerFiles, model: SentencePieceModel, n_vocab: int) -> Vocabulary:
    """Characters merge by the score of what they make: SentencePiece's way."""
    vocabulary = _empty("llama", "default", n_vocab, True)
    for id, (piece, score, type) in enumerate(zip(model.pieces, model.scores, model.types, strict=True)):
        try:
            vocabulary.put(id, piece.decode(), type, score)
        except UnicodeDecodeError:
            vocabulary.put(id, piece, type, score)
    _put_added(vocabulary, files)
    prefix = files.config.get("add_prefix_space")
    vocabulary.add_space_prefix = prefix if isinstance(prefix, bool) else model.add_dummy_prefix
    return vocabulary


def _pieces_of_merges(path: Path, tokenizer: Mapping[str, Any], model: Mapping[str, Any]) -> SentencePieceModel:
    """A tokenizer.json that was made from a SentencePiece model: what merges first has the highest score."""
    vocab = _vocab(path, model)
    size = max(vocab.values(), default=-1) + 1
    if not vocab or size > 2 * len(vocab) + 1000:
        raise FormatError(path, f"the vocabulary has {len(vocab)} tokens with ids up to {size - 1}")
    merged: dict[str, int] = {}
    for left, right in _merges(path, model):
        merged.setdefault(left + right, len(merged))
    pieces = SentencePieceModel([b"[PAD%d]" % id for id in range(size)], [UNUSED_SCORE] * size, [UNUSED] * size)
    for token, id in vocab.items():
        pieces.pieces[id] = token.encode("utf-8", "surrogatepass")
        pieces.scores[id] = -float(merged.get(token, len(merged)))
        pieces.types[id] = BYTE if _BYTE_PIECE.fullmatch(token) else NORMAL
    unknown = model.get("unk_token")
    if isinstance(unknown, str) and unknown in vocab:
        pieces.types[vocab[unknown]] = UNKNOWN
    pieces.add_dummy_prefix = _adds_prefix(tokenizer.get("normalizer")) or _adds_prefix(tokenizer.get("pre_tokenizer"))
    return pieces


def _adds_prefix(step: Any) -> bool:
    """Whether a step of a tokenizer.json puts a space before a text."""
    if not isinstance(step, dict):
        return False
    if step.get("type") == "Sequence":
        steps = step.get("normalizers") or step.get("pretokenizers")
        return any(_adds_prefix(part) for part in steps if isinstance(part, dict)) if isinstance(steps, list) else False
    if step.get("type") == "Metaspace":
        return step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never"
    return step.get("type") == "Prepend" and step.get("prepend") == SPACE


def _vocab(path: Path, model: Mapping[str, Any]) -> dict[str, int]:
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(type(id) is int and 0 <= id < 1 << 24 for id in vocab.values()):
        raise FormatError(path, "the vocabulary is not an object of tokens and ids")
    return vocab


def _merges(path: Path, model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Written as "left right", or as a list of both."""
    merges = model.get("merges")
    pairs = []
    for merge in merges if isinstance(merges, list) else [None]:
        pair = tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) if isinstance(merge, list) else ()
        if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise FormatError(path, f"the merge {quote(str(merge))} is not one of two tokens")
        pairs.append((pair[0], pair[1]))
    return pairs
