"""Prompts that are no conversations: texts, token ids, and what stands before and after a gap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qrun.server.errors import APIError

if TYPE_CHECKING:
    from qrun.engine import Model

Prompt = str | list[int]

MAX_PROMPTS = 256
"""Prompts of one request."""

# The keys under which a file names the tokens around a gap, and how such tokens are spelt where it names none.
_INFILL = {
    "prefix": (
        ("fim_pre", "prefix"),
        ("<|fim_prefix|>", "<fim_prefix>", "<fim-prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>"),  # noqa: RUF001
    ),
    "suffix": (
        ("fim_suf", "suffix"),
        ("<|fim_suffix|>", "<fim_suffix>", "<fim-suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>"),  # noqa: RUF001
    ),
    "middle": (
        ("fim_mid", "middle"),
        ("<|fim_middle|>", "<fim_middle>", "<fim-middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>"),  # noqa: RUF001
    ),
}
_FILE_SEPARATOR = (("fim_sep",), ("<|file_sep|>", "<file_sep>"))


def read_prompts(value: Any, name: str = "prompt", most: int = MAX_PROMPTS) -> list[Prompt]:
    """The field of this name: a text, a list of texts, a list of token ids, or a list of such lists; of texts or lists
    no more than `most`."""
    problem = f"{name} must be a text, a list of texts, a list of token ids, or a list of such lists"
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise APIError(problem, param=name)
    if not value:
        raise APIError(f"{name} is empty", param=name)
    if all(_is_id(one) for one in value):
        return [list(value)]
    if len(value) > most:
        raise APIError(f"{name} has {len(value)} texts: a request can have {most}", param=name)
    for one in value:
        if not isinstance(one, str) and not (isinstance(one, list) and all(_is_id(id) for id in one)):
            raise APIError(problem, param=name)
    return list(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def prompt_tokens(model: Model, prompt: Prompt) -> list[int]:
    """The ids of a prompt. Spellings of special tokens are these tokens, as who writes prompts by hand means them."""
    if not isinstance(prompt, str):
        return prompt
    tokens = model.tokenize(prompt, parse_special=True)
    tokenizer = model.tokenizer
    if not tokens and tokenizer is not None and tokenizer.bos_id is not None:
        return [tokenizer.bos_id]
    return tokens


def infill_tokens(
    model: Model, prefix: str, suffix: str, *, before: str = "", extra: list[tuple[str, str]] | None = None
) -> list[int]:
    """The prompt that has a model fill the gap between a prefix and a suffix. extra: other files, by name.

    Raises APIError (501) for a model that has not learnt that.
    """
    marks = {name: _token(model, *named) for name, named in _INFILL.items()}
    if any(id is None for id in marks.values()):
        raise APIError("the model has no tokens for infilling: it was not trained for that", 501,
                       "not_supported_error", code="not_supported")  # fmt: skip

    def text(content: str) -> list[int]:
        return model.tokenize(content, add_special=False) if content else []

    tokens: list[int] = []
    tokenizer = model.tokenizer
    assert tokenizer is not None
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        tokens.append(tokenizer.bos_id)
    separator = _token(model, *_FILE_SEPARATOR)
    for name, content in extra or ():
        if separator is not None:
            tokens += [separator, *text(f"{name}\n"), *text(content)]
        else:
            tokens += text(f"--- {name}\n{content}\n")
    if extra and separator is not None:
        tokens += [separator, *text("filename\n")]
    tokens += [id for id in (marks["prefix"],) if id is not None] + text(prefix)
    tokens += [id for id in (marks["suffix"],) if id is not None] + text(suffix)
    tokens += [id for id in (marks["middle"],) if id is not None] + text(before)
    return tokens


def _token(model: Model, keys: tuple[str, ...], spellings: tuple[str, ...]) -> int | None:
    tokenizer = model.tokenizer
    if tokenizer is None:
        return None
    for key in keys:
        id = model.reader.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(id, int) and 0 <= id < tokenizer.n_vocab:
            return id
    for spelling in spellings:
        if tokenizer.has_piece(spelling):
            ids = tokenizer.encode(spelling, add_special=False, parse_special=True)
            if len(ids) == 1:
                return ids[0]
    return None
