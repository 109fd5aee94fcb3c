"""The tokenizer of a checkpoint as metadata of a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qrun.formats import FormatError, ValueType
from qrun.formats.json_file import read_json
from qrun.formats.mapping import read_file
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import Entries
from qrun.models.huggingface.vocabulary import TokenizerFiles, Vocabulary, read_vocabulary

# A token's part, as tokenizer_config.json calls it -> as GGUF does (one of them misspelt there).
PARTS = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
# Tokens that end a message, where a model has them beside the one that ends a text.
END_OF_MESSAGE = {"<|eom_id|>": "eom"}
MAX_TEMPLATE_BYTES = 1 << 22

_TEMPLATE = "tokenizer.chat_template"


def tokenizer_entries(entries: Entries, folder: Path, config: Config, n_vocab: int) -> None:
    """The keys under `tokenizer.`. Raises FormatError if there is no tokenizer, or none that GGUF can describe."""
    files = TokenizerFiles(folder, *(_optional(folder / name) for name in (
        "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
    )))  # fmt: skip
    vocabulary = read_vocabulary(files, n_vocab)
    texts = [token for token in vocabulary.tokens if isinstance(token, str)]
    _check_text(files.path, texts + (vocabulary.merges or []))
    entries.text("tokenizer.ggml.model", vocabulary.model)
    entries.text("tokenizer.ggml.pre", vocabulary.pre)
    entries.array("tokenizer.ggml.tokens", vocabulary.tokens, ValueType.STRING)
    if vocabulary.scores is not None:
        entries.array("tokenizer.ggml.scores", vocabulary.scores, ValueType.FLOAT32)
    entries.array("tokenizer.ggml.token_type", vocabulary.types, ValueType.INT32)
    if vocabulary.merges is not None:
        entries.array("tokenizer.ggml.merges", vocabulary.merges, ValueType.STRING)
    _special_entries(entries, files, vocabulary, config)
    if vocabulary.add_space_prefix is not None:
        entries.flag("tokenizer.ggml.add_space_prefix", vocabulary.add_space_prefix)
    for name, template in _chat_templates(files):
        text = template.encode("utf-8", "replace").decode()  # JSON can spell halves of characters
        entries.text(_TEMPLATE if name == "default" else f"{_TEMPLATE}.{name}", text)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _check_text(path: Path, texts: list[str]) -> None:
    """JSON can spell halves of characters, which no text may contain."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise FormatError(path, "a token is not text: it has half of a surrogate pair") from None


def _special_entries(entries: Entries, files: TokenizerFiles, vocabulary: Vocabulary, config: Config) -> None:
    """The ids of tokens with a part to play, and which of them begin and end a text."""
    n_vocab = len(vocabulary.tokens)
    texts = {part: _token_text(files, f"{part}_token") for part in (*PARTS, "cls")}
    around = _added_around(files, vocabulary, texts)
    ids: dict[str, int] = {}
    for part, name in PARTS.items():
        id = vocabulary.ids.get(texts[part] or "")
        if id is None:
            given = config.get(f"{part}_token_id")
            id = given if type(given) is int else None
        if id is not None and 0 <= id < n_vocab:
            ids[part] = id
            entries.count(f"tokenizer.ggml.{name}_token_id", id)
    for name, id in _other_ends(files, vocabulary, config, ids.get("eos")):
        entries.count(f"tokenizer.ggml.{name}_token_id", id)
    for part, added in around.items():
        entries.flag(f"tokenizer.ggml.add_{part}_token", added)


def _token_text(files: TokenizerFiles, key: str) -> str | None:
    for values in (files.config, files.special):
        token = values.get(key)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return token
    return None


def _other_ends(
    files: TokenizerFiles, vocabulary: Vocabulary, config: Config, eos: int | None
) -> Iterator[tuple[str, int]]:
    """GGUF has one end of a text and one of a turn (eot), where generation_config.json may list any number."""
    generation = _optional(files.folder / "generation_config.json")
    named: set[str] = set()
    for given in (generation.get("eos_token_id"), config.get("eos_token_id")):
        for id in given if isinstance(given, list) else [given]:
            if type(id) is not int or id == eos or not 0 <= id < len(vocabulary.tokens):
                continue
            token = vocabulary.tokens[id]
            name = "eot" if eos is not None else "eos"
            name = END_OF_MESSAGE.get(token, name) if isinstance(token, str) else name
            if name not in named:
                named.add(name)
                yield name, id
            if name == "eos":
                eos = id


def _added_around(files: TokenizerFiles, vocabulary: Vocabulary, texts: dict[str, str | None]) -> dict[str, bool]:
    """Whether a text gets bos and eos around it: the post-processor of tokenizer.json says, or the configuration.

    texts: what these tokens are called. Where nothing else says so, the post-processor does, and it is put there.
    """
    added: dict[str, bool] = {}
    for step in _post_processors(files.tokenizer.get("post_processor")):
        if step.get("type") == "ByteLevel":
            added.setdefault("bos", False)
            added.setdefault("eos", False)
        elif step.get("type") == "TemplateProcessing":
            first, last = _template_ends(files.path, step.get("single"))
            if first is not None:
                texts["bos"] = texts["bos"] or texts["cls"] or first
                added["bos"] = first in (texts["bos"], texts["cls"])
            if last is not None:
                texts["eos"] = texts["eos"] or last
                added["eos"] = last == texts["eos"]
    for part in ("bos", "eos"):
        given = files.config.get(f"add_{part}_token")
        if isinstance(given, bool):
            added.setdefault(part, given)
    if vocabulary.model == "gpt2" or files.tokenizer.get("post_processor"):
        added.setdefault("bos", False)
    return added


def _post_processors(step: Any) -> list[dict[str, Any]]:
    steps = step.get("processors", [step]) if isinstance(step, dict) else []
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _template_ends(path: Path, single: Any) -> tuple[str | None, str | None]:
    """The special tokens with which a template begins and ends."""
    if not isinstance(single, list) or not all(isinstance(part, dict) for part in single):
        raise FormatError(path, "the post_processor has no template of a single text")
    if len(single) < 2:
        return None, None

    def special(part: dict[str, Any]) -> str | None:
        token = part.get("SpecialToken")
        id = token.get("id") if isinstance(token, dict) else None
        return id if isinstance(id, str) else None

    return special(single[0]), special(single[-1])


def _chat_templates(files: TokenizerFiles) -> Iterator[tuple[str, str]]:
    """Templates by name, the default one first. A file of its own goes before tokenizer_config.json."""
    jinja = files.folder / "chat_template.jinja"
    if jinja.is_file():
        yield "default", _template_text(jinja)
        for path in sorted((files.folder / "additional_chat_templates").glob("*.jinja")):
            yield _safe_name(path.stem), _template_text(path)
        return
    given = _optional(files.folder / "chat_template.json").get("chat_template", files.config.get("chat_template"))
    if isinstance(given, str):
        yield "default", given
    for choice in given if isinstance(given, list) else []:
        if isinstance(choice, dict) and isinstance(choice.get("template"), str) and choice.get("name"):
            yield _safe_name(str(choice["name"])), choice["template"]


def _template_text(path: Path) -> str:
    return read_file(path, MAX_TEMPLATE_BYTES).decode("utf-8", "replace")


def _safe_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", name)
