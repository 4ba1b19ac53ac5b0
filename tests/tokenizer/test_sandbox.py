"""Limits of chat templates: what would hang or fill the memory is stopped, what is ordinary is not.

jinja2's own sandbox renders the ordinary templates for comparison.
"""

import threading

import jinja2
import jinja2.sandbox
import pytest

from xinslm.tokenizer import sandbox
from xinslm.tokenizer.sandbox import LimitedEnvironment, LimitError, render

MESSAGES = [
    {"role": "user", "content": "a <b> & 'c'\n" * 3, "tags": ["x", "y"]},
    {"role": "assistant", "content": "é 日本", "tags": []},
]


def made(source, **names):
    names = {"messages": MESSAGES, "big": "ab" * 50_000} | names
    return render(LimitedEnvironment().compile_limited(source), names)


NESTED = "{% for a in r %}{% for b in r %}{% for c in r %}X{% endfor %}{% endfor %}{% endfor %}"
DOUBLED = "{% set n = namespace(x=START) %}{% for i in range(60) %}STEP{% endfor %}{{ n.x }}"


def doubled(start, step):
    return DOUBLED.replace("START", start).replace("STEP", step)


@pytest.mark.parametrize(
    "source",
    [
        "{% set r = range(2000) %}" + NESTED.replace("X", ""),
        "{% set r = range(2000) %}" + NESTED.replace("X", "{% set x = 'a' in big %}"),
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(50) }}",
        "{% for m in [[1], [2]] recursive %}{{ loop([[1], [2]]) if loop.depth0 < 60 }}{% endfor %}",
    ],
    ids=["nested loops", "slow nested loops", "macros", "recursive loops"],
)
def test_templates_that_run_for_long_are_stopped_in_any_thread(source, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.3)
    errors = []

    def work():
        with pytest.raises(LimitError, match="runs for more than") as caught:
            made(source)
        errors.append(caught.value)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert len(errors) == 1


@pytest.mark.parametrize(
    "source",
    [
        "{% set r = range(2000) %}" + NESTED.replace("X", "aaaa"),
        "{% set r = range(2000) %}" + NESTED.replace("X", "{{ big }}"),
        "{{ 'a' * 10**10 }}",
        "{{ 10**10 * ['a'] }}",
        "{{ 10**(10**10) }}",
        doubled("3", "{% set n.x = n.x * n.x %}"),
        doubled("'ab'", "{% set n.x = n.x + n.x %}"),
        doubled("'ab'", "{% set n.x = n.x ~ n.x %}"),
        doubled("'ab'", "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"),
        doubled("[1]", "{% set n.x = n.x + n.x %}"),
        doubled("[1]", "{% set n.x = [n.x, n.x] %}"),
        doubled("[1]", "{% set n.x = (n.x, n.x) %}"),
        doubled("[1]", "{% set n.x = {'a': n.x, 'b': n.x} %}"),
        doubled("[1]", "{% set n.x = dict(a=n.x, b=n.x) %}"),
        "{% macro m() %}{% set n.x = varargs %}{% endmacro %}"
        + doubled("[1]", "{{ m(n.x, n.x) }}"),
        doubled("'a'", "{% set n.x = '%s%s' % (n.x, n.x) %}"),
        doubled("'a'", "{% set n.x = '{0}{0}'.format(n.x) %}"),
        doubled("'ab'", "{% set n.x = n.x.replace('b', n.x) %}"),
        doubled("'ab'", "{% set n.x = n.x | replace(new=n.x, old='b') %}"),
        doubled("'ab'", "{% set n.x = n.x | join(n.x) %}"),
        "{{ big | join(big) }}",
        "{{ big.join(big) }}",
        "{{ big.replace('a', big) }}",
        "{{ big | replace('', big) }}",
        "{{ 11111111 | replace('1', big * 10) }}",
        "{{ 'a' | center(10**10) }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ 'a'.zfill(10**10) }}",
        "{{ ('\t' * 1000).expandtabs(10**6) }}",
        "{{ ('\r' * 1000) | indent(10**6, blank=true) }}",
        "{{ [1] | batch(10**10, 0) | list }}",
        "{{ [1] | slice(10**10) | list }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10**10, 1) }}",
        "{{ '%10000000000d' | format(1) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10**10) }}",
        "{{ 'a'.translate({97: big}) * 1000 }}",
        "{{ big.translate({97: big}) }}",
        "{{ (1).to_bytes(10**10, 'big') }}",
        "{{ [[1]] | tojson(indent=10**10) }}",
        "{{ range(100000) | map('string') | map('center', 100000) | join }}",
        "{{ [[1]] | sum(start=[]) }}",
        "{{ [big] * 10**6 }}",
    ],
)
def test_templates_that_make_too_much_are_stopped(source):
    with pytest.raises(LimitError):
        made(source)


ORDINARY = [
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ loop.last }} "
    "{{ m.role ~ ': ' ~ m['content'] | trim }}{% if not loop.last %}, {% endif %}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ m.content | upper }}{% else %}none{% endfor %}",
    "{% for m in messages[::-1] %}{{ (messages | length - 1) - loop.index0 }}{% endfor %}",
    "{{ messages | tojson(indent=2) }} {{ messages | map(attribute='role') | join(', ') }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ missing }}",
    "{% for x in missing %}{% endfor %}{{ missing | default('d') }}{{ [1, 2] | sum }}",
    "{% set ns = namespace(a=[], n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.a = ns.a + [m.role] %}{% endfor %}{{ ns.n }} {{ ns.a }} {{ (1, 'x') }}",
    "{% macro turn(m, pre='') %}{{ pre }}<{{ m.role }}>{{ m.tags | join('|') }}{% endmacro %}"
    "{{ turn(messages[0], pre='-') }}{{ turn(messages[1]) }}",
    "{% for a, b in {'x': 1, 'y': [2, none, 3.5]}.items() %}{{ a }}={{ b }};{% endfor %}",
    "{{ '%s-%05d' % ('a', 7) }} {{ '{:>5}|{}'.format('a', 2**20) }} {{ 'a,b'.split(',')[1] * 3 }}",
    "{% for x in [[1, [2]], [3]] recursive %}{{ loop(x) if x is iterable else x }};{% endfor %}",
    "{{ 'one two' | replace('o', '0') | title }}{% filter upper %}x{{ 1 }}{% endfilter %}",
    "{% set text %}{{ messages[1].content }}!{% endset %}{{ text | length }}{{ text }}\n \n",
    "{{ 'abc' | list | reverse | join }}{{ messages[0].content | tojson }}{{ 1 < 2 and 'y' }}",
]


@pytest.mark.parametrize("source", ORDINARY)
def test_ordinary_templates_render_as_in_jinja2(source):
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(source)
    assert made(source) == plain.render(messages=MESSAGES)


def test_limits_grow_with_the_conversation():
    messages = [{"role": "user", "content": "x" * 10_000_000}]
    source = "{% for m in messages %}{{ m.content | trim }}{{ m.content + '!' }}{% endfor %}"
    assert len(made(source, messages=messages)) == 20_000_001
