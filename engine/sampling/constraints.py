"""What a text must be: a JSON Schema, a regular expression or a grammar, as masks over the vocabulary.

The parser is llguidance (https://github.com/guidance-ai/llguidance), which is installed on request only: there are
machines that it has no build for, and they shall run models all the same.
"""

from __future__ import annotations

import json
import re
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, Self
from weakref import WeakKeyDictionary

import numpy as np

from qrun.engine.native.locks import ForkAwareLock
from qrun.formats.json_file import depth

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SOURCE = 1 << 20
"""Characters of a schema or grammar. The time that one of this size takes is bounded by the parser's own limits."""
MAX_DEPTH = 64
"""How deep values of a schema may be nested."""

COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
"""JSON without white space: fewer tokens, more of which are known beforehand, and no model writes blanks for ever."""

_LONGEST_REASON = 300
# What the parser says by the names of its own.
_PLAINLY = {"NoExtensionBias": "no text comes to an end in it"}


class Tokenizer(Protocol):
    """What is asked of a tokenizer."""

    n_vocab: int
    eos_id: int | None
    stop_ids: frozenset[int]

    @property
    def control_ids(self) -> frozenset[int]: ...
    def all_bytes(self) -> list[bytes]: ...
    def encode_further(self, text: str, parse_special: bool = False) -> list[int]: ...


class Constraint:
    """One text under way, of which each token so far was one that the grammar allows. Made by `Compiler.compile`."""

    def __init__(self, matcher: LLMatcher, n_vocab: int) -> None:
        self._matcher = matcher
        self.n_words = (n_vocab + 31) // 32
        """Of a mask, 32 tokens each."""

    def mask(self, out: np.ndarray) -> None:
        """Write into uint32 [n_words] which tokens may come next: bit i of word w is token 32 w + i. Where the text may
        end, tokens that end it are among them."""
        assert out.dtype == np.uint32 and out.shape == (self.n_words,) and out.flags.c_contiguous
        try:
            self._matcher.unsafe_compute_mask_ptr(out.ctypes.data, out.nbytes)
        finally:
            self._check()

    def accept(self, token: int) -> None:
        """The text goes on with a token that the mask has."""
        if not self._matcher.consume_token(token):
            self._check()
            raise RuntimeError(f"token {token} is not what the grammar wants")

    def valid(self, tokens: list[int]) -> int:
        """How many of these tokens can follow, one after the other."""
        return self._matcher.validate_tokens(tokens)

    def forced(self) -> list[int]:
        """The tokens that must come next, as the tokenizer would cut them."""
        return self._matcher.compute_ff_tokens()

    def copy(self) -> Self:
        """Another text that begins like this one."""
        return type(self)(self._matcher.deep_copy(), 32 * self.n_words)

    @property
    def finished(self) -> bool:
        """Whether the text is complete, and nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the grammar cannot be followed: {_reason(self._matcher.get_error())}")


_KEPT = 16  # grammars


class Compiler:
    """Makes constraints for one vocabulary. Get it from `compiler`: for a large vocabulary it takes seconds to make."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._llguidance = _load()
        self._n_vocab = tokenizer.n_vocab
        wrapper = self._llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
        self._tokenizer: LLTokenizer = self._llguidance.LLTokenizer(
            wrapper, n_vocab=tokenizer.n_vocab, eos_token=sorted(tokenizer.stop_ids) or None
        )
        wrapper.tokens = []  # read; from now on only its encoder is asked
        self._known: OrderedDict[str, Constraint] = OrderedDict()  # those asked for last are last

    def compile(self, source: str, what: str = "grammar") -> Constraint:
        """Of what `schema_source` or one of its sisters returned. ValueError, of one line that begins with `what`, for
        one that is wrong, not supported, or too large. Those asked for last are kept: requests mostly come with the
        same, and with what of it has been worked out."""
        known = self._known.pop(source, None) or self._compile(source, what)
        self._known[source] = known
        while len(self._known) > _KEPT:
            self._known.popitem(last=False)
        return known.copy()

    def _compile(self, source: str, what: str) -> Constraint:
        limits = self._llguidance.LLParserLimits(verbose_errors=False)
        matcher = self._llguidance.LLMatcher(self._tokenizer, source, log_level=0, limits=limits)
        if matcher.is_error():
            raise ValueError(f"{what}: {_reason(matcher.get_error())}")
        constraint = Constraint(matcher, self._n_vocab)
        mask = np.zeros(constraint.n_words, np.uint32)
        try:
            constraint.mask(mask)  # some faults show only now
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
        if not mask.any():
            raise ValueError(f"{what}: there is no text that it allows in this vocabulary")
        return constraint

    def allows(self, schema: Any) -> bool:
        """Whether a JSON schema can be followed."""
        try:
            self.compile(schema_source(schema))
        except ValueError:
            return False
        return True


def schema_source(schema: Any, options: Mapping[str, Any] = COMPACT) -> str:
    """JSON values that a schema describes: a dictionary, its JSON, or a class with `model_json_schema`.

    options: how they are written, where the schema's "x-guidance" does not say it.
    """
    text = schema_text(schema)
    return _load().LLMatcher.grammar_from_json_schema(text, defaults=dict(options))


def schema_text(schema: Any) -> str:
    """The JSON of a schema, checked in what does not need the parser."""
    if callable(describe := getattr(schema, "model_json_schema", None)):
        schema = describe()
    try:
        if isinstance(schema, str | bytes):
            schema = json.loads(schema)
        if schema is True:
            schema = {}
        if schema is False:
            raise ValueError("schema: it allows nothing")
        if not isinstance(schema, Mapping):
            raise ValueError(f"schema: an object is wanted, not {type(schema).__name__}")
        text = json.dumps(schema, ensure_ascii=False)
        if depth(schema) >= MAX_DEPTH:
            raise ValueError(f"schema: its values are nested more than {MAX_DEPTH} deep")
    except RecursionError:
        raise ValueError(f"schema: its values are nested more than {MAX_DEPTH} deep") from None
    except (TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"schema: it is no JSON: {_reason(str(error))}") from None
    _check_text(text, "schema")
    return text


def regex_source(pattern: str) -> str:
    """Texts that a regular expression matches as a whole, in the syntax of Rust's `regex` crate."""
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"regex: a text that is not empty is wanted, not {pattern!r:.50}")
    _check_text(pattern, "regex")
    return _load().LLMatcher.grammar_from_regex(pattern)


def lark_source(grammar: str) -> str:
    """Texts of a grammar in Lark's syntax, as llguidance reads it."""
    return _load().LLMatcher.grammar_from_lark(grammar)


def grammar_source(grammar: str) -> str:
    """The same for Lark's syntax or GBNF, llama.cpp's."""
    if not isinstance(grammar, str) or not grammar.strip():
        raise ValueError(f"grammar: a text that is not empty is wanted, not {grammar!r:.50}")
    _check_text(grammar, "grammar")
    _load()
    if not re.search(r"(?m)^\s*(%llguidance\b|\??start\s*(\[[^\]]*\])?\s*:(?!:=))", grammar):
        from llguidance.gbnf_to_lark import gbnf_to_lark

        try:
            grammar = gbnf_to_lark(grammar)
        except RecursionError:
            raise ValueError("grammar: it is nested too deeply") from None
        except Exception as error:
            raise ValueError(f"grammar: neither Lark nor GBNF: {_reason(str(error))}") from None
    return lark_source(grammar)


_compilers: WeakKeyDictionary[Tokenizer, Compiler] = WeakKeyDictionary()
_lock = ForkAwareLock()


def compiler(tokenizer: Tokenizer) -> Compiler:
    """That of a tokenizer, made when first asked for. ValueError, of one line, where llguidance is not installed."""
    found = _compilers.get(tokenizer)
    if found is None:
        with _lock:
            found = _compilers.get(tokenizer)
            if found is None:
                found = _compilers[tokenizer] = Compiler(tokenizer)
    return found


def available() -> bool:
    """Whether llguidance is installed."""
    try:
        _load()
    except ValueError:
        return False
    return True


def _load() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ValueError(
            "schemas and grammars need llguidance, which is not installed: pip install 'qrun-gguf[grammar]'"
        ) from None
    return llguidance


class _Vocabulary:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        ends = sorted(tokenizer.stop_ids)
        self.eos_token_id = ends[0] if ends else tokenizer.eos_id or 0
        self.bos_token_id = None
        self.special_token_ids = sorted(tokenizer.control_ids | tokenizer.stop_ids)
        # What the parser holds must not hold the tokenizer, or neither would ever go.
        self._tokenizer = weakref.ref(tokenizer)

    @property
    def tokens(self) -> list[bytes]:
        tokenizer = self._tokenizer()
        return tokenizer.all_bytes() if tokenizer is not None else []

    def __call__(self, text: str | bytes) -> list[int]:
        tokenizer = self._tokenizer()
        if tokenizer is None:
            return []
        return tokenizer.encode_further(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what}: half of a surrogate pair stands in it, which is no text") from None
    if len(text) > MAX_SOURCE:
        raise ValueError(f"{what}: {len(text)} characters are more than the {MAX_SOURCE} that are allowed")


def _reason(text: str) -> str:
    """In one line, without the drawing of where it is."""
    first = next((line for line in text.strip().splitlines() if line.strip()), "unknown")
    if first.endswith("regex parse error:"):
        last = [line.strip() for line in text.splitlines() if line.strip().startswith("error:")]
        first = f"{first} {last[-1].removeprefix('error:').strip()}" if last else first
    first = _PLAINLY.get(first, first)
    return " ".join(first.split())[:_LONGEST_REASON]
