"""A Jinja environment for templates that come from strangers: they can neither reach the machine nor wear it out.

Jinja's own immutable sandbox keeps a template away from Python's insides. What it leaves open is appetite: nested
loops, text that doubles, lists that hold themselves twice. Python cannot interrupt a single operation, so none may be
large:

- every text and every container is measured when it is made, with all that it contains, and refused beyond a bound;
- operations that multiply (`*`, `replace`, `join`, formats, widths) are refused before they are carried out;
- every step that can repeat (an iteration, a call, a filter, an output) looks at the clock.

The first and the last are woven into the template's syntax tree before it is compiled, as filters with names that start
with an underscore.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date, datetime, time
from functools import wraps
from itertools import islice
from time import monotonic, thread_time
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import Markup

from qrun.engine.text.template_bounds import (
    MAX_BITS,
    MAX_ITEMS,
    MAX_SOURCE,
    MAX_TEXT,
    MAX_WIDTH,
    check,
    check_method,
    check_percent,
    check_product,
    check_value,
    check_widths,
)
from qrun.engine.text.template_filters import filters

MAX_SECONDS = 5.0  # of the processor's time


class TooSlow(TemplateError):
    """The time is up."""


class Limited(ImmutableSandboxedEnvironment):
    """Renders templates as Hugging Face's `apply_chat_template` does, within bounds. For one thread at a time."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        extensions = ["jinja2.ext.loopcontrols", GenerationTag]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self._templates: dict[str, Template] = {}
        self._seconds = self._deadline = 0.0
        self._text_left = 0
        self._has_grown = False  # a list: whatever holds it may be larger than when it was measured
        self.filters = {name: self._measured(function) for name, function in filters().items()}
        woven = (self._each, self._spread, self._emit, self._made, self._concat)
        self.filters |= {function.__name__: function for function in woven}
        del self.globals["lipsum"]
        self.globals |= {
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": lambda format: datetime.now().strftime(format),
        }

    def render(self, source: str, variables: Mapping[str, Any], seconds: float | None = None) -> str:
        """Raises TemplateError, or whatever Python raises where a template does something wrong; TooSlow after this
        time."""
        if source not in self._templates:
            check(len(source), MAX_SOURCE, "characters")
            self._templates[source] = self.from_string(_Weaver().visit(self.parse(source)))
        self._seconds = MAX_SECONDS if seconds is None else seconds
        self._begin, self._text_left = thread_time(), MAX_TEXT
        self._deadline = monotonic() + self._seconds  # sooner it cannot have taken so long
        self._has_grown = False
        return "".join(self._templates[source].generate(variables))

    def names(self, source: str) -> set[str]:
        """The variables that a template reads and does not set. Raises TemplateError where it cannot be read."""
        check(len(source), MAX_SOURCE, "characters")
        return find_undeclared_variables(self.parse(source))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._tick()
        owner = getattr(function, "__self__", None)
        self._measure(owner, *args, *kwargs.values())
        if isinstance(owner, str | bytes):
            args = check_method(owner, function.__name__, args, kwargs)
        elif isinstance(owner, _OwnList) and function.__name__ == "append":
            self._has_grown = True
            owner.check_growth(*args)  # which Jinja calls with more by name, in loops
        elif isinstance(owner, int):  # to_bytes
            check(sum(arg for arg in (*args, *kwargs.values()) if isinstance(arg, int)), MAX_WIDTH, "bytes")
        return check_value(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Context | None, operator: str, left: Any, right: Any) -> Any:
        self._tick()
        self._measure(left, right)
        if operator == "*":
            check_product(left, right)
            check_product(right, left)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            check(left.bit_length() * right, MAX_BITS, "bits")
        elif operator == "%" and isinstance(left, str | bytes):
            check_percent(left, right)
        return check_value(self.binop_table[operator](left, right))

    def wrap_str_format(self, value: Any) -> Any:
        if super().wrap_str_format(value) is None:
            return None
        text: str = value.__self__

        def format(args: tuple[Any, ...], values: Mapping[str, Any]) -> str:
            formatter = _Formatter(self)
            if isinstance(text, Markup):
                formatter = _EscapeFormatter(self, escape=text.escape)
            return type(text)(formatter.vformat(text, args, values))

        if value.__name__ == "format_map":
            return lambda values: format((), values)
        return lambda *args, **values: format(args, values)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Besides what Jinja allows, a template may add to lists of its own, as those of some families do."""
        return (isinstance(obj, _OwnList) and attr == "append") or super().is_safe_attribute(obj, attr, value)

    def _tick(self) -> None:
        if monotonic() > self._deadline:
            left = self._begin + self._seconds - thread_time()
            if left > 0:  # the machine was busy with something else
                self._deadline = monotonic() + left
                return
            raise TooSlow(f"the template runs for more than {self._seconds:g} seconds")

    def _measure(self, *values: Any) -> None:
        """Of what was measured when it was made, once more if that may have changed."""
        if self._has_grown:
            for value in values:
                check_value(value)

    def _measured(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)  # with the marks by which Jinja knows what a filter wants to be passed
        def filter(*args: Any, **kwargs: Any) -> Any:
            self._tick()
            self._measure(*args, *kwargs.values())
            return check_value(function(*args, **kwargs))

        return filter

    # The filters that are woven in. With the context as an argument they are never run by the compiler.

    @pass_context
    def _each(self, context: Context, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._tick()
            yield item

    @pass_context
    def _spread(self, context: Context, arguments: Iterable[Any]) -> list[Any]:
        values = list(islice(arguments, MAX_WIDTH + 1))
        check(len(values), MAX_WIDTH, "arguments")
        return values

    @pass_context
    def _emit(self, context: Context, value: Any) -> str:
        self._tick()
        self._measure(value)
        text = str(value)
        self._text_left -= len(text)
        if self._text_left < 0:
            raise TemplateError(f"the template makes more than {MAX_TEXT} characters")
        return text

    @pass_context
    def _made(self, context: Context, container: Any) -> Any:
        check_value(container)
        return _OwnList(container) if isinstance(container, list) else container

    @pass_context
    def _concat(self, context: Context, values: list[Any]) -> Any:
        self._tick()
        self._measure(*values)
        texts = [str(value) for value in values]
        check(sum(map(len, texts)), MAX_TEXT, "characters")
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

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = _filtered(node.dyn_args, "_spread")
        return node

    visit_Filter = visit_Test = visit_Call

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
    """{% generation %} ... {% endgeneration %} marks, for training, what the model says: here, text like any other.

    As with Hugging Face, it is a block of its own: what is set in it is not set after it.
    """

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Callable[[], str]) -> str:
        return caller()


class _Formatter(SandboxedFormatter):
    """`str.format`, measured field by field."""

    _made = 0

    def format_field(self, value: Any, format_spec: str) -> Any:
        if not isinstance(value, date | time):  # whose format is a text
            check_widths(format_spec)
        text = super().format_field(value, format_spec)
        self._made += len(text)
        check(self._made, MAX_TEXT, "characters")
        return text


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    """The same of marked-up text."""


class _OwnList(list[Any]):
    """A list that a template has made, and may add to: texts and numbers, since a container could hold the list."""

    _text = 0

    def check_growth(self, *values: Any) -> None:
        """Before these are added."""
        check(len(self) + 1, MAX_ITEMS, "items")
        for value in values:
            if isinstance(value, str):
                self._text = check(self._text + len(value), MAX_TEXT, "characters")
            elif not isinstance(value, int | float | None):
                raise TemplateError("a template may add texts and numbers to a list, and nothing else")


class _Namespace(Namespace):
    __repr__ = object.__repr__  # what it holds is not measured


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
