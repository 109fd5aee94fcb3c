"""The tokenizer of a checkpoint as metadata of a GGUF file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qrun.formats import FormatError, ValueType
from qrun.formats.gguf.cursor import quote
from qrun.formats.mapping import read_file, text_lookalike
from qrun.models.huggingface.config import Config
from qrun.models.huggingface.entries import Entries
from qrun.models.huggingface.pretokenizers import Cutting
from qrun.models.huggingface.slow_files import VOCAB, has_slow_files, read_slow_files
from qrun.models.huggingface.tiktoken_files import read_tiktoken
from qrun.models.huggingface.tokenizer_files import TokenizerFiles, optional_json
from qrun.models.huggingface.vocabulary import Vocabulary, read_vocabulary
from qrun.models.normalizer import flat_steps, step_type

# A token's part, as tokenizer_config.json calls it -> as GGUF does (one of them misspelt there).
NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
# Tokens that end a message, where a model has them beside the one that ends a text.
END_OF_MESSAGE = {"<|eom_id|>": "eom"}
# Architectures of which files have pieces of text with their merges.
MERGED = ("gemma4",)
MAX_TEMPLATE_BYTES = 1 << 22
# How RWKV's models were taught to talk, and the token that ends a turn, as their vocabulary spells it.
END_OF_TURN = r"\n\n"
RWKV_TURNS = (
    """{% for message in messages %}{{ message.role | capitalize + ": " + message.content | trim + "\\n\\n" }}"""
    """{% endfor %}{{ "Assistant:" if add_generation_prompt }}"""
)

_TEMPLATE = "tokenizer.chat_template"
_SEVERAL = "its post_processor adds several tokens at one end of a text, which is not supported"


def tokenizer_entries(entries: Entries, folder: Path, config: Config, n_vocab: int) -> None:
    """The keys under `tokenizer.`, and those under `qrun.tokenizer.` for what GGUF has no key for (the engine's
    Vocabulary says what they mean). Raises FormatError if there is no tokenizer, or none that they can describe."""
    files = _files(folder, config)
    vocabulary = read_vocabulary(files, n_vocab, merged=entries.values.get("general.architecture") in MERGED)
    texts = [token for token in vocabulary.tokens if isinstance(token, str)]
    _check_text(files.path, texts + (vocabulary.merges or []))
    entries.text("tokenizer.ggml.model", vocabulary.model)
    if vocabulary.pre:
        entries.text("tokenizer.ggml.pre", vocabulary.pre)
    entries.array("tokenizer.ggml.tokens", vocabulary.tokens, ValueType.STRING)
    if vocabulary.scores is not None:
        entries.array("tokenizer.ggml.scores", vocabulary.scores, ValueType.FLOAT32)
    entries.array("tokenizer.ggml.token_type", vocabulary.types, ValueType.INT32)
    if vocabulary.merges is not None:
        entries.array("tokenizer.ggml.merges", vocabulary.merges, ValueType.STRING)
    if vocabulary.model == "rwkv":
        _rwkv_entries(entries, vocabulary, files)
        return
    _special_entries(entries, files, vocabulary, config)
    _text_entries(entries, vocabulary)
    for name, template in _chat_templates(files):
        entries.text(_TEMPLATE if name == "default" else f"{_TEMPLATE}.{name}", template)


def _rwkv_entries(entries: Entries, vocabulary: Vocabulary, files: TokenizerFiles) -> None:
    """A text begins and ends with the first token, and a turn ends with an empty line."""
    for part in ("bos", "eos"):
        entries.count(f"tokenizer.ggml.{part}_token_id", 0)
    if END_OF_TURN in vocabulary.tokens:
        entries.count("tokenizer.ggml.eot_token_id", vocabulary.tokens.index(END_OF_TURN))
    templates = dict(_chat_templates(files))
    entries.text(_TEMPLATE, templates.get("default", RWKV_TURNS))


def _files(folder: Path, config: Config) -> TokenizerFiles:
    files = TokenizerFiles.of(folder)
    if files.path.is_file():
        return files
    if (ranks := read_tiktoken(folder, files.config)) is not None:
        cutting = Cutting(ranks.pre, ignore_merges=True)
        return _made(files, ranks.tokenizer, ranks.defaults, ranks.path, cutting)
    if (folder / "tokenizer.model").is_file() or not has_slow_files(folder):
        return files
    return _made(files, *read_slow_files(folder, files.config, config.get("model_type")), folder / VOCAB)


def _made(
    files: TokenizerFiles, tokenizer: Mapping[str, Any], defaults: Mapping[str, str], path: Path,
    cutting: Cutting | None = None,
) -> TokenizerFiles:  # fmt: skip
    """With what other files say, as tokenizer.json would. defaults: special tokens, where none are named."""
    named = {key: value for key, value in defaults.items() if key not in files.config and key not in files.special}
    config = {**files.config, **named}
    return replace(files, tokenizer=tokenizer, config=config, path=path, cutting=cutting)


def _text_entries(entries: Entries, vocabulary: Vocabulary) -> None:
    """How a text is turned into words, and special tokens are found in it."""
    rules = vocabulary.rules
    if vocabulary.model == "bert":
        entries.flag("tokenizer.ggml.normalizer.lowercase", rules.lowercase is not False)
        entries.flag("tokenizer.ggml.normalizer.strip_accents", rules.strip_accents is not False)
        if vocabulary.max_word_length is not None:
            entries.count("qrun.tokenizer.max_word_length", vocabulary.max_word_length)
        return
    if vocabulary.model in ("llama", "gemma4", "t5"):
        entries.flag("tokenizer.ggml.add_space_prefix", rules.adds_space)
    if rules.remove_extra_whitespaces:
        entries.flag("tokenizer.ggml.remove_extra_whitespaces", True)
    if rules.charsmap:
        entries.array("tokenizer.ggml.precompiled_charsmap", list(rules.charsmap), ValueType.UINT8)
    if vocabulary.model == "t5":
        return
    kinds = {step_type(step) for step in flat_steps(rules.normalizer)}
    if "Lowercase" in kinds:  # the one step of which GGUF has a key for such models
        entries.flag("tokenizer.ggml.normalizer.lowercase", True)
    entries.text("qrun.tokenizer.normalizer", json.dumps(rules.normalizer, separators=(",", ":")))
    for name, ids in vocabulary.flagged.items():
        if ids:
            entries.array(f"qrun.tokenizer.{name}_token_ids", sorted(ids), ValueType.INT32)
    if rules.space_prefix != "never":
        entries.text("qrun.tokenizer.space_prefix", rules.space_prefix)
    if vocabulary.ignore_merges is not None:
        entries.flag("qrun.tokenizer.ignore_merges", vocabulary.ignore_merges)
    if vocabulary.unknown is not None:
        entries.count("qrun.tokenizer.unknown_token_id", vocabulary.unknown)
        entries.flag("qrun.tokenizer.fuse_unknown", vocabulary.fuse_unknown)


def _check_text(path: Path, texts: list[str]) -> None:
    """JSON can spell halves of characters, which no text may contain."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise FormatError(path, "a token is not text: it has half of a surrogate pair") from None


def _special_entries(entries: Entries, files: TokenizerFiles, vocabulary: Vocabulary, config: Config) -> None:
    """The ids of tokens with a part to play, and which of them begin and end a text."""
    n_vocab = len(vocabulary.tokens)
    around, put = _added_around(files, vocabulary)
    called = {part: vocabulary.ids.get(files.token_text(part) or "") for part in NAMES}
    ids: dict[str, int] = {}
    for part, name in NAMES.items():
        # What the post-processor puts before or behind a text is bos or eos, whatever the configuration calls so.
        id = put.get(part, called[part])
        if id is None:
            given = config.get(f"{part}_token_id")
            id = given if type(given) is int else None
        if id is not None and 0 <= id < n_vocab:
            ids[part] = id
            entries.count(f"tokenizer.ggml.{name}_token_id", id)
    candidates = (ids.get("eos"), called["eos"], *_ends(files, config))
    ends = [id for id in candidates if type(id) is int and 0 <= id < n_vocab]
    _end_entries(entries, vocabulary, list(dict.fromkeys(ends)), "eos" in ids)
    for part, added in around.items():
        entries.flag(f"tokenizer.ggml.add_{part}_token", added)
    if "sep" in ids and vocabulary.model in ("t5", "gpt2") and _separated(files):
        entries.flag("tokenizer.ggml.add_sep_token", True)


def _ends(files: TokenizerFiles, config: Config) -> Iterator[Any]:
    """What may be the ids of tokens that end an answer: generation_config.json and config.json can list any number."""
    for given in (files.generation.get("eos_token_id"), config.get("eos_token_id")):
        yield from given if isinstance(given, list) else [given]


def _end_entries(entries: Entries, vocabulary: Vocabulary, ends: list[int], has_eos: bool) -> None:
    """GGUF has a key each for an end of a text (eos), of a turn (eot) and of a message (eom), and for llama.cpp they
    all end an answer. Where that is not enough, there is a list of all of them, as Ollama has it.

    has_eos: the first of them has its key already.
    """
    free = ["eot", "eom"] if has_eos else ["eos", "eot", "eom"]
    others = ends[1:] if has_eos else ends
    for id in others:  # those that have a name of their own
        name = END_OF_MESSAGE.get(str(vocabulary.tokens[id]))
        if name in free:
            free.remove(name)
            entries.count(f"tokenizer.ggml.{name}_token_id", id)
    unnamed = [id for id in others if str(vocabulary.tokens[id]) not in END_OF_MESSAGE]
    for name, id in zip(free, unnamed, strict=False):
        entries.count(f"tokenizer.ggml.{name}_token_id", id)
    if len(unnamed) > len(free):
        entries.array("tokenizer.ggml.eos_token_ids", ends, ValueType.INT32)


def _added_around(files: TokenizerFiles, vocabulary: Vocabulary) -> tuple[dict[str, bool], dict[str, int]]:
    """Whether a text gets bos and eos around it, and the ids that the post-processor of tokenizer.json puts there: that
    has the last word, or else the configuration."""
    added: dict[str, bool] = {}
    put: dict[str, int] = {}
    for step in _post_processors(files.path, files.tokenizer.get("post_processor")):
        kind = step.get("type")
        if kind == "ByteLevel":  # is about offsets alone
            ends: tuple[int | None, int | None] = (None, None)
        elif kind == "TemplateProcessing":
            ends = _template_ends(files.path, step)
        elif kind in ("RobertaProcessing", "BertProcessing"):
            ends = _pair_id(files.path, step.get("cls")), _pair_id(files.path, step.get("sep"))
        else:
            raise FormatError(files.path, f"its post_processor {quote(str(kind))} is not supported")
        for part, id in zip(("bos", "eos"), ends, strict=True):
            added.setdefault(part, False)
            if id is None:
                continue
            if added[part]:
                raise FormatError(files.path, _SEVERAL)
            if not 0 <= id < len(vocabulary.tokens):
                raise FormatError(files.path, f"its post_processor adds token {id}, which is not in the vocabulary")
            added[part], put[part] = True, id
    for part in ("bos", "eos"):
        given = files.config.get(f"add_{part}_token")
        if isinstance(given, bool):
            added.setdefault(part, given)
    # The general class adds what the post-processor says; those of SentencePiece's kind add bos by themselves.
    if vocabulary.model == "gpt2" or files.is_general:
        added.setdefault("bos", False)
    return added, put


def _separated(files: TokenizerFiles) -> bool:
    """Do two tokens stand between two texts, one that ends the first and a separator?"""
    for step in _post_processors(files.path, files.tokenizer.get("post_processor")):
        if step.get("type") == "RobertaProcessing":
            return True
        pair = step.get("pair")
        if step.get("type") == "TemplateProcessing" and isinstance(pair, list):
            places = [place for place, part in enumerate(pair) if isinstance(part, dict) and "Sequence" in part]
            if len(places) == 2 and places[1] - places[0] == 3:
                return True
    return False


def _post_processors(path: Path, step: Any) -> Iterator[dict[str, Any]]:
    """The steps one after the other, without the sequences that they are written in."""
    if step is None:
        return
    if not isinstance(step, dict):
        raise FormatError(path, f"its post_processor {quote(str(step))} is not supported")
    steps = step.get("processors")
    if step.get("type") != "Sequence" or not isinstance(steps, list):
        yield step
        return
    for part in steps:
        yield from _post_processors(path, part)


def _template_ends(path: Path, step: dict[str, Any]) -> tuple[int | None, int | None]:
    """The ids of the special tokens with which a template begins and ends."""
    single = step.get("single")
    if not isinstance(single, list) or not all(isinstance(part, dict) for part in single):
        raise FormatError(path, "the post_processor has no template of a single text")
    places = [place for place, part in enumerate(single) if "Sequence" in part]
    if len(places) != 1:
        raise FormatError(path, "the post_processor's template of a single text does not have that text once")
    before = [id for part in single[: places[0]] for id in _special_ids(path, step, part)]
    behind = [id for part in single[places[0] + 1 :] for id in _special_ids(path, step, part)]
    if len(before) > 1 or len(behind) > 1:
        raise FormatError(path, _SEVERAL)
    return (before[0] if before else None), (behind[0] if behind else None)


def _special_ids(path: Path, step: dict[str, Any], part: dict[str, Any]) -> list[int]:
    """What a part of a template adds."""
    token = part.get("SpecialToken")
    name = token.get("id") if isinstance(token, dict) else None
    specials = step.get("special_tokens")
    special = specials.get(name) if isinstance(specials, dict) and isinstance(name, str) else None
    ids = special.get("ids") if isinstance(special, dict) else None
    if not isinstance(ids, list) or not all(type(id) is int for id in ids):
        raise FormatError(path, f"its post_processor adds {quote(str(name))}, of which it has no ids")
    return ids


def _pair_id(path: Path, pair: Any) -> int:
    """Of a token with its id."""
    if not isinstance(pair, list) or len(pair) != 2 or type(pair[1]) is not int:
        raise FormatError(path, "the post_processor does not name the tokens that it adds")
    return pair[1]


def _chat_templates(files: TokenizerFiles) -> Iterator[tuple[str, str]]:
    """Templates by name, the default one first. A file of its own goes before tokenizer_config.json."""
    jinja = files.folder / "chat_template.jinja"
    if jinja.is_file():
        yield "default", _template_text(jinja)
        for path in sorted((files.folder / "additional_chat_templates").glob("*.jinja")):
            yield _safe_name(path.stem), _template_text(path)
        return
    given = optional_json(files.folder / "chat_template.json").get("chat_template", files.config.get("chat_template"))
    if isinstance(given, str):
        yield "default", given
    for choice in given if isinstance(given, list) else []:
        if isinstance(choice, dict) and isinstance(choice.get("template"), str) and choice.get("name"):
            yield _safe_name(str(choice["name"])), choice["template"]


def _template_text(path: Path) -> str:
    data = read_file(path, MAX_TEMPLATE_BYTES)
    if kind := text_lookalike(data):
        raise FormatError(path, f"this is no chat template; it is {kind}")
    return data.decode("utf-8", "replace")


def _safe_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", name)
