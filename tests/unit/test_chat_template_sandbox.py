"""Templates that mean harm: all end soon, in little memory, with one error."""

import time
import tracemalloc

import pytest
from jinja2 import TemplateError

from qrun.engine.text import template_sandbox
from qrun.engine.text.template_sandbox import Limited

GROW = "{% set n = namespace(x=START) %}{% for i in range(99) %}{% set n.x = STEP %}{% endfor %}{{ n.x }}"

DOUBLE = " %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x"


def grow(start: str, step: str) -> str:
    """A value that a hundred steps make from itself."""
    return GROW.replace("START", start).replace("STEP", step)


HARM = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops over a list": "{% set r = [1] * 99999 %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "a macro that branches": "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a slow test in a loop": "{% set r = range(99999) | list %}{% for a in r %}{% if -1 in r %}{% endif %}{% endfor %}",
    "a range": "{{ range(1000000000) | list }}",
    "much output": "{% for a in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "much output in a block": "{% set x %}{% for a in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endset %}",
    "text that doubles": grow("'ab'", "n.x + n.x"),
    "text that doubles, joined": grow("'ab'", "n.x ~ n.x"),
    "text that doubles, in blocks": grow("'a'", "y").replace(" %}{% set n.x", DOUBLE),
    "a number that squares": grow("99", "n.x * n.x"),
    "a power": "{{ 9 ** 9 ** 9 ** 9 ** 9 ** 9 }}",
    "a list that holds itself twice": grow("[1]", "[n.x, n.x]"),
    "a dict that holds itself twice": grow("1", "{1: n.x, 2: n.x}"),
    "a tuple that holds itself twice": grow("(1,)", "(n.x, n.x)"),
    "a list of one long list": "{{ range(99999) | map(attribute='x', default=range(99999) | list) | list | tojson }}",
    "a product of text": "{{ 'a' * 9999999999 }}",
    "a product of lists": "{{ 9999999999 * [1] }}",
    "a wide method": "{{ 'a'.center(9999999999) }}",
    "a wide format": "{{ '%9999999999d' % 1 }}",
    "a wide format by argument": "{{ '%*d' % (9999999999, 1) }}",
    "a wide format method": "{{ '{:9999999999}'.format(1) }}",
    "a wide format method by argument": "{{ '{:{}}'.format(1, 9999999999) }}",
    "a wide indentation": "{{ 'a\nb' | indent(9999999999) }}",
    "wide JSON": "{{ [1] | tojson(indent=9999999999) }}",
    "many bytes": "{{ (1).to_bytes(9999999999, 'big') }}",
    "a replacement": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "a replacing filter": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "a join": "{{ ('a' * 99999).join(range(99999) | map('string')) }}",
    "a joining filter": "{{ range(99999) | join('a' * 99999) }}",
    "a long source": "x" * 999_999,
    "a deep source": "{{ " + "(" * 99_999 + "1" + ")" * 99_999 + " }}",
    "Python's insides": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "the globals of a function": "{{ namespace.__init__.__globals__ }}",
    "a change to the messages": "{{ messages.append(1) }}",
}  # fmt: skip


@pytest.mark.parametrize("name", HARM)
def test_harm_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.2)
    tracemalloc.start()
    start = time.process_time()
    try:
        with pytest.raises((TemplateError, ArithmeticError, RecursionError)):
            Limited().render(HARM[name], {"messages": [{"role": "user", "content": "x"}]})
        assert tracemalloc.get_traced_memory()[1] < 200 << 20
        assert time.process_time() - start < 10  # tracing memory makes it several times slower
    finally:
        tracemalloc.stop()


def test_a_namespace_does_not_show_what_it_holds() -> None:
    assert "secret" not in Limited().render("{{ namespace(a='secret') }}", {})


def test_ordinary_work_is_within_bounds() -> None:
    messages = [{"role": "user", "content": "word " * 2000}] * 200
    source = "{% for m in messages %}{{ '<' + m.role ~ '>' + m.content | trim }}\n{% endfor %}"
    assert len(Limited().render(source, {"messages": messages})) > 2_000_000
