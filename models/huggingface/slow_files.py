"""vocab.json and merges.txt: a byte-pair tokenizer as it was saved before tokenizer.json came.

They hold tokens and merges alone. How a text is cut into words lies in the class of Transformers that reads them, so
what is made here of the two is the tokenizer.json that this class would save.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qrun.formats import FormatError
from qrun.formats.gguf.cursor import quote
from qrun.formats.json_file import read_json
from qrun.formats.mapping import read_file, text_lookalike

VOCAB, MERGES = "vocab.json", "merges.txt"
MAX_BYTES = 1 << 28

_GPT2: dict[str, Any] = {"pre_tokenizer": {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}}
_QWEN2: dict[str, Any] = {
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {
                    "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                },
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ],
    },
}
# What they do to a text, and the tokens with a part to play where the files name none.
_END = "<|endoftext|>"
_CLASSES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "GPT2Tokenizer": (_GPT2, {"bos_token": _END, "eos_token": _END, "unk_token": _END}),
    "CodeGenTokenizer": (_GPT2, {"bos_token": _END, "eos_token": _END, "unk_token": _END}),
    "Qwen2Tokenizer": (_QWEN2, {"eos_token": _END, "pad_token": _END, "unk_token": _END}),
}
_CLASS_OF_MODEL = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer",
                   "qwen2_moe": "Qwen2Tokenizer", "qwen3_moe": "Qwen2Tokenizer"}  # fmt: skip


def has_slow_files(folder: Path) -> bool:
    return (folder / VOCAB).is_file() and (folder / MERGES).is_file()


def read_slow_files(
    folder: Path, settings: Mapping[str, Any], model_type: Any
) -> tuple[dict[str, Any], dict[str, str]]:
    """The contents of a tokenizer.json without added tokens, and the special tokens that the class has by default.

    settings: tokenizer_config.json. model_type: what config.json has. Raises FormatError for files that are damaged,
    and for a class whose rules are not known.
    """
    tokenizer_class = settings.get("tokenizer_class")
    name = tokenizer_class if isinstance(tokenizer_class, str) else _CLASS_OF_MODEL.get(str(model_type), "")
    known = _CLASSES.get(name.removesuffix("Fast"))
    if known is None:
        reader = f"the class {quote(name)}" if name else "no class that is known"
        raise FormatError(
            folder / VOCAB, f"{VOCAB} and {MERGES} do not say how text is cut into words, and {reader} reads them: "
            "save the tokenizer with Transformers as tokenizer.json",
        )  # fmt: skip
    rules, defaults = known
    if settings.get("add_prefix_space"):
        if rules is not _GPT2:
            raise FormatError(folder / "tokenizer_config.json", f"add_prefix_space of a {name} is not supported")
        rules = {"pre_tokenizer": {**rules["pre_tokenizer"], "add_prefix_space": True}}
    model = {"type": "BPE", "vocab": read_json(folder / VOCAB), "merges": _merges(folder / MERGES)}
    return {**rules, "model": model}, defaults


def _merges(path: Path) -> list[list[str]]:
    """A merge a line, the first learnt first; the first line may be a remark."""
    data = read_file(path, MAX_BYTES)
    if kind := text_lookalike(data):
        raise FormatError(path, f"these are no merges; it is {kind}")
    try:
        lines = [line.strip("\r ") for line in data.decode("utf-8").split("\n")]
    except UnicodeDecodeError:
        raise FormatError(path, "these are no merges: they are not UTF-8") from None
    if lines[0].startswith("#version"):
        del lines[0]
    merges = [line.split(" ") for line in lines if line]
    for merge in merges:
        if len(merge) != 2:
            raise FormatError(path, f"the merge {quote(' '.join(merge))} is not one of two tokens")
    return merges
