"""Jinja's filters within bounds, and those that Hugging Face's templates have beside them."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from itertools import islice
from typing import Any

from jinja2 import Undefined
from jinja2.filters import FILTERS, make_attrgetter

from qrun.engine.text.template_bounds import (
    MAX_ITEMS,
    MAX_SEARCHED,
    MAX_TEXT,
    MAX_WIDTH,
    check,
    check_json,
    check_method,
    check_percent,
    check_value,
)

# Those that make no more than they are given, or a small multiple, and are quick about it.
_HARMLESS = """
    abs attr capitalize count d default dictsort e escape filesizeformat first float forceescape int items last
    length lower map max min random reject rejectattr reverse safe select selectattr string title trim truncate unique
    upper
"""


def filters() -> dict[str, Callable[..., Any]]:
    """All of Jinja's own, and `from_json`. What they make is still to be measured, and the time to be watched."""
    own: dict[str, Callable[..., Any]] = {
        "batch": _batch,
        "center": _center,
        "format": _format,
        "from_json": json.loads,
        "groupby": _itemised("groupby"),
        "indent": _indent,
        "join": _join,
        "list": _itemised("list"),
        "pprint": _pprint,
        "replace": _replace,
        "round": _round,
        "slice": _slice,
        "sort": _itemised("sort"),
        "striptags": _striptags,
        "sum": _sum,
        "tojson": _to_json,
        "urlencode": _urlencode,
        "urlize": _urlize,
        "wordcount": _wordcount,
        "wordwrap": _wordwrap,
        "xmlattr": _xmlattr,
    }
    return {name: FILTERS[name] for name in _HARMLESS.split()} | own


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As Hugging Face does, and unlike Jinja, nothing is escaped for HTML. What other filters make item by item, as
    `map` does, is a list."""
    if isinstance(value, Iterator):
        value = list(islice(value, MAX_ITEMS + 1))
    check_json(value, indent, separators)
    if separators is not None:
        item, key = separators
        separators = item, key
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@wraps(FILTERS["join"])
def _join(eval_context: Any, value: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
    values = _items(value)
    check(len(values) * len(str(d)) + sum(map(len, map(str, values))), MAX_TEXT, "characters")
    return FILTERS["join"](eval_context, values, d, attribute)


def _replace(value: Any, old: str, new: str, count: int = -1) -> str:
    text = str(value)
    check_method(text, "replace", (old, new), {})
    return text.replace(old, new, count)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text, indent = str(value), width if isinstance(width, str) else " " * check(width, MAX_WIDTH, "columns")
    check_method(text, "replace", ("\n", indent), {})
    indented: str = FILTERS["indent"](text, indent, first, blank)
    return indented


def _center(value: Any, width: int = 80) -> str:
    centred: str = FILTERS["center"](value, check(width, MAX_WIDTH, "columns"))
    return centred


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    text = str(value)
    check_percent(text, kwargs or args)
    formatted: str = FILTERS["format"](text, *args, **kwargs)
    return formatted


def _batch(value: Iterable[Any], linecount: int, fill_with: Any = None) -> Iterator[list[Any]]:
    check(linecount, MAX_ITEMS if fill_with is None else MAX_WIDTH, "columns")
    batches: Iterator[list[Any]] = FILTERS["batch"](value, linecount, fill_with)
    return batches


@wraps(FILTERS["slice"])
def _slice(context: Any, value: Iterable[Any], slices: int, fill_with: Any = None) -> Iterator[list[Any]]:
    check(slices, MAX_WIDTH, "columns")
    parts: Iterator[list[Any]] = FILTERS["slice"](context, _items(value), slices, fill_with)
    return parts


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    rounded: float = FILTERS["round"](value, check(precision, MAX_WIDTH, "digits"), method)
    return rounded


def _items(value: Any) -> list[Any]:
    """A list of what is in a container, or comes one by one; a text's characters take more memory than the text."""
    if isinstance(value, str):
        check(len(value), MAX_ITEMS, "items")
    items = list(islice(value, MAX_ITEMS + 1))
    check(len(items), MAX_ITEMS, "items")
    return items


def _itemised(name: str) -> Callable[..., Any]:
    """Jinja's filter that makes a list of its argument."""

    @wraps(FILTERS[name])
    def filter(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        return FILTERS[name](context, _items(value), *args, **kwargs)

    return filter


@wraps(FILTERS["sum"])
def _sum(environment: Any, iterable: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
    """Measured at each step: lists can be summed too, and grow with each."""
    if isinstance(start, str | bytes):
        raise TypeError("sum() can't sum strings")
    of = make_attrgetter(environment, attribute) if attribute is not None else lambda item: item
    total = start
    for item in iterable:
        total = environment.call_binop(None, "+", total, of(item))
    return total


@wraps(FILTERS["pprint"])
def _pprint(value: Any) -> str:
    printed: str = FILTERS["pprint"](check_value(value, MAX_ITEMS >> 6, MAX_SEARCHED))
    return printed


def _striptags(value: Any) -> str:
    check(len(str(value)), MAX_SEARCHED, "characters")
    text: str = FILTERS["striptags"](value)
    return text


@wraps(FILTERS["urlize"])
def _urlize(eval_context: Any, value: str, *args: Any, **kwargs: Any) -> str:
    # every link may be given each of the texts
    texts = [text for text in (*args, *kwargs.values()) if isinstance(text, str)]
    check(len(value) * (1 + sum(map(len, texts))), MAX_SEARCHED, "characters")
    links: str = FILTERS["urlize"](eval_context, value, *args, **kwargs)
    return links


def _urlencode(value: Any) -> str:
    if not isinstance(value, str | Mapping):
        value = list(value)
    check_value(value if isinstance(value, str | list) else dict(value), max_text=MAX_TEXT // 12)  # "%F0%9F%98%80"
    encoded: str = FILTERS["urlencode"](value)
    return encoded


def _wordcount(value: Any) -> int:
    return sum(1 for _ in re.finditer(r"\w+", str(value)))


@wraps(FILTERS["wordwrap"])
def _wordwrap(
    environment: Any,
    s: str,
    width: int = 79,
    break_long_words: bool = True,
    wrapstring: str | None = None,
    break_on_hyphens: bool = True,
) -> str:
    text = str(s)
    # there may be a new line after each character
    check(len(text), MAX_SEARCHED, "characters")
    check(len(text) * (1 + len(wrapstring or "")), MAX_TEXT, "characters")
    wrapped: str = FILTERS["wordwrap"](environment, text, width, break_long_words, wrapstring, break_on_hyphens)
    return wrapped


@wraps(FILTERS["xmlattr"])
def _xmlattr(eval_context: Any, d: Mapping[str, Any], autospace: bool = True) -> str:
    attributes = {key: value for key, value in d.items() if value is not None and not isinstance(value, Undefined)}
    check_value(attributes, max_text=MAX_TEXT // 6)  # "&#34;"
    for value in attributes.values():
        check_value(value)
    written: str = FILTERS["xmlattr"](eval_context, attributes, autospace)
    return written
