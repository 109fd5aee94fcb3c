"""The name under which GGUF files know how a byte-pair tokenizer cuts text into words.

tokenizer.json spells the rules out; where they are those of a well-known family, written in one of the usual ways, that
tells its name. Of others, the token ids of a test text may be known (digests.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from qrun.formats import FormatError
from qrun.models.huggingface.digests import PRE_TOKENIZER_OF, TEXT

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"

# Ways to write the same expression. None of the patterns below can match otherwise with possessive quantifiers.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPELLINGS = {
    r"'(?i:[sdmt]|ll|ve|re)": _CONTRACTIONS,
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])": _CONTRACTIONS,
    "?+": "?",
    "++": "+",
}


def _words(digits: str) -> str:
    return (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
    )


def _cased_words(digits: str, suffix: str) -> str:
    lead = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{lead}{_UPPER}*{_LOWER}+{suffix}|{lead}{_UPPER}+{_LOWER}*{suffix}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


# Patterns that cut one after the other -> the name, by whether words that are tokens are left whole. The name of the
# other kind is taken where that has none of its own.
_FAMILIES: dict[tuple[str, ...], dict[bool, str]] = {
    (_GPT2,): {False: "gpt-2"},
    (r"\p{N}", _GPT2): {False: "smollm"},
    (_words(r"\p{N}{1,3}"),): {True: "llama-bpe", False: "smaug-bpe"},
    (_words(r"\p{N}"),): {False: "qwen2"},
    (_cased_words(r"\p{N}{1,3}", _CONTRACTIONS + "?"),): {False: "gpt-4o"},
    (_cased_words(r"\p{N}", ""),): {True: "tekken"},
}


@dataclass(frozen=True)
class Cutting:
    """How a text is cut into words. name: the value of tokenizer.ggml.pre.

    ignore_merges: whether words that are tokens are left whole; None: as the name says. prefix_space: words begin with
    a space, and so does a text."""

    name: str
    ignore_merges: bool | None = None
    prefix_space: bool = False


def pre_tokenizer(path: Path, tokenizer: Mapping[str, Any]) -> Cutting:
    """tokenizer: the contents of `path`, a tokenizer.json. Raises FormatError if its rules are not known."""
    model = tokenizer.get("model")
    whole_words = bool(model.get("ignore_merges")) if isinstance(model, dict) else False
    steps = flat_pre_tokenizers(tokenizer.get("pre_tokenizer"))
    patterns = _patterns(steps)
    names = _FAMILIES.get(tuple(patterns), {}) if patterns is not None else {}
    if names:
        as_named = whole_words in names
        name = names[whole_words if as_named else not whole_words]
        return Cutting(name, None if as_named else whole_words, bool(steps[-1].get("add_prefix_space")))
    # The text of the digest begins with a line break: it does not tell whether a text gets a space in front.
    prefixed = any(isinstance(step, dict) and step.get("add_prefix_space") for step in steps)
    digest_name = None if prefixed else PRE_TOKENIZER_OF.get(_digest(path))
    if digest_name is None:
        raise FormatError(path, "it is not known how this tokenizer cuts text into words (its pre_tokenizer)")
    return Cutting(digest_name, whole_words)


def flat_pre_tokenizers(step: Any) -> list[Any]:
    """The steps of a pre-tokenizer one after the other, without the sequences that they are written in."""
    if step is None:
        return []
    steps = step.get("pretokenizers") if isinstance(step, dict) and step.get("type") == "Sequence" else None
    return [inner for part in steps for inner in flat_pre_tokenizers(part)] if isinstance(steps, list) else [step]


def is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    """Whether words are spelt in the characters that stand for bytes, before anything is merged."""
    steps = flat_pre_tokenizers(tokenizer.get("pre_tokenizer"))
    return any(isinstance(step, dict) and step.get("type") == "ByteLevel" for step in steps)


def _patterns(steps: list[Any]) -> list[str] | None:
    """The patterns of pre-tokenizers, or None if they do anything else than cut at what they match, and then spell what
    is left in bytes."""
    if not steps or not isinstance(steps[-1], dict) or steps[-1].get("type") != "ByteLevel":
        return None
    *cuts, byte_level = steps
    if cuts and byte_level.get("add_prefix_space", True):  # that would be a space before every piece
        return None
    parts = [_pattern(step) for step in cuts]
    if byte_level.get("use_regex", True):
        parts.append(_GPT2)
    return None if None in parts else [pattern for pattern in parts if pattern is not None]


def _pattern(step: Any) -> str | None:
    match step.get("type") if isinstance(step, dict) else None:
        case "Digits":
            return r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
        case "Split":
            pattern = step.get("pattern")
            regex = pattern.get("Regex") if isinstance(pattern, dict) else None
            # To keep what matches apart from the rest, or to remove all that does not match, where everything does.
            usual = (step.get("behavior"), bool(step.get("invert"))) in (("Isolated", False), ("Removed", True))
            return _canonical(regex) if isinstance(regex, str) and usual else None
    return None


def _canonical(pattern: str) -> str:
    for spelling, usual in _SPELLINGS.items():
        pattern = pattern.replace(spelling, usual)
    return pattern


def _digest(path: Path) -> str:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids = tokenizer.encode(TEXT).ids
    except Exception as error:
        raise FormatError(path, f"the tokenizer cannot be loaded: {str(error).splitlines()[0]}") from None
    except BaseException as error:  # the library's panics are not of the class Exception
        if type(error).__name__ != "PanicException":
            raise
        raise FormatError(path, "the tokenizer cannot be loaded") from None
    return sha256(str(ids).encode()).hexdigest()
