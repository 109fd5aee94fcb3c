"""Templates that mean harm: all end soon, in little memory, with one error."""

import time
import tracemalloc

import pytest
from jinja2 import TemplateError
from jinja2.filters import FILTERS

from qrun.engine.text import template_sandbox
from qrun.engine.text.template_sandbox import Limited

GROW = "{% set n = namespace(x=START) %}{% for i in range(99) %}{% set n.x = STEP %}{% endfor %}{{ n.x }}"

DOUBLE = " %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x"


def grow(start: str, step: str) -> str:
    """A value that a hundred steps make from itself."""
    return GROW.replace("START", start).replace("STEP", step)


# Eight million characters, none of them Latin-1.
LONG = "{% set text %}{% for i in range(8) %}{{ '\u4e2d' * 999999 }}{% endfor %}{% endset %}"

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
    "a wide format that fills its field": "{{ '{0[a]:x>9999999999}'.format({'a': 1}) }}",
    "a wide format in other digits": "{{ '{:\u0669\u0669\u0669\u0669\u0669\u0669\u0669\u0669\u0669}'.format(1) }}",
    "a wide format by a mapping": "{{ '{a:{b}}'.format_map({'a': 1, 'b': 9999999999}) }}",
    "a wide format of marked-up text": "{{ ('{:9999999999}' | safe).format(1) }}",
    "a wide format by name": "{{ '%(a)9999999999d' % {'a': 1} }}",
    "a wide format by a name in parentheses": "{{ '%((a))9999999999d' % {'(a)': 1} }}",
    "a precise format": "{{ '{:.9999999999f}'.format(1.5) }}",
    "a field that is named again and again": "{{ ('{0}' * 99999).format('a' * 99999) }}",
    "a name that is used again and again": "{{ ('%(a)s' * 99999) % {'a': 'b' * 99999} }}",
    "many wide fields": "{{ ('{0:999}' * 99999).format(1) }}",
    "a formatting filter": "{{ '%9999999999d' | format(1) }}",
    "a formatting filter by argument": "{{ '%*d' | format(9999999999, 1) }}",
    "a centring filter": "{{ 'a' | center(9999999999) }}",
    "a centring filter by name": "{{ ['a'] | map('center', 9999999999) | list }}",
    "a batch that is filled up": "{{ [1] | batch(9999999999, 'a') | list }}",
    "many slices": "{{ [1] | slice(9999999999) | list }}",
    "characters of a long text": LONG + "{{ text | list }}",
    "characters of a long text, sorted": LONG + "{{ text | sort }}",
    "characters of a long text, picked": LONG + "{{ text | select | list }}",
    "characters of a long text, in one batch": LONG + "{{ text | batch(9999999) | list }}",
    "a sum of lists": "{{ ([range(99999) | list] * 9999) | sum(start=[]) }}",
    "a long line to wrap": "{{ (' ' * 999999) | wordwrap(1) }}",
    "a long text between wrapped lines": "{{ ('a ' * 9999) | wordwrap(1, wrapstring='b' * 9999) }}",
    "a long text to look through for tags": "{{ ('<!---->' * 99999) | striptags }}",
    "a long text to look through for tags, by method": "{{ (('<!---->' * 99999) | safe).striptags() }}",
    "a long text to look through for links": "{{ ('a@' * 99999) | urlize }}",
    "a long text to encode": LONG + "{{ text | urlencode }}",
    "a long value to encode": LONG + "{{ {'a': text} | urlencode }}",
    "a long attribute": LONG + "{{ {'a': text} | xmlattr }}",
    "a long list to print": "{{ range(99999) | list | pprint }}",
    "a random number of very many": "{{ range(9999999999) | random }}",
    "a precise rounding": "{{ 1.5 | round(9999999999, 'floor') }}",
    "a wide tab": "{{ 'a\\tb'.expandtabs(9999999999) }}",
    "a wide tab by name": "{{ 'a\\tb'.expandtabs(tabsize=9999999999) }}",
    "many tabs": "{{ ('\\t' * 99999).expandtabs(999) }}",
    "a translation": "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "a slow codec": "{{ ('é' * 99999).encode('punycode') }}",
    "names of characters": "{{ ('é' * 999999).encode('ascii', 'namereplace') }}",
    "many bytes by name": "{{ (1).to_bytes(length=9999999999, byteorder='big') }}",
    "indented JSON": "{{ range(99999) | list | tojson(indent=999) }}",
    "wide text in JSON": "{{ range(99999) | list | tojson(separators=['a' * 99999, ':']) }}",
    "wide text in JSON, by position": "{{ range(99999) | list | tojson(false, none, ['a' * 99999, ':']) }}",
    "many arguments": LONG + "{{ range(*text) }}",
    "a long source": "x" * 999_999,
    "a deep source": "{{ " + "(" * 99_999 + "1" + ")" * 99_999 + " }}",
    "Python's insides": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "the globals of a function": "{{ namespace.__init__.__globals__ }}",
    "a change to the messages": "{{ messages.append(1) }}",
    "a list that is added to itself": "{% set a = [] %}{{ a.append(a) }}",
    "a list that holds another twice": "{% set a = [1] %}{% set b = [] %}{{ b.append(a) }}{{ b.append(a) }}",
    "a list that grows in what holds it": LONG
    + "{% set a = [] %}{% set b = [a] * 999 %}{{ a.append(text) }}{{ b | tojson }}",
    "a list that grows in what is printed": LONG + "{% set a = [] %}{% set b = [a] * 999 %}{{ a.append(text) }}{{ b }}",
    "a list that grows without end": LONG
    + "{% set a = [] %}{% for i in range(99999) %}{% set _ = a.append(text) %}{% endfor %}{{ a | join }}",
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


@pytest.mark.parametrize("own", [True, False])
def test_what_other_programs_take_of_the_time_does_not_count(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))  # a second goes by between two looks
    monkeypatch.setattr(template_sandbox, "monotonic", lambda: float(next(clock)))
    if own:
        monkeypatch.setattr(template_sandbox, "thread_time", lambda: float(next(clock)))
    source = "{% for i in range(40) %}{{ i | string }}{% endfor %}"
    if own:
        with pytest.raises(TemplateError, match="runs for more than 5 seconds"):
            Limited().render(source, {})
    else:
        assert Limited().render(source, {}) == "".join(map(str, range(40)))


def test_a_template_may_add_to_a_list_of_its_own() -> None:
    source = "{% set n = namespace(a=[]) %}{% for m in messages %}{% set _ = n.a.append(m) %}{% endfor %}{{ n.a }}"
    assert Limited().render(source, {"messages": ["a", "b", 3]}) == "['a', 'b', 3]"


def test_what_a_filter_makes_item_by_item_is_a_list_in_json() -> None:
    source = "{{ messages | map(attribute='role') | tojson }}"
    assert Limited().render(source, {"messages": [{"role": "user"}, {"role": "tool"}]}) == '["user", "tool"]'


def test_a_namespace_does_not_show_what_it_holds() -> None:
    assert "secret" not in Limited().render("{{ namespace(a='secret') }}", {})


def test_ordinary_work_is_within_bounds() -> None:
    messages = [{"role": "user", "content": "word " * 2000}] * 200
    source = "{% for m in messages %}{{ '<' + m.role ~ '>' + m.content | trim }}\n{% endfor %}"
    assert len(Limited().render(source, {"messages": messages})) > 2_000_000


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 'Since 2024, {} and {:>4}.'.format('a', 5) }}", "Since 2024, a and    5."),
        ("{{ '{{\"name\": \"{}\"}}'.format('f') }}", '{"name": "f"}'),
        ("{{ '{:{}}|{a[b]!r}'.format(1, 3, a={'b': 'c'}) }}", "  1|'c'"),
        ("{{ '{a}'.format_map({'a': 1}) }}", "1"),
        ("{{ ('<{}>' | safe).format('<') }}", "<&lt;>"),
        ("{{ '2023-10-01: %s, %(b)s%%' % {'b': 1} }}", "2023-10-01: {'b': 1}, 1%"),
        ("{{ '%05.1f' | format(1.25) }}", "001.2"),
        ("{{ [1, 2] | sum }} {{ [{'a': 1}] | sum(attribute='a', start=2) }}", "3 3"),
        ("{{ [[1], [2]] | sum(start=[]) }}", "[1, 2]"),
        ("{{ [1, 2, 3] | batch(2, 0) | list }} {{ 'abc' | slice(2) | list }}", "[[1, 2], [3, 0]] [['a', 'b'], ['c']]"),
        ("{{ 'a b' | wordcount }} {{ 'abc def' | truncate(5, leeway=0) }} {{ 'a' | center(3) }}.", "2 ab...  a ."),
        ("{{ 'aa bb' | wordwrap(2) }} {{ '<b>a</b>&amp;' | striptags }}", "aa\nbb a&"),
        ("{{ 'a b/é' | urlencode }} {{ {'a': 'b c'} | urlencode }}", "a%20b/%C3%A9 a=b+c"),
        ("{{ {'a': '<', 'b': none} | xmlattr }} {{ '<' | forceescape }}", ' a="&lt;" &lt;'),
        ("{{ 2000 | filesizeformat }} {{ [5] | random }} {{ {'a': 1} | pprint }}", "2.0 kB 5 {'a': 1}"),
        ("{{ 'http://a.org' | urlize(target='c') }}", '<a href="http://a.org" rel="noopener" target="c">http://a.org</a>'),
        ("{{ 'a\\tb'.expandtabs(2) }} {{ 'abc'.translate({97: 'xy', 98: none}) }}", "a b xyc"),
        ("{{ {'b': 1, 'a': ['é']} | tojson(true, none, (',', ':'), true) }}", '{"a":["\\u00e9"],"b":1}'),
        ("{{ [1] | tojson(indent='-') }}", "[\n-1\n]"),
        ("{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "21"),
    ],
)  # fmt: skip
def test_what_a_template_may_do(source: str, text: str) -> None:
    assert Limited().render(source, {}) == text


def test_every_filter_of_jinja_is_there() -> None:
    assert Limited().filters.keys() >= FILTERS.keys()
