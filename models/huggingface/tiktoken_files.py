"""Vocabularies of the library tiktoken: a line for each token, its bytes in base 64 and its rank.

Bytes merge into the token of the lowest rank, so that a merge is what two tokens make another one of. How a text is cut
into words, and which special tokens follow behind the others, lies in the class that a checkpoint brings along as a
program. That is not run: what those of the published models do stands here.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from qrun.formats import FormatError
from qrun.formats.mapping import read_file, text_lookalike
from qrun.models.huggingface.text_rules import BYTE_NAMES

MAX_BYTES = 1 << 26
MAX_LENGTH = 1 << 10  # of a token, in bytes
_END = "<|endoftext|>"
_EXTRAS = tuple(f"<|extra_{number}|>" for number in range(205))
_NFC = {"type": "NFC"}


@dataclass(frozen=True)
class _Class:
    """pre: how a text is cut into words, by GGUF's name. special: the tokens behind those of the file. reserved: how
    many places follow for those that the configuration names. counted: ranks are the numbers of lines."""

    pre: str
    normalizer: Mapping[str, Any] | None = None
    special: tuple[str, ...] = ()
    reserved: int = 0
    counted: bool = False


_CLASSES = {
    "qwen.tiktoken": _Class("qwen2", _NFC, (_END, "<|im_start|>", "<|im_end|>", *_EXTRAS)),
    "hy.tiktoken": _Class(
        "hunyuan", _NFC, (_END, "<|startoftext|>", "<|bos|>", "<|eos|>", "<|pad|>", *_EXTRAS), counted=True
    ),
    "tiktoken.model": _Class("kimi-k2", reserved=256),
}
_GLM4 = _Class("chatglm-bpe")  # whose file has the name that SentencePiece's have
GLM4_CLASS, GLM4_FILE = "ChatGLM4Tokenizer", "tokenizer.model"


@dataclass(frozen=True)
class Ranks:
    """path: of the file. pre: see above. tokenizer: what a tokenizer.json would say, and defaults: what
    tokenizer_config.json would, where that says nothing."""

    path: Path
    pre: str
    tokenizer: Mapping[str, Any]
    defaults: Mapping[str, str]


def read_tiktoken(folder: Path, settings: Mapping[str, Any]) -> Ranks | None:
    """The vocabulary of a folder that has one of these files and no tokenizer.json; None of others.

    settings: tokenizer_config.json. Raises FormatError for a file that is damaged.
    """
    named = [(folder / name, kind) for name, kind in _CLASSES.items()]
    if settings.get("tokenizer_class") == GLM4_CLASS:
        named.append((folder / GLM4_FILE, _GLM4))
    path, kind = next(((path, kind) for path, kind in named if path.is_file()), (None, None))
    if path is None or kind is None:
        return None
    ranks = _read_ranks(path, counted=kind.counted)
    spelt = {token: "".join(map(BYTE_NAMES.__getitem__, token)) for token in ranks}
    first = max(ranks.values()) + 1
    names = [*kind.special, *(f"<|reserved_token_{first + place}|>" for place in range(kind.reserved))]
    added: dict[int, Any] = {first + place: {"content": name, "special": True} for place, name in enumerate(names)}
    decoder = settings.get("added_tokens_decoder")
    for id, token in decoder.items() if isinstance(decoder, dict) else ():
        if id.isdecimal() and len(id) < 10:
            added[int(id)] = token
    tokenizer = {
        "normalizer": kind.normalizer,
        "pre_tokenizer": {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # a word that is a token is not merged
            "vocab": {spelt[token]: id for token, id in ranks.items()},
            "merges": [[spelt[left], spelt[right]] for left, right in _merges(ranks)],
        },
        "added_tokens": [{**token, "id": id} for id, token in sorted(added.items()) if isinstance(token, dict)],
    }
    return Ranks(path, kind.pre, tokenizer, {"bos_token": _END, "eos_token": _END} if _END in kind.special else {})


def _read_ranks(path: Path, *, counted: bool) -> dict[bytes, int]:
    """Tokens in the order of their ranks."""
    data = read_file(path, MAX_BYTES)
    if kind := text_lookalike(data):
        raise FormatError(path, f"this is no vocabulary of tiktoken; it is {kind}")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        token, _, rank = line.strip().partition(b" ")
        try:
            spelt = binascii.a2b_base64(token, strict_mode=True)
            id = int(rank) if len(rank) < 10 and rank.isdigit() else -1
        except binascii.Error:
            spelt, id = b"", -1
        if id < 0 or not 0 < len(spelt) <= MAX_LENGTH:
            raise FormatError(path, f"line {number} is not a token in base 64 and its rank")
        if spelt not in ranks:
            ranks[spelt] = len(ranks) if counted else id
    if not ranks:
        raise FormatError(path, "there are no tokens in it")
    if len(set(ranks.values())) < len(ranks):
        raise FormatError(path, "two tokens have the same rank")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise FormatError(path, f"there is no token for the byte {missing[0]}")
    return dict(sorted(ranks.items(), key=lambda pair: pair[1]))


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Of which two tokens each longer one is made. Those that nothing makes are found as whole words alone."""
    for token, rank in ranks.items():
        if len(token) > 1 and len(parts := _parts(ranks, token, rank)) == 2:
            yield parts[0], parts[1]


def _parts(ranks: Mapping[bytes, int], token: bytes, limit: int) -> list[bytes]:
    """What the bytes of a token have become when all merges before its own are done."""
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 2:
        best, place = min(
            (ranks.get(left + right, limit), place)
            for place, (left, right) in enumerate(pairwise(parts))
        )
        if best >= limit:
            break
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts
