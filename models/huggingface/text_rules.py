"""What a tokenizer.json does to a text before it cuts it into words: its normalizer, and a space in front."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qrun.formats import FormatError
from qrun.formats.gguf.cursor import quote
from qrun.models.huggingface.pretokenizers import flat_pre_tokenizers
from qrun.models.huggingface.sentencepiece import SentencePieceModel
from qrun.models.normalizer import Normalizer, NormalizerError, flat_steps, step_type

SPACE = "▁"  # by which SentencePiece spells a space
# The characters that stand for bytes: those of Latin-1 that can be printed, and others from U+0100 on.
_PRINTED = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
BYTE_NAMES = [chr(byte if byte in _PRINTED else 0x100 + _OTHERS.index(byte)) for byte in range(256)]

_SCHEMES = {"always": "unless_there", "first": "start", "never": "never"}  # Metaspace's names -> those of space_prefix


@dataclass(frozen=True)
class TextRules:
    """normalizer: as tokenizer.json has it. space_prefix: where a space is put before a text that it has normalised:
    "never", "always", "unless_there", "start" (see the engine's SpacePrefix). adds_space: whether one of both puts one
    there. charsmap, remove_extra_whitespaces: what SentencePiece itself does to a text. lowercase, strip_accents: what
    BERT's own normalizer does."""

    normalizer: Any = None
    space_prefix: str = "never"
    adds_space: bool = False
    charsmap: bytes = b""
    remove_extra_whitespaces: bool = False
    lowercase: bool | None = None
    strip_accents: bool | None = None

    def with_prefix(self, wanted: Any) -> TextRules:
        """With or without a space in front, where tokenizer_config.json says so."""
        if wanted is False and self.adds_space:
            steps = [step for step in flat_steps(self.normalizer) if not _puts_space(step)]
            normalizer = {"type": "Sequence", "normalizers": steps} if steps else None
            return replace(self, normalizer=normalizer, space_prefix="never", adds_space=False)
        return replace(self, space_prefix="always", adds_space=True) if wanted is True and not self.adds_space else self


def byte_level_rules(path: Path, tokenizer: Mapping[str, Any], prefix_space: bool) -> TextRules:
    """Of a tokenizer that spells bytes in characters. Raises FormatError."""
    description = tokenizer.get("normalizer")
    _check(path, description)
    return TextRules(description, "unless_there" if prefix_space else "never", prefix_space)


def metaspace_rules(path: Path, tokenizer: Mapping[str, Any], pieces: Sequence[bytes]) -> TextRules:
    """Of a tokenizer that spells a space as U+2581, which a normalizer does or a pre-tokenizer. Raises FormatError
    where they do anything else that SentencePiece's way of merging does not.

    pieces: the vocabulary."""
    description = tokenizer.get("normalizer")
    _check(path, description)
    steps = flat_steps(description)
    puts_space = any(_puts_space(step) for step in steps)
    # What comes after could make spaces again.
    others = [step for step in steps if not _puts_space(step)]
    spelt = bool(others) and _spells_spaces(others[-1])
    prefix = "never"
    for step in flat_pre_tokenizers(tokenizer.get("pre_tokenizer")):
        kind = step_type(step)
        if kind == "Split" and spelt and step.get("pattern") == {"String": " "}:
            continue  # no space is left
        if kind != "Metaspace" or step.get("replacement") != SPACE:
            raise FormatError(path, "it is not known how this tokenizer cuts text into words (its pre_tokenizer)")
        if step.get("split", True) and any(SPACE.encode() in piece[1:] for piece in pieces):
            raise FormatError(path, "its pre_tokenizer cuts text at spaces, and tokens of its vocabulary have some")
        prefix = _prefix_of(path, step)
        spelt = True
    if prefix == "start" and any(step_type(step) == "Strip" for step in steps):
        raise FormatError(path, "a normalizer that strips, with a space before the start of a text, is not supported")
    if not spelt:
        raise FormatError(path, f"neither its normalizer nor its pre_tokenizer spells spaces as {SPACE}")
    return TextRules(description, prefix, puts_space or prefix != "never")


def _prefix_of(path: Path, step: Mapping[str, Any]) -> str:
    """Where a Metaspace puts a space, as `TextRules.space_prefix` says it."""
    scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    if not isinstance(scheme, str) or scheme not in _SCHEMES:
        raise FormatError(path, f"its pre_tokenizer has the prepend_scheme {quote(str(scheme))}")
    return _SCHEMES[scheme]


def sentencepiece_rules(model: SentencePieceModel) -> TextRules:
    """Of a tokenizer.model, where no tokenizer.json says otherwise."""
    prefix = "always" if model.add_dummy_prefix else "never"
    return TextRules(None, prefix, model.add_dummy_prefix, model.charsmap, model.remove_extra_whitespaces)


def _puts_space(step: Any) -> bool:
    return step_type(step) == "Prepend" and step.get("prepend") == SPACE


def _spells_spaces(step: Any) -> bool:
    return (
        step_type(step) == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE
    )  # fmt: skip


def _check(path: Path, description: Any) -> None:
    try:
        Normalizer(description)
    except NormalizerError as error:
        raise FormatError(path, str(error)) from None


def word_piece_rules(path: Path, tokenizer: Mapping[str, Any]) -> TextRules:
    """Of BERT's normalizer and pre-tokenizer. Raises FormatError where there are others."""
    normalizer, cutting = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    if step_type(normalizer) != "BertNormalizer" or step_type(cutting) != "BertPreTokenizer":
        raise FormatError(path, "word pieces with another normalizer or pre_tokenizer than BERT's are not supported")
    assert isinstance(normalizer, dict)
    if normalizer.get("clean_text", True) is not True or normalizer.get("handle_chinese_chars", True) is not True:
        raise FormatError(path, "its normalizer leaves control characters, or ideographs within words: not supported")
    lowercase = normalizer.get("lowercase", True) is not False
    strips = normalizer.get("strip_accents")
    return TextRules(lowercase=lowercase, strip_accents=lowercase if strips is None else bool(strips))


def unigram_rules(path: Path, tokenizer: Mapping[str, Any]) -> TextRules:
    """Of a model of SentencePiece's kind. Raises FormatError where something else is done to a text first."""
    charsmap, removes = b"", False
    for step in flat_steps(tokenizer.get("normalizer")):
        match step_type(step):
            case "Precompiled":
                try:
                    charsmap = b64decode(str(step.get("precompiled_charsmap") or ""), validate=True)
                except ValueError:
                    raise FormatError(path, "precompiled_charsmap is not in base64") from None
            case "Strip":
                removes = True
            case "Replace" if step.get("pattern") == {"Regex": " {2,}"}:
                removes = True
            case kind:
                raise FormatError(path, f"the normalizer {quote(str(kind))} of such a tokenizer is not supported")
    prefix = False
    for step in flat_pre_tokenizers(tokenizer.get("pre_tokenizer")):
        match step_type(step):
            case "WhitespaceSplit":
                removes = True
            case "Metaspace" if step.get("replacement") == SPACE:
                prefix = _prefix_of(path, step) != "never"
            case kind:
                raise FormatError(path, f"the pre_tokenizer {quote(str(kind))} of such a tokenizer is not supported")
    return TextRules(adds_space=prefix, charsmap=charsmap, remove_extra_whitespaces=removes)
