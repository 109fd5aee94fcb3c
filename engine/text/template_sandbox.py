"""A Jinja environment for templates that come from strangers: they can neither reach the machine nor wear it out.

Jinja's own immutable sandbox keeps a template away from Python's insides. What it leaves open is appetite: nested
loops, text that doubles, lists that hold themselves twice. Python cannot interrupt a single operation, so none may be
large:

- every text and every container is measured when it is made, with all that it contains, and refused beyond a bound;
- operations that multiply (`*`, `replace`, `join`, widths) are refused before they are carried out;
- every step that can repeat (an iteration, a call, a filter, an output) looks at the clock.

The first and the last are woven into the template's syntax tree before it is compiled, as filters with names that start
with an underscore.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from time import monotonic
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 5.0
MAX_SOURCE = 1 << 18  # characters of a template; the longest in use have 30,000
MAX_TEXT = 1 << 23  # characters of any text, and of all output
MAX_ITEMS = 1 << 20  # items of any container, nested ones included
MAX_WIDTH = 1000  # of padding and indentation
MAX_BITS = 1 << 16  # of an integer

# Jinja's filters, but for those that format to a width, and those about web pages.
_FILTERS = """
    abs attr capitalize count d default dictsort e escape first float groupby int items last length list lower map max
    min reject rejectattr reverse round safe select selectattr sort string title trim unique upper
"""


class Limited(ImmutableSandboxedEnvironment):
    """Renders templates as Hugging Face's `apply_chat_template` does, within bounds. For one thread at a time."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        extensions = ["jinja2.ext.loopcontrols", GenerationTag]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self._templates: dict[str, Template] = {}
        self._deadline = 0.0
        self._text_left = 0
        own: dict[str, Callable[..., Any]] = {
            "tojson": _to_json,
            "from_json": json.loads,
            "join": _join,
            "replace": _replace,
            "indent": _indent,
        }
        filters = {name: FILTERS[name] for name in _FILTERS.split()} | own
        self.filters = {name: self._measured(function) for name, function in filters.items()}
        self.filters |= {"_each": self._each, "_emit": self._emit, "_made": self._made, "_concat": self._concat}
        del self.globals["lipsum"]
        self.globals |= {
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": lambda format: datetime.now().strftime(format),
        }

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """Raises TemplateError, or whatever Python raises where a template does something wrong."""
        if source not in self._templates:
            _check(len(source), MAX_SOURCE, "characters")
            self._templates[source] = self.from_string(_Weaver().visit(self.parse(source)))
        self._deadline, self._text_left = monotonic() + MAX_SECONDS, MAX_TEXT
        return "".join(self._templates[source].generate(variables))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._tick()
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str | bytes):
            args = _check_method(owner, function.__name__, args)
        elif isinstance(owner, int):  # to_bytes
            _check(sum(arg for arg in args if isinstance(arg, int)), MAX_WIDTH, "bytes")
        return self._measure(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self._tick()
        if operator == "*":
            _check_product(left, right)
            _check_product(right, left)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check(left.bit_length() * right, MAX_BITS, "bits")
        elif operator == "%" and isinstance(left, str | bytes):
            _check_format(left)
        return self._measure(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped

    def _tick(self) -> None:
        if monotonic() > self._deadline:
            raise TemplateError(f"the template runs for more than {MAX_SECONDS:g} seconds")

    def _measure(self, value: Any) -> Any:
        """The value, which a step has made, if it and all that it contains are within bounds."""
        if isinstance(value, str | bytes):
            _check(len(value), MAX_TEXT, "characters")
        elif isinstance(value, int):
            _check(value.bit_length(), MAX_BITS, "bits")
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
                _check(items, MAX_ITEMS, "items")
                _check(text, MAX_TEXT, "characters")
        return value

    def _measured(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # with the marks by which Jinja knows what a filter wants to be passed
        def filter(*args: Any, **kwargs: Any) -> Any:
            self._tick()
            return self._measure(function(*args, **kwargs))

        return filter

    # The filters that are woven in. With the context as an argument they are never run by the compiler.

    @pass_context
    def _each(self, context: Context, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._tick()
            yield item

    @pass_context
    def _emit(self, context: Context, value: Any) -> str:
        self._tick()
        text = str(value)
        self._text_left -= len(text)
        if self._text_left < 0:
            raise TemplateError(f"the template makes more than {MAX_TEXT} characters")
        return text

    @pass_context
    def _made(self, context: Context, container: Any) -> Any:
        return self._measure(container)

    @pass_context
    def _concat(self, context: Context, values: list[Any]) -> Any:
        self._tick()
        texts = [str(value) for value in values]
        _check(sum(map(len, texts)), MAX_TEXT, "characters")
        return "".join(texts)


class _Weaver(NodeTransformer):
    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_each")
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_filtered(part, "_emit") for part in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_concat")

    def visit_List(self, node: nodes.Literal) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_made")

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return node if node.ctx == "store" else _filtered(node, "_made")


def _filtered(node: Any, name: str) -> nodes.Expr:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %} marks, for training, what the model says: here, text like any other."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    __repr__ = object.__repr__  # what it holds is not measured


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """As Hugging Face does, and unlike Jinja, nothing is escaped for HTML."""
    _check(indent or 0, MAX_WIDTH, "columns")
    options = {name: options[name] for name in ("separators", "sort_keys") if name in options}
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


@wraps(FILTERS["join"])
def _join(eval_context: Any, value: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
    values = list(value)
    _check(len(values) * len(str(d)) + sum(map(len, map(str, values))), MAX_TEXT, "characters")
    return FILTERS["join"](eval_context, values, d, attribute)


def _replace(value: Any, old: str, new: str, count: int = -1) -> str:
    text = str(value)
    _check_method(text, "replace", (old, new))
    return text.replace(old, new, count)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text, indent = str(value), width if isinstance(width, str) else " " * _check(width, MAX_WIDTH, "columns")
    _check_method(text, "replace", ("\n", indent))
    indented: str = FILTERS["indent"](text, indent, first, blank)
    return indented


def _check(size: int, bound: int, unit: str) -> int:
    if size > bound:
        raise TemplateError(f"the template has or makes something of more than {bound} {unit}")
    return size


def _check_product(factor: Any, other: Any) -> None:
    if isinstance(factor, int):
        if isinstance(other, str | bytes | list | tuple):
            _check(factor * len(other), MAX_ITEMS, "items")
        elif isinstance(other, int):
            _check(factor.bit_length() + other.bit_length(), MAX_BITS, "bits")


def _check_method(text: str | bytes, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with which a method of this text may be called."""
    if name in ("translate", "expandtabs"):
        raise TemplateError(f"a template may not call str.{name}")
    if name in ("center", "ljust", "rjust", "zfill"):
        _check(args[0] if args else 0, MAX_WIDTH, "columns")
    if name in ("format", "format_map"):
        _check_format(text)
    if name == "join" and args:
        args = (list(args[0]),)
        _check(len(args[0]) * len(text) + sum(map(len, args[0])), MAX_TEXT, "characters")
    if name == "replace" and len(args) > 1:
        _check(len(text) + text.count(args[0]) * len(args[1]), MAX_TEXT, "characters")
    return args


def _check_format(format: str | bytes) -> None:
    """Widths and precisions: none of more than three digits, and none that is itself an argument."""
    text = format if isinstance(format, str) else format.decode("latin-1")
    if re.search(r"\d{4}|%[^a-zA-Z]*\*|\{[^{}]*\{", text):
        raise TemplateError("a template may not format to such a width")
