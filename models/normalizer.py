"""What a tokenizer does to a text before it cuts it, as the "normalizer" of a tokenizer.json describes it.

The steps themselves are those of the `tokenizers` library, so that a text comes out as it did in the model's training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal
from unicodedata import is_normalized

if TYPE_CHECKING:
    from tokenizers.normalizers import Normalizer as Step

MAX_DEPTH = 8  # of sequences within sequences; published ones have two
USUAL_WORD_LENGTH = 100
"""Characters of the longest word that word pieces spell: of BERT and all that were published after it."""


class NormalizerError(ValueError):
    """A normalizer that is not known, or not described as it should be, or that fails: one line that says so."""


class Normalizer:
    """A function from texts to texts as the model wants them. It raises NormalizerError where a pattern of a stranger's
    takes too long."""

    def __init__(self, description: Any) -> None:
        """description: what JSON has it: null or an object with a type. Raises NormalizerError."""
        self.description = description
        self._steps = _steps(description, 0)

    @classmethod
    def of(cls, text: str) -> Normalizer:
        """Of a description in JSON. Raises NormalizerError."""
        try:
            return cls(json.loads(text))
        except (json.JSONDecodeError, RecursionError):
            raise NormalizerError("the normalizer is not described in JSON") from None

    def __bool__(self) -> bool:
        """Whether it can change a text."""
        return bool(self._steps)

    def __call__(self, text: str) -> str:
        for step in self._steps:
            text = step(text)
        return text


def step_type(step: Any) -> str | None:
    """What kind of step a description is of."""
    kind = step.get("type") if isinstance(step, dict) else None
    return kind if isinstance(kind, str) else None


def flat_steps(description: Any) -> list[Any]:
    """The steps of a normalizer one after the other, without the sequences that they are written in."""
    if description is None:
        return []
    if step_type(description) != "Sequence" or not isinstance(description.get("normalizers"), list):
        return [description]
    return [step for part in description["normalizers"] for step in flat_steps(part)]


def _steps(description: Any, depth: int) -> list[Callable[[str], str]]:
    if description is None and depth == 0:
        return []
    kind = step_type(description)
    if kind is None:
        raise NormalizerError("the normalizer has no type")
    if kind == "Sequence":
        parts = description.get("normalizers")
        if not isinstance(parts, list) or depth == MAX_DEPTH:
            raise NormalizerError("the normalizer has a sequence without a list of steps, or too many in each other")
        return [step for part in parts for step in _steps(part, depth + 1)]
    try:
        return [_step(kind, description)]
    except NormalizerError:
        raise
    except Exception as error:  # the library raises no narrower class
        reason = (str(error).splitlines() or [""])[0]
        raise NormalizerError(f"the normalizer {kind} is not one that can be made: {reason}") from None


def _step(kind: str, step: Mapping[str, Any]) -> Callable[[str], str]:
    from tokenizers import Regex, normalizers

    match kind:
        case "NFC" | "NFD" | "NFKC" | "NFKD":
            return _form(kind)
        case "Prepend":
            before = _text(step, "prepend")
            return lambda text: before + text if text else text
        case "Replace":
            pattern, new = step.get("pattern"), _text(step, "content")
            if isinstance(pattern, dict) and pattern.get("String"):
                old = _text(pattern, "String")
                return lambda text: text.replace(old, new)
            if isinstance(pattern, dict) and pattern.get("Regex"):
                return _guarded(normalizers.Replace(Regex(_text(pattern, "Regex")), new))
            raise NormalizerError("the normalizer Replace has no pattern")
        case "Lowercase":
            return _guarded(normalizers.Lowercase())
        case "StripAccents":
            return _guarded(normalizers.StripAccents())
        case "Nmt":
            return _guarded(normalizers.Nmt())
        case "Strip":
            return _guarded(normalizers.Strip(left=_flag(step, "strip_left"), right=_flag(step, "strip_right")))
        case "BertNormalizer":
            return _guarded(
                normalizers.BertNormalizer(
                    clean_text=_flag(step, "clean_text"),
                    handle_chinese_chars=_flag(step, "handle_chinese_chars"),
                    strip_accents=None if step.get("strip_accents") is None else _flag(step, "strip_accents"),
                    lowercase=_flag(step, "lowercase"),
                )
            )
    raise NormalizerError(f"the normalizer {kind!r} is not supported")


def _form(name: Literal["NFC", "NFD", "NFKC", "NFKD"]) -> Callable[[str], str]:
    """One of Unicode's normal forms. Most texts are in the composed ones already, which is quickly found out."""
    from tokenizers import normalizers

    step = _guarded(getattr(normalizers, name)())
    return lambda text: text if text.isascii() or is_normalized(name, text) else step(text)


def _guarded(step: Step) -> Callable[[str], str]:
    """The library ends a search that takes too long with a panic, which is not of the class Exception."""

    def normalize(text: str) -> str:
        try:
            return step.normalize_str(text)
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise NormalizerError(f"the tokenizer's normalizer fails on this text: {error}") from None

    return normalize


def _flag(step: Mapping[str, Any], key: str) -> bool:
    value = step.get(key)
    if not isinstance(value, bool):
        raise NormalizerError(f"the normalizer {step_type(step)} has no {key}")
    return value


def _text(step: Mapping[str, Any], key: str) -> str:
    value = step.get(key)
    if not isinstance(value, str) or any("\ud800" <= char <= "\udfff" for char in value):
        raise NormalizerError(f"the normalizer has no text under {key}")
    return value
