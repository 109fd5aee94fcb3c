"""The name under which GGUF files know how a byte-pair tokenizer cuts text into words.

tokenizer.json spells the rules out; where they are those of a well-known family, written in one of the usual ways, that
tells its name. Of others, the token ids of a test text may be known (digests.py).
"""

from __future__ import annotations

from collections.abc import Mapping
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


# Patterns that cut one after the other, and whether words that are tokens are left whole -> name.
_FAMILIES: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((r"\p{N}", _GPT2), False): "smollm",
    ((_words(r"\p{N}{1,3}"),), True): "llama-bpe",
    ((_words(r"\p{N}{1,3}"),), False): "smaug-bpe",
    ((_words(r"\p{N}"),), False): "qwen2",
    ((_cased_words(r"\p{N}{1,3}", _CONTRACTIONS + "?"),), False): "gpt-4o",
    ((_cased_words(r"\p{N}", ""),), True): "tekken",
    ((_cased_words(r"\p{N}", ""),), False): "tekken",
}


def pre_tokenizer_name(path: Path, tokenizer: Mapping[str, Any]) -> str:
    """tokenizer: the contents of `path`, a tokenizer.json. Raises FormatError if its rules are not known."""
    model = tokenizer.get("model")
    whole_words = bool(model.get("ignore_merges")) if isinstance(model, dict) else False
    patterns = _patterns(tokenizer.get("pre_tokenizer"))
    name = _FAMILIES.get((tuple(patterns), whole_words)) if patterns is not None else None
    name = name or PRE_TOKENIZER_OF.get(_digest(path))
    if name is None:
        raise FormatError(path, "it is not known how this tokenizer cuts text into words (its pre_tokenizer)")
    return name


def _patterns(step: Any) -> list[str] | None:
    """The patterns of a pre-tokenizer, or None if it does anything else than cut at what they match."""
    if not isinstance(step, dict):
        return None
    match step.get("type"):
        case "Sequence":
            steps = step.get("pretokenizers")
            parts = [_patterns(part) for part in steps] if isinstance(steps, list) else [None]
            return None if None in parts else [pattern for part in parts for pattern in part or []]
        case "ByteLevel":
            if step.get("add_prefix_space"):
                return None
            return [_GPT2] if step.get("use_regex", True) else []
        case "Digits":
            return [r"\p{N}" if step.get("individual_digits") else r"\p{N}+"]
        case "Split":
            pattern = step.get("pattern")
            regex = pattern.get("Regex") if isinstance(pattern, dict) else None
            # To keep what matches apart from the rest, or to remove all that does not match, where everything does.
            usual = (step.get("behavior"), bool(step.get("invert"))) in (("Isolated", False), ("Removed", True))
            return [_canonical(regex)] if isinstance(regex, str) and usual else None
    return None


def _canonical(pattern: str) -> str:
    for spelling, usual in _SPELLINGS.items():
        pattern = pattern.replace(spelling, usual)
    return pattern


def _digest(path: Path) -> str:
    from tokenizers import Tokenizer

    try:
        ids = Tokenizer.from_file(str(path)).encode(TEXT).ids
    except Exception as error:
        raise FormatError(path, f"the tokenizer cannot be loaded: {str(error).splitlines()[0]}") from None
    except BaseException as error:  # the library's panics are not of the class Exception
        if type(error).__name__ != "PanicException":
            raise
        raise FormatError(path, "the tokenizer cannot be loaded") from None
    return sha256(str(ids).encode()).hexdigest()
