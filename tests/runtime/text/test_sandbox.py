"""Templates that make or read too much: each is stopped before it takes the memory, and ordinary ones are not."""

# ruff: noqa: E501 - templates are read best in one piece
import json
import subprocess
import sys

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bonnx.runtime.text.chat import ChatTemplate

BIG = 1_000_000_000
# `s` is a text of 200,000 characters that the message brings along, `w` one of a thousand, `t` has lines and tabs.
ATTACKS = {
    "~": "{% set ns = namespace(x=s) %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "+": "{% set ns = namespace(x=s) %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "*": "{{ (w * 999999) | length }}",
    "* of *": "{% set x = [[w] * 9999] * 9999 %}{{ x | string | length }}",
    "**": "{{ 9 ** 99999999 }}",
    "chain of **": "{% set x = 3 ** 6000 %}{{ x * x * x * x }}",
    "lists": "{% set ns = namespace(x=[1]) %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "nested lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "equal lists": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "nested namespaces": "{% set ns = namespace(x=namespace(a=[1])) %}{% for i in range(60) %}"
    "{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "kept": "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = ns.l + [s[1:]] %}{% endfor %}",
    "literal": "{% set x = [" + "s[1:]," * 3000 + "] %}{{ x | length }}",
    "accumulated": "{% set ns = namespace(x='') %}{% for i in range(99999) %}{% set ns.x = ns.x ~ w %}{% endfor %}",
    "macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(x=w) %}{% for i in range(60) %}"
    "{% set ns.x = f(ns.x) %}{% endfor %}",
    "recursive macro": "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f(w) }}",
    "macro of text": "{% macro f() %}" + "text " * 5000 + "{% endmacro %}{% set ns = namespace(l=[]) %}"
    "{% for i in range(99999) %}{% set ns.l = ns.l + [f()] %}{% endfor %}",
    "macro of a loop": "{% macro f() %}{% for i in range(99999) %}"
    + "text " * 5000
    + "{% endfor %}{% endmacro %}{{ f() | length }}",
    "set block": "{% set x %}{% for i in range(99999) %}" + "text " * 5000 + "{% endfor %}{% endset %}",
    "call block": "{% macro f() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}"
    "{% set x %}{% call f() %}" + "text " * 5000 + "{% endcall %}{% endset %}",
    "blocks": "{% block a %}{% endblock %}"
    + "".join(
        f"{{% block {b} %}}{{{{ self.{a}() }}}}{{{{ self.{a}() }}}}{{% endblock %}}" for a, b in ("ab", "bc", "cd")
    )
    + "{% for i in range(99999) %}{% set x %}{{ self.d() }}{% endset %}{% for j in 'abc' %}{{ self.d() }}{% endfor %}{% endfor %}",
    "recursive loop": "{% for i in [[[[[[s, s], s], s], s], s], s] recursive %}{{ loop(i) if i is not string else s }}"
    "{{ s * 20 }}{% endfor %}",
    "filtered loop": "{% for i in range(9999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "center": f"{{{{ 'a'.center({BIG}) | length }}}}",
    "center of attr": f"{{{{ ('a' | attr('center'))({BIG}) | length }}}}",
    "ljust": f"{{{{ 'a'.ljust({BIG}, 'é') | length }}}}",
    "rjust": f"{{{{ 'a'.rjust({BIG}) | length }}}}",
    "zfill": f"{{{{ 'a'.zfill({BIG}) | length }}}}",
    "expandtabs": f"{{{{ t.expandtabs({BIG}) | length }}}}",
    "replace": "{{ s.replace('a', w) | length }}",
    "replace of nothing": "{{ s.replace('', s) | length }}",
    "join": "{{ s.join(range(9999) | map('string')) | length }}",
    "join of a text": "{{ s.join(w) | length }}",
    "translate": "{{ s.translate({97: s}) | length }}",
    "format": "{{ '{:>1000000000}'.format(1) | length }}",
    "format, nested": "{{ '{:>{}}'.format(1, 1000000000) | length }}",
    "format, often": "{{ ('{0}' * 999).format(s) | length }}",
    "format of lists": "{{ '{!r}'.format([s] * 9999) | length }}",
    "format_map": "{{ ('{a}' * 999).format_map({'a': s}) | length }}",
    "format of markup": "{{ ('{:>1000000000}' | safe).format(1) | length }}",
    "%": "{{ '%1000000000d' % 1 }}",
    "% *": "{{ ('%*d' % (1000000000, 1)) | length }}",
    "% .": "{{ ('%.1000000000f' % 1.5) | length }}",
    "% often": "{{ (('%(a)s' * 999) % {'a': s}) | length }}",
    "to_bytes": f"{{{{ (1).to_bytes({BIG}, 'big') | length }}}}",
    "from_bytes": "{{ (1).from_bytes(s.encode(), 'big') }}",
    "bytes": f"{{{{ 'a'.encode().center({BIG}) | length }}}}",
    "int of hex": "{{ s | int(base=16) }}{{ ('f' * 99999) | int(base=16) }}",
    "|center": f"{{{{ 'a' | center({BIG}) | length }}}}",
    "|center, constant": f"{{{{ 'a' | center({BIG}) }}}}",
    "{% filter %}": f"{{% filter center({BIG}) %}}a{{% endfilter %}}",
    "|map": f"{{{{ ['a'] | map('center', {BIG}) | list | length }}}}",
    "|map of many": "{{ range(99999) | map('string') | map('center', 9999) | list | length }}",
    "|indent": f"{{{{ t | indent({BIG}) | length }}}}",
    "|indent of text": "{{ (t * 99) | indent(s) | length }}",
    "|wordwrap": "{{ s | wordwrap(1, wrapstring=s) | length }}",
    "|replace": "{{ s | replace('a', w) | length }}",
    "|join": "{{ range(9999) | join(s) | length }}",
    "|join of a text": "{{ w | join(s) | length }}",
    "|join of lists": "{{ ([[w] * 999] * 999) | join | length }}",
    "|batch": f"{{{{ [1] | batch({BIG}, 1) | list | length }}}}",
    "|slice": f"{{{{ [1] | slice({BIG}, 1) | list | length }}}}",
    "|tojson": "{{ ([[w] * 999] * 999) | tojson | length }}",
    "|tojson indent": f"{{{{ [[[1]]] | tojson(indent={BIG}) | length }}}}",
    "|tojson separators": "{{ ([1] * 9999) | tojson(separators=(s, s)) | length }}",
    "|string": "{{ ([[w] * 999] * 999) | string | length }}",
    "|pprint": "{{ ([[w] * 999] * 999) | pprint | length }}",
    "|format": "{{ '%1000000000d' | format(1) | length }}",
    "|urlize": "{{ ('http://a.b ' * 99999) | urlize(target=w) | length }}",
    "|xmlattr": "{{ {'a': [[w] * 999] * 999} | xmlattr | length }}",
    "|urlencode": "{{ {'a': [[w] * 999] * 999} | urlencode | length }}",
    "|escape": "{{ ([[w] * 999] * 999) | e | length }}",
    "|sum": "{{ ([[1] * 9999] * 9999) | sum(start=[]) | length }}",
    "|list": "{% set ns = namespace(l=[]) %}{% for i in range(999) %}{% set ns.l = ns.l + [s | list] %}{% endfor %}",
    "|round": f"{{{{ 1 | round({BIG}, 'ceil') }}}}",
    "|striptags": "{{ ('<!-- a -->' * 99999) | striptags }}",
    "|title": "{% for i in range(99999) %}{% if s | title %}{% endif %}{% endfor %}",
    "lipsum": "{{ lipsum(99999, false, 9999, 99999) | length }}",
    "range": "{{ (range(99999) | list) * 999 }}",
    "split": "{% set ns = namespace(l=[]) %}{% for i in range(99) %}{% set ns.l = ns.l + [(s | replace('a', 'b ')).split()] %}"
    "{% endfor %}",
    "rfind": "{% set x = s[100000:] %}{{ s.rfind('b' ~ x) }}",
    "strftime": "{{ strftime_now('%Y' * 999999) }}",
    "raise_exception": "{{ raise_exception([[w] * 999] * 999) }}",
    "comparisons": "{% for i in range(99999) %}{% if s ~ '' == s %}{% endif %}{% endfor %}",
    "in": "{% for i in range(99999) %}{% if 'b' in s %}{% endif %}{% endfor %}",
    "tests": "{% for i in range(99999) %}{% if s is lower %}{% endif %}{% endfor %}",
    "autoescape": "{% autoescape true %}{% set ns = namespace(x='<') %}{% for i in range(30) %}{% set ns.x = (ns.x ~ '') ~ ns.x %}"
    "{% endfor %}{% endautoescape %}",
}
_RUN = r"""
import json, pathlib, re, resource, sys, time
from bonnx.runtime.text.chat import ChatTemplate
from bonnx.errors import BonnxError
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
content = {"s": "a" * 200_000, "w": "b" * 1000, "t": "a\tb\n" * 1000}
given = "".join("{%% set %s = messages[0].%s %%}" % (name, name) for name in content)
message = {"role": "user", "content": "", **content}
for name, source in json.load(sys.stdin).items():
    start = time.process_time()
    try:
        said = "rendered " + ChatTemplate(given + source, {}).render([message])[:80]
    except BonnxError as e:
        said = type(e).__name__ + " " + str(e)[:200]
    # Not getrusage: what it says begins with the peak of the process that started this one.
    peak = int(re.search(r"VmHWM:\s*(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
    print(json.dumps([name, said, peak, time.process_time() - start]), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes():
    """For each attack what came of it, the process's peak of memory so far in bytes, and seconds of computing."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN], input=json.dumps(ATTACKS), capture_output=True, text=True, timeout=500
    )
    found = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
    missing = next((name for name in ATTACKS if name not in found), None)
    assert missing is None, f"{missing}: {done.stderr[-500:]}"
    return found


@pytest.mark.parametrize("name", ATTACKS)
def test_a_template_that_takes_too_much_is_stopped(outcomes, name):
    said, peak, seconds = outcomes[name]
    assert said.startswith("ArtifactError the chat template was stopped: "), said
    assert peak < 500_000_000
    assert seconds < 20


# Every filter and what else is measured, in sizes that templates have.
ORDINARY = r"""
{{ s | center(30) }}{{ s.center(9) }}{{ s.ljust(9, '-') }}{{ s.rjust(9) }}{{ s.zfill(9) }}
{{ 'a\tb'.expandtabs(4) }}{{ s.replace('a', 'bb') }}{{ ', '.join(['a', 'b']) }}{{ 'ab'.translate({97: 'x'}) }}
{{ '{0:>9} {a!r} {0[0]}'.format('ab', a='c') }}{{ '{a}'.format_map({'a': 1}) }}{{ ('{}' | safe).format('<') }}
{{ '%5d %s %(a)s' % {'a': 1} if false else '%5d|%-6s|%.2f|%*d' % (1, 'a', 2.5, 4, 7) }}{{ '%(a)s' % {'a': [1]} }}
{{ (5).to_bytes(2, 'big') }}{{ 'é'.encode() }}{{ 3 ** 5 - 7 // 2 + 7 % 4 * 2 / 4 }}{{ 1.5 ** 2 }}{{ -2 ** -1 }}
{{ [1, 2] * 2 + [3] }}{{ (1,) + (2,) }}{{ s * 2 }}{{ 'a' ~ 1 ~ none ~ [s] }}{{ x is undefined }}{{ x }}{{ s[1:3] }}
{{ s.split('a') }}{{ 'a b c'.rsplit(' ', 1) }}{{ 'a\nb'.splitlines() }}{{ s.rfind('a') }}{{ s.strip('a') }}
{{ range(5) | list }}{{ range(5) | batch(2, 0) | list }}{{ range(5) | slice(2) | list }}{{ s | list }}{{ s | reverse }}
{{ m | groupby('r') | map(attribute='grouper') | join('/') }}{{ m | sum(attribute='n') }}{{ m | map(attribute='n') | sum }}
{{ m | selectattr('n', '>', 1) | list }}{{ m | rejectattr('n', 'eq', 1) | first }}{{ m | map('length') | max }}
{{ m | sort(attribute='n', reverse=true) | last }}{{ [3, 1] | sort }}{{ [1, 1] | unique | list }}{{ {'b': 1} | dictsort }}
{{ s | indent(3, true) }}{{ 'a b c d' | wordwrap(3) }}{{ s | replace('a', 'c', 1) }}{{ s | truncate(3, true, '..', 0) }}
{{ {'a': '<'} | xmlattr }}{{ 'a b&' | urlencode }}{{ {'a': 1} | urlencode }}{{ '<' | e }}{{ '<b>' | striptags }}
{{ 'see http://a.b now' | urlize }}{{ m | pprint }}{{ 2.567 | round(1) }}{{ 2.1 | round(1, 'ceil') }}{{ 'ff' | int(base=16) }}
{{ s | title }}{{ s | capitalize }}{{ s | wordcount }}{{ '%s!' | format(s) }}{{ 1536 | filesizeformat }}{{ s | upper }}
{{ 'a' in s }}{{ 'a' not in ['a'] }}{{ 1 < 2 <= 2 }}{{ s == s }}{{ s is in [s] }}{{ s is lower }}{{ [s, [s]] }}{{ none }}
{% for a in range(6) if a % 2 %}{{ a }}{{ loop.cycle('x', 'y') }}{% else %}none{% endfor %}
{% macro f(x, y=2) %}{{ x }}{{ y }}{{ varargs }}{{ kwargs }}{{ caller() if caller }}{% endmacro %}{{ f(1, 2, 3, z=4) }}
{% call f(s) %}called{% endcall %}{% filter upper %}b{% endfilter %}{% set z %}set {{ s }}{% endset %}{{ z }}
{% for i in [[1, [2]], 3] recursive %}{{ loop(i) if i is iterable else i }}{% endfor %}
{% block c %}block{% endblock %}{{ self.c() }}{% autoescape true %}{{ '<' ~ s }}{{ (s | safe) ~ s }}{% endautoescape %}
{% set n = namespace(a=1) %}{% for i in range(3) %}{% set n.a = n.a + i %}{% endfor %}{{ n.a }}{{ cycler('a', 'b').next() }}
"""


def test_ordinary_templates_render_as_jinja2_renders_them():
    values = {"s": "abcabc <a>", "m": [{"r": "u", "n": 1}, {"r": "a", "n": 2}, {"r": "u", "n": 3}]}
    given = "{% set s, m = messages[0].s, messages[0].m %}"
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    message = {"role": "user", "content": "", **values}
    expected = plain.from_string(given + ORDINARY).render(messages=[message])
    assert ChatTemplate(given + ORDINARY, {}).render([message]) == expected


def test_a_long_conversation_is_no_attack():
    source = "{% for m in messages %}{% if messages | length > loop.index %}{{ '<' + m.role + '>' ~ m.content | trim }}"
    source += "{% endif %}{{ m.content.split('</think>')[-1].strip() | replace('w', 'v') }}{{ m | tojson }}{% endfor %}"
    messages = [{"role": "user", "content": f"word {i} " * 20} for i in range(5000)]
    plain = ImmutableSandboxedEnvironment()
    plain.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    assert ChatTemplate(source, {}).render(messages) == plain.from_string(source).render(messages=messages)
