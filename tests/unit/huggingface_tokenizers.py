"""tokenizer.json files of published tokenizers, rebuilt from their vocabularies in GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qrun.engine.text.tokenizer import Tokenizer
from qrun.formats import GGUFReader, GGUFWriter
from qrun.models.huggingface.entries import Entries

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")  # fmt: skip
CONTROL = 3
BYTE = 6


def byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# How each is cut into words, as the published files have it.
STEPS = {
    "gpt-2": byte_level(True),
    "starcoder": sequence({"type": "Digits", "individual_digits": True}, byte_level(True)),
    "llama-bpe": sequence(split(LLAMA3), byte_level(False)),
    "qwen2": sequence(split(LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), byte_level(False)),
}


def write_byte_pair(path: Path, reader: GGUFReader, name: str) -> None:
    """A byte-level tokenizer, as Transformers saves it."""
    tokens, types = reader.metadata["tokenizer.ggml.tokens"], reader.metadata["tokenizer.ggml.token_type"]
    merges = reader.metadata["tokenizer.ggml.merges"]
    added = [
        {"id": id, "content": token, "special": bool(types[id] == CONTROL)}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for id, token in enumerate(tokens) if types[id] != 1 and not token.startswith("[PAD")
    ]  # fmt: skip
    last = max(id for id, type in enumerate(types) if type == 1)  # behind it come tokens that are no part of the model
    processor: dict[str, Any] = byte_level(True) | {"trim_offsets": False}
    if name == "llama-bpe":
        bos = "<|begin_of_text|>"
        single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        special = {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}}
        pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
        template = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
        processor = {"type": "Sequence", "processors": [processor, template]}
    vocab = {token: id for id, token in enumerate(tokens[: last + 1])}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "fuse_unk": False,
        "end_of_word_suffix": None, "byte_fallback": False, "ignore_merges": name == "llama-bpe", "vocab": vocab,
        "merges": merges,
    }  # fmt: skip
    tokenizer = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
                 "pre_tokenizer": STEPS[name], "post_processor": processor, "decoder": byte_level(True),
                 "model": model}  # fmt: skip
    path.write_text(json.dumps(tokenizer))


def write_merging(path: Path, reader: GGUFReader) -> None:
    """A SentencePiece model as Transformers turns it into merges: every way to make a piece of two, by its score."""
    tokens, scores = reader.metadata["tokenizer.ggml.tokens"], reader.metadata["tokenizer.ggml.scores"]
    types = reader.metadata["tokenizer.ggml.token_type"]
    ids = {token: id for id, token in enumerate(tokens) if types[id] == 1}
    merges = sorted(
        (-scores[ids[token]], ids[token[:cut]], ids[token[cut:]], token[:cut], token[cut:])
        for token in ids for cut in range(1, len(token)) if token[:cut] in ids and token[cut:] in ids
    )  # fmt: skip
    vocab = {token: id for id, token in enumerate(tokens) if types[id] in (1, 2, BYTE) or id < 3}
    added = [{"id": id, "content": tokens[id], "special": True} for id in range(3)]
    model = {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "vocab": vocab,
             "merges": [list(merge[3:]) for merge in merges]}  # fmt: skip
    prepend = {"type": "Prepend", "prepend": "▁"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer = {"type": "Sequence", "normalizers": [prepend, replace]}
    path.write_text(json.dumps({"added_tokens": added, "normalizer": normalizer, "model": model}))


def tokenizer_of(entries: Entries, path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file with these entries."""
    with GGUFWriter(path) as writer:
        for key, value in entries.values.items():
            writer.set_metadata(key, value, *entries.types[key])
    return Tokenizer.load(path)
