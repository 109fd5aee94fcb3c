"""The tokens of a checkpoint's tokenizer, with types, scores or merges, as a GGUF file lists them."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qrun.formats import FormatError
from qrun.formats.gguf.cursor import quote
from qrun.formats.mapping import read_file
from qrun.models.huggingface.pretokenizers import is_byte_level, pre_tokenizer
from qrun.models.huggingface.sentencepiece import UNIGRAM, SentencePieceModel, read_sentencepiece
from qrun.models.huggingface.text_rules import (
    BYTE_NAMES,
    SPACE,
    TextRules,
    byte_level_rules,
    metaspace_rules,
    sentencepiece_rules,
    unigram_rules,
    word_piece_rules,
)
from qrun.models.huggingface.tokenizer_files import TokenizerFiles
from qrun.models.normalizer import USUAL_WORD_LENGTH

RWKV = "rwkv_vocab_v20230424.txt"
MAX_RWKV_BYTES = 1 << 24
# One text or bytes as Python writes them.
_LITERAL = re.compile(r"""b?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""", re.DOTALL)

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

UNUSED_SCORE, ADDED_SCORE = -10000.0, -1000.0
# Added tokens that files call ordinary text by mistake (Gemma, DeepSeek, Command-R).
_LOOK_SPECIAL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL)  # noqa: RUF001
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Of Gemma 4: what parts of an answer stand between. They are text, so that whoever reads the answer sees them.
VISIBLE = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


@dataclass
class Vocabulary:
    """model, pre: the values of tokenizer.ggml.model and .pre. scores, merges: of the models that have them.

    rules: what is done to a text first. flagged: the tokens that are found in a special way, by the names of FLAGS.
    ignore_merges, unknown, fuse_unknown: of byte-pair models, where tokenizer.json says more than the names do.
    """

    model: str
    pre: str
    tokens: list[str | bytes]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    rules: TextRules = field(default_factory=TextRules)
    flagged: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in FLAGS})
    ignore_merges: bool | None = None
    unknown: int | None = None
    fuse_unknown: bool = False
    max_word_length: int | None = None
    """Of word pieces, where it is not the usual one."""
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


def read_vocabulary(files: TokenizerFiles, n_vocab: int, *, merged: bool = False) -> Vocabulary:
    """n_vocab: rows of the embedding. merged: files of the model have pieces of text with their merges, as Gemma 4's.
    Raises FormatError if there is no tokenizer, or none of a known kind."""
    model = files.tokenizer.get("model")
    path = files.folder / "tokenizer.model"
    if isinstance(model, dict) and model.get("type", "BPE") == "BPE":
        _check_model(files.path, model)
        if is_byte_level(files.tokenizer) or not model.get("byte_fallback"):
            return _byte_pair(files, model, n_vocab)
        pieces = _pieces_of_merges(files.path, model)
        rules = metaspace_rules(files.path, files.tokenizer, pieces.pieces)
        if merged:
            return _merged_pieces(files, model, pieces, rules, n_vocab)
        return _sentencepiece(files, read_sentencepiece(path) if path.is_file() else pieces, rules, n_vocab)
    if isinstance(model, dict) and model.get("type") == "WordPiece":
        return _word_pieces(files, model, n_vocab)
    if isinstance(model, dict) and model.get("type") == "Unigram":
        return _unigram(files, model, n_vocab)
    if path.is_file() and not isinstance(model, dict):
        sentencepiece = read_sentencepiece(path)
        return _sentencepiece(files, sentencepiece, sentencepiece_rules(sentencepiece), n_vocab)
    if (files.folder / RWKV).is_file():
        return _rwkv(files.folder / RWKV, n_vocab)
    unigram = files.folder / "spiece.model"
    if unigram.is_file() and not files.tokenizer:
        return _unigram_pieces(files, read_sentencepiece(unigram, UNIGRAM), n_vocab)
    if files.tokenizer:
        kind = model.get("type") if isinstance(model, dict) else None
        raise FormatError(files.path, f"a tokenizer of the kind {quote(str(kind))} is not supported")
    needed = "neither tokenizer.json nor tokenizer.model, nor vocab.json with merges.txt"
    raise FormatError(files.folder, f"there is {needed}")


def _check_model(path: Path, model: Mapping[str, Any]) -> None:
    """Refuse what a GGUF file cannot say of a byte-pair model, and would change the ids."""
    if dropout := model.get("dropout"):
        raise FormatError(path, f"its merges are left out by chance (dropout {quote(str(dropout))}): set that to null")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if affix := model.get(key):
            raise FormatError(path, f"a tokenizer with a {key} ({quote(str(affix))}) is not supported")
    for key in ("fuse_unk", "byte_fallback", "ignore_merges"):
        if not isinstance(model.get(key) or False, bool):
            raise FormatError(path, f"{key} is neither true nor false: {quote(str(model[key]))}")


def _empty(model: str, pre: str, n_vocab: int, scored: bool) -> Vocabulary:
    tokens: list[str | bytes] = [f"[PAD{id}]" for id in range(n_vocab)]
    return Vocabulary(model, pre, tokens, [UNUSED] * n_vocab, [UNUSED_SCORE] * n_vocab if scored else None)


def _put_added(vocabulary: Vocabulary, files: TokenizerFiles, n_pieces: int) -> None:
    """The tokens beside the model's own n_pieces, in the place of what has their ids."""
    for id, token in files.added_tokens(vocabulary.ids, n_pieces).items():
        text = token.content
        control = token.special or _LOOK_SPECIAL.fullmatch(text) is not None
        spelt = text if control or vocabulary.model != "llama" else text.replace(SPACE, " ")
        vocabulary.put(id, spelt, CONTROL if control else USER_DEFINED, ADDED_SCORE)
        vocabulary.ids[text] = id
        if id >= len(vocabulary.tokens):
            continue
        for name, ids in vocabulary.flagged.items():
            if getattr(token, name):
                ids.append(id)


def _byte_pair(files: TokenizerFiles, model: Mapping[str, Any], n_vocab: int) -> Vocabulary:
    """The bytes of a text are spelt in characters, and those merge: GPT-2's way."""
    vocab = _vocab(files.path, model)
    merges = _merges(files.path, model)
    for pair in merges:
        if not (pair[0] in vocab and pair[1] in vocab and "".join(pair) in vocab):
            raise FormatError(files.path, f"the merge {quote(' '.join(pair))} is of or makes a token that is not there")
    cutting = files.cutting or pre_tokenizer(files.path, files.tokenizer)
    vocabulary = _empty("gpt2", cutting.name, n_vocab, False)
    vocabulary.ignore_merges = cutting.ignore_merges
    vocabulary.rules = byte_level_rules(files.path, files.tokenizer, cutting.prefix_space)
    for token, id in vocab.items():
        if id >= n_vocab:
            raise FormatError(files.path, f"token {quote(token)} has the id {id}, and there are {n_vocab} embeddings")
        vocabulary.put(id, token, NORMAL)
    _put_added(vocabulary, files, len(vocab))
    vocabulary.merges = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in merges]
    if is_byte_level(files.tokenizer) and not all(byte in vocab for byte in BYTE_NAMES):
        _put_unknown(vocabulary, files, model, vocab)
    return vocabulary


def _put_unknown(
    vocabulary: Vocabulary, files: TokenizerFiles, model: Mapping[str, Any], vocab: Mapping[str, int]
) -> None:
    """What stands for bytes that have no token."""
    if model.get("byte_fallback") and any(_BYTE_PIECE.fullmatch(token) for token in vocab):
        raise FormatError(files.path, "a tokenizer that spells bytes in two ways is not supported")
    unknown = model.get("unk_token")
    if unknown is None:
        return
    if not isinstance(unknown, str) or unknown not in vocab:
        raise FormatError(files.path, f"unk_token is {quote(str(unknown))}, which is not in the vocabulary")
    vocabulary.unknown = vocab[unknown]
    vocabulary.fuse_unknown = bool(model.get("fuse_unk"))


def _sentencepiece(
    files: TokenizerFiles, model: SentencePieceModel, rules: TextRules, n_vocab: int, kind: str = "llama"
) -> Vocabulary:
    """Characters merge by the score of what they make: SentencePiece's way."""
    vocabulary = _empty(kind, "default" if kind == "llama" else "", n_vocab, True)
    vocabulary.rules = rules if files.is_general else rules.with_prefix(files.config.get("add_prefix_space"))
    for id, (piece, score, type) in enumerate(zip(model.pieces, model.scores, model.types, strict=True)):
        try:
            vocabulary.put(id, piece.decode(), type, score)
        except UnicodeDecodeError:
            vocabulary.put(id, piece, type, score)
    _put_added(vocabulary, files, len(model.pieces))
    return vocabulary


def _merged_pieces(
    files: TokenizerFiles, model: Mapping[str, Any], pieces: SentencePieceModel, rules: TextRules, n_vocab: int
) -> Vocabulary:
    """Characters merge in the order of a list, and what is no character is spelt in bytes: Gemma 4's way."""
    vocabulary = _sentencepiece(files, pieces, rules, n_vocab, "gemma4")
    vocabulary.scores = [ADDED_SCORE] * n_vocab
    vocabulary.merges = [" ".join(pair) for pair in _merges(files.path, model)]
    for id, token in enumerate(vocabulary.tokens):
        if token in VISIBLE and vocabulary.types[id] == CONTROL:
            vocabulary.types[id] = USER_DEFINED
    return vocabulary


def _pieces_of_merges(path: Path, model: Mapping[str, Any]) -> SentencePieceModel:
    """A tokenizer.json that was made from a SentencePiece model: what merges first has the highest score."""
    if model.get("ignore_merges"):
        raise FormatError(path, "a tokenizer with byte_fallback and ignore_merges is not supported")
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
    # What merges make, or a letter, is text all the same.
    if isinstance(unknown, str) and unknown in vocab and unknown not in merged and len(unknown) > 1:
        pieces.types[vocab[unknown]] = UNKNOWN
    return pieces


def _word_pieces(files: TokenizerFiles, model: Mapping[str, Any], n_vocab: int) -> Vocabulary:
    """Words are cut greedily: BERT's way. A piece that begins a word is spelt with the mark of a space before it."""
    if model.get("continuing_subword_prefix", "##") != "##":
        raise FormatError(files.path, "a tokenizer that spells what goes on within a word without ## is not supported")
    vocabulary = _empty("bert", "default", n_vocab, False)
    length = model.get("max_input_chars_per_word", USUAL_WORD_LENGTH)
    if type(length) is not int or not 0 <= length < 1 << 31:
        raise FormatError(files.path, f"max_input_chars_per_word is {quote(str(length))}, which is no length")
    vocabulary.max_word_length = length if length != USUAL_WORD_LENGTH else None
    for token, id in _vocab(files.path, model).items():
        if id >= n_vocab:
            raise FormatError(files.path, f"token {quote(token)} has the id {id}, and there are {n_vocab} embeddings")
        vocabulary.put(id, token.removeprefix("##") if token.startswith("##") else SPACE + token, NORMAL)
        vocabulary.ids[token] = id
    _put_added(vocabulary, files, len(vocabulary.ids))
    vocabulary.rules = word_piece_rules(files.path, files.tokenizer)
    return vocabulary


def _unigram(files: TokenizerFiles, model: Mapping[str, Any], n_vocab: int) -> Vocabulary:
    """The likeliest sequence of pieces: XLM-RoBERTa's way, and T5's."""
    pieces = model.get("vocab")
    if not isinstance(pieces, list) or not pieces:
        raise FormatError(files.path, "the vocabulary is not a list of tokens and scores")
    vocabulary = _empty("t5", "default", n_vocab, True)
    for id, pair in enumerate(pieces):
        scored = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
        if not scored or type(pair[1]) not in (int, float) or not abs(pair[1]) < 1e30:
            raise FormatError(files.path, f"token {id} is not a text and a score")
        vocabulary.put(id, pair[0], NORMAL, float(pair[1]))
    unknown = model.get("unk_id")
    _put_added(vocabulary, files, len(pieces))
    if type(unknown) is int and 0 <= unknown < n_vocab:
        vocabulary.types[unknown] = UNKNOWN
    vocabulary.rules = unigram_rules(files.path, files.tokenizer)
    return vocabulary


def _unigram_pieces(files: TokenizerFiles, model: SentencePieceModel, n_vocab: int) -> Vocabulary:
    """A vocabulary of likeliest pieces, of a file of SentencePiece's own."""
    vocabulary = _sentencepiece(files, model, sentencepiece_rules(model), n_vocab, "t5")
    vocabulary.pre = "default"
    assert vocabulary.scores is not None
    for id, (score, type) in enumerate(zip(model.scores[:n_vocab], model.types, strict=False)):
        if type != NORMAL:  # whatever the configuration calls them
            vocabulary.types[id], vocabulary.scores[id] = type, score
    return vocabulary


def _rwkv(path: Path, n_vocab: int) -> Vocabulary:
    """A line for each token but the first: its id, its bytes as Python writes them, and how many those are."""
    vocabulary = _empty("rwkv", "", n_vocab, False)
    vocabulary.put(0, "<s>", CONTROL)
    text = read_file(path, MAX_RWKV_BYTES).decode("utf-8", "replace")
    for number, line in enumerate(text.rstrip().split("\n"), 1):  # tokens may hold what else ends a line elsewhere
        id, _, rest = line.partition(" ")
        spelt, _, length = rest.rpartition(" ")
        try:
            if not _LITERAL.fullmatch(spelt):
                raise ValueError
            token = ast.literal_eval(spelt)
            token = token.encode() if isinstance(token, str) else token
            if not token or len(token) != int(length) or not 0 < int(id) < n_vocab:
                raise ValueError
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise FormatError(path, f"line {number} is no token: {quote(line[:40])}") from None
        if vocabulary.types[int(id)] != UNUSED:
            raise FormatError(path, f"line {number} has the id {int(id)}, as another one before it")
        vocabulary.put(int(id), repr(token)[2:-1], NORMAL)
    vocabulary.ids = {"<s>": 0}
    return vocabulary


def _vocab(path: Path, model: Mapping[str, Any]) -> dict[str, int]:
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(type(id) is int and 0 <= id < 1 << 24 for id in vocab.values()):
        raise FormatError(path, "the vocabulary is not an object of tokens and ids")
    if len(set(vocab.values())) < len(vocab):
        raise FormatError(path, "two tokens of the vocabulary have the same id")
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
