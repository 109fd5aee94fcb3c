"""How large a template's values may grow: the bounds, and what an operation would make, reckoned before it is done."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

MAX_SOURCE = 1 << 18  # characters of a template; the longest in use have 30,000
MAX_TEXT = 1 << 23  # characters of any text, and of all output
MAX_SEARCHED = 1 << 15  # characters of a text that Python code looks through, some of it again and again
MAX_ITEMS = 1 << 20  # items of any container, nested ones included
MAX_WIDTH = 1000  # of padding and indentation
MAX_BITS = 1 << 16  # of an integer

_QUICK_CODECS = frozenset(["utf-8", "utf8", "utf-16", "utf-32", "ascii", "latin-1", "strict", "ignore", "replace"])

# A field of `%`: its name, width, precision and kind.
_PERCENT = re.compile(r"%(\([^()]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+)?)?[hlL]?(.)?", re.DOTALL)


def check(size: int, bound: int, unit: str) -> int:
    if size > bound:
        raise TemplateError(f"the template has or makes something of more than {bound} {unit}")
    return size


def check_value(value: Any, max_items: int = MAX_ITEMS, max_text: int = MAX_TEXT) -> Any:
    """The value, if it and all that it contains are within bounds."""
    if isinstance(value, str | bytes):
        check(len(value), max_text, "characters")
    elif isinstance(value, int):
        check(value.bit_length(), MAX_BITS, "bits")
    elif isinstance(value, list | tuple | dict | set):
        items = text = 0
        unseen: list[Any] = [value]
        while unseen:
            item = unseen.pop()
            if isinstance(item, str):
                text += len(item)
            elif isinstance(item, dict):
                items += 2 * len(item)
                unseen += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set):
                items += len(item)
                unseen += item
            check(items, max_items, "items")
            check(text, max_text, "characters")
    return value


def check_product(factor: Any, other: Any) -> None:
    if isinstance(factor, int):
        if isinstance(other, str | bytes | list | tuple):
            check(factor * len(other), MAX_ITEMS, "items")
        elif isinstance(other, int):
            check(factor.bit_length() + other.bit_length(), MAX_BITS, "bits")


def check_method(text: str | bytes, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments with which a method of this text may be called."""
    if name in ("center", "ljust", "rjust", "zfill"):
        check(args[0] if args else 0, MAX_WIDTH, "columns")
    elif name == "expandtabs":
        columns = check(args[0] if args else kwargs.get("tabsize", 8), MAX_WIDTH, "columns")
        tab: Any = "\t" if isinstance(text, str) else b"\t"
        check(len(text) + text.count(tab) * columns, MAX_TEXT, "characters")
    elif name == "translate":
        if isinstance(text, str) and args:
            _check_table(len(text), args[0])
    elif name in (
        "encode",
        "decode",
    ):  # some codecs take the square of a text's length, some handlers names of characters
        coding = [*args, *kwargs.values()]
        if not _QUICK_CODECS.issuperset(coding):
            raise TemplateError(f"a template may not {name} with {coding}")
    elif name in ("split", "rsplit", "splitlines") and len(text) > 2 * MAX_ITEMS:
        check(_count_parts(text, args), MAX_ITEMS, "items")
    elif name in ("striptags", "unescape"):  # of marked-up text
        check(len(text), MAX_SEARCHED, "characters")
    elif name == "join" and args:
        args = (list(args[0]),)
        check(len(args[0]) * len(text) + sum(map(len, args[0])), MAX_TEXT, "characters")
    elif name == "replace" and len(args) > 1:
        check(len(text) + text.count(args[0]) * len(args[1]), MAX_TEXT, "characters")
    return args


def _count_parts(text: str | bytes, args: tuple[Any, ...]) -> int:
    if args and isinstance(args[0], str | bytes) and args[0]:
        separator: Any = args[0]
        return text.count(separator) + 1
    parts: Any = r"[^\s\x1c-\x1e\x85]+|[\n\r]" if isinstance(text, str) else rb"\S+|[\n\r]"
    return sum(1 for _ in re.finditer(parts, text))


def _check_table(length: int, table: Any) -> None:
    if isinstance(table, dict):
        longest = max((len(text) for text in table.values() if isinstance(text, str)), default=1)
    elif isinstance(table, str):
        longest = 1
    else:
        raise TemplateError("a template may translate by a mapping or a text alone")
    check(length * longest, MAX_TEXT, "characters")


def check_widths(spec: str) -> None:
    """The numbers in what stands after the colon of a field: `>10` of `{:>10}`."""
    for digits in re.findall(r"\d+", spec):
        check(int(digits) if len(digits) < 10 else 1 << 32, MAX_WIDTH, "columns")


def check_percent(format: str | bytes, values: Any) -> None:
    """Before `format % values`: widths, and how much a text becomes that several fields name."""
    text = format if isinstance(format, str) else format.decode("latin-1")
    named: dict[str, int] = {}
    size = 0
    for name, width, precision, kind in _PERCENT.findall(text):
        if kind == "(" or "*" in (width, precision):
            raise TemplateError("a template may not format to a width that is an argument, or by a name in parentheses")
        check_widths(width)
        check_widths(precision)
        size += int(width or 0)
        if name and isinstance(values, Mapping):
            key: Any = name[1:-1]
            if key not in named:
                value = values.get(key if isinstance(format, str) else key.encode("latin-1"), "")
                named[key] = len(value) if isinstance(value, str | bytes) else len(str(value))
            size += named[key]
        check(size, MAX_TEXT, "characters")


def check_json(value: Any, indent: int | str | None, separators: Sequence[str] | None) -> None:
    """Before `json.dumps`: what stands between the items."""
    step = len(indent) if isinstance(indent, str) else int(indent or 0)
    check(step, MAX_WIDTH, "columns")
    between = sum(map(len, separators or ()))
    if step <= 0 and between < 16:
        return
    size = 0
    unseen: list[tuple[Any, int]] = [(value, 1)]
    while unseen:
        item, depth = unseen.pop()
        if isinstance(item, dict | list | tuple):
            size += (len(item) + 1) * (between + step * depth)
            check(size, MAX_TEXT, "characters")
            unseen += [(inner, depth + 1) for inner in (item.values() if isinstance(item, dict) else item)]
