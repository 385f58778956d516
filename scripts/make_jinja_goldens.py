#!/usr/bin/env python3
"""Write tests/data/text/golden_jinja_extra.jsonl: own templates and expressions in the manner of real
chat templates (ChatML, Llama-3, Gemma, Qwen, DeepSeek, tool schemas), rendered by the real Jinja2 in
Hugging Face's environment. Pinned: Jinja2 3.1.6; another version is refused.
Usage: scripts/make_jinja_goldens.py > tests/data/text/golden_jinja_extra.jsonl"""
import copy
import datetime
import json
import sys

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

if jinja2.__version__ != "3.1.6":
    sys.exit("needs Jinja2 3.1.6, this is " + jinja2.__version__)


class Generation(jinja2.ext.Extension):
    """{% generation %}body{% endgeneration %}: the body, as a caller."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_body", []), [], [], body).set_lineno(line)

    def _body(self, caller):
        return caller()


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


env = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
env.filters["tojson"] = tojson
env.globals["raise_exception"] = raise_exception
env.globals["strftime_now"] = lambda f: datetime.datetime(2025, 1, 15, 13, 45, 30).strftime(f)

TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "Weather \"now\" <b>", "parameters": {
        "type": "object", "required": ["city"],
        "properties": {"city": {"type": "string", "description": "a city"},
                       "days": {"type": ["integer", "null"], "default": 1},
                       "mode": {"type": "string", "enum": ["short", "long"]},
                       "where": {"type": "object", "properties": {"lat": {"type": "number"}}},
                       "tags": {"type": "array", "items": {"type": "string"}}}}}}]
CHAT = [{"role": "system", "content": "  You are Aria.  "}, {"role": "user", "content": "Hi <|im_end|> é"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello!"},
        {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": " two"}]},
        {"role": "assistant", "content": None, "reasoning_content": "why",
         "tool_calls": [{"id": "c1", "type": "function",
                         "function": {"name": "weather", "arguments": {"city": "Lyon", "n": 1.0, "x": [1, None]}}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "{\"t\": 20}"},
        {"role": "tool", "content": "again"}]
V = {"messages": CHAT, "tools": TOOLS, "add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>",
     "none": None, "n": 7, "neg": -3, "f": 2.5, "s": "héllo wörld", "l": [3, 1, 2], "d": {"b": 1, "a": [True, None]},
     "text": "line one\n\n  line two\r\nlast", "big": 12345678901234567890, "tf": True,
     "people": [{"n": "Bo", "a": 3}, {"n": "al", "a": 1}, {"n": "Cy", "a": 3}], "deep": {"x": {"y": [1, {"z": "q"}]}}}

ROWS = []


def row(*sources):
    ROWS.extend(sources)


# ---- whole templates
row('''{% for message in messages %}
{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nDefault<|im_end|>\\n' }}
{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] if message['content'] is string else '?') + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}
''', '''{%- macro text_of(content) -%}
  {%- if content is string -%}{{ content | trim }}
  {%- elif content is iterable and content is not none -%}
    {%- for p in content if p.type == 'text' -%}{{ p.text }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{{- bos_token }}
{%- for m in messages -%}
  {%- set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + text_of(m.content) + '<|eot_id|>' -%}
  {%- if loop.index0 == 0 -%}{%- set content = bos_token + content -%}{%- endif -%}
  {{- content -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}''',
    '''{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}{%- set first_prefix = messages[0]['content'] | trim + '\\n\\n' -%}
    {%- else -%}{%- set first_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}{%- set first_prefix = '' -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for message in loop_messages[:3] -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception("roles must alternate") }}{%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_prefix if loop.first else '') }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception('Invalid content type') }}{%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}''',
    '''{%- set ns = namespace(multi=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi and message.role == "user" and message.content is string and not(message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.multi = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content or '' %}{%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n[' + reasoning.strip() + ']' + content }}
        {%- for tool_call in message.tool_calls %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- message.content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}{{ ns.last }}{{ ns.multi }}''',
    '''{%- macro render_type(p) -%}
{%- if p.type is string -%}{{ p.type }}{%- elif p.type is iterable -%}{{ p.type | join(' | ') }}{%- endif -%}
{%- if p.enum %} ({{ p.enum | map('tojson') | join(', ') }}){% endif -%}
{%- endmacro -%}
{%- macro render_props(props, required, depth=0) -%}
{%- for name, p in props.items() | sort %}
{{ '  ' * depth }}- {{ name }}{{ '' if name in (required or []) else '?' }}: {{ render_type(p) }}
{%- if p.default is defined %} = {{ p.default }}{% endif %}
{%- if p.properties %}{{ render_props(p.properties, none, depth=depth + 1) }}{% endif %}
{%- endfor -%}
{%- endmacro -%}
{% for tool in tools %}{% set f = tool.function %}
## {{ f.name }}: {{ f.description | replace('"', "'") }}
{{- render_props(f.parameters.properties, f.parameters.required) }}
{% endfor %}{{ tools | tojson(indent=2) }}''',
    '''{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set inner = 1 %}{{ m.content }}|{% endgeneration %}{% endif %}{% endfor %}{{ inner is defined }}''',
    '''{% set ns = namespace(is_first=false, is_tool=false, system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<User>' ~ message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is none %}{%- set ns.is_tool = false -%}{%- for tool in message['tool_calls']%}{%- if not ns.is_first %}{{'<calls>' + tool['type'] + '<sep>' + tool['function']['name'] + '\\n' + '```json' + '\\n' + tool['function']['arguments']|tojson + '\\n' + '```' + '<end>'}}{%- set ns.is_first = true -%}{%- endif %}{%- endfor %}{%- endif %}{%- endfor -%}''',
    '''{% for a in deep.x.y recursive %}{{ loop.depth }}{{ a if a is number else loop([a.z]) if a is mapping else '<' ~ a ~ '>' }};{% endfor %}''',
    '''{% macro wrap(tag) %}<{{ tag }}>{{ caller('x') }}</{{ tag }}>{% endmacro %}{% call(v) wrap('b') %}in {{ v }} {{ n }}{% endcall %}''',
    '''{% for k, v in d|dictsort %}{{ k }}={{ v }}{{ "," if not loop.last }}{% endfor %}
  {#- gone -#}
  x
{%- filter upper | trim %}  abc {{ s }} {% endfilter %}
{% with q = n, r = 2 %}{{ q * r }}{% endwith %}|{{ q }}''',
    '''{% set x %}
  {{ s }}
{% endset %}[{{ x }}]{% set y | trim | upper %}  q {% endset %}[{{ y }}]''',
    '''{% if n > 5 -%}
   big
{%- elif n > 3 %}
mid
{% else %}small{% endif %}
{%- for i in range(3) %}
  {%- if i == 1 %}{% continue %}{% endif %} {{ i }}
{%- endfor %}''')

# ---- expressions
row("{{ people|groupby('a')|list }}", "{% for a, b in people|groupby('a') %}{{ a }}:{{ b|map(attribute='n')|join('+') }} {% endfor %}",
    "{% for g in people|groupby('n') %}{{ g.grouper }}{{ g.list|length }}{% endfor %}",
    "{{ people|sort(attribute='a,n')|map(attribute='n')|list }}", "{{ people|sort(attribute='n', reverse=true)|map(attribute='n')|list }}",
    "{{ people|sum(attribute='a') }}", "{{ people|map(attribute='a')|unique|list }}", "{{ people|max(attribute='a') }}", "{{ people|min(attribute='n') }}",
    "{{ people|selectattr('a', 'gt', 2)|map(attribute='n')|join }}", "{{ people|rejectattr('a', 'eq', 3)|list }}",
    "{{ l|sort|string }}", "{{ l|slice(2)|list }}", "{{ l|batch(2, 0)|list }}", "{{ (l|map('string')|list)|join('.') }}", "{{ l|map('default', 1)|list }}",
    "{{ l|select('odd')|list|length }}", "{{ l|map('nosuch')|list }}", "{{ l|select('nosuch')|list }}", "{{ l|map(bad=1)|list }}",
    "{{ text|indent }}", "{{ text|indent(2, true) }}", "{{ text|indent(3, blank=true) }}", "{{ text|indent('> ', first=True) }}", "{{ text.splitlines() }}", "{{ text.splitlines(true) }}",
    "{{ s|truncate(8) }}", "{{ s|truncate(5, true, '..', 0) }}", "{{ s|center(21) }}|", "{{ s.center(20, '*') }}", "{{ s.ljust(13, '.') }}{{ s.rjust(13) }}", "{{ 'ab'.zfill(5) }}{{ '-4'.zfill(4) }}",
    "{{ s|urlencode }}", "{{ {'a b': 'c&d'}|urlencode }}", "{{ s|wordcount }}", "{{ s|capitalize }}{{ s|title }}{{ s.title() }}", "{{ \"it's o'clock\".title() }} {{ \"it's o'clock\"|title }}",
    "{{ 'AbC'.swapcase() }}", "{{ 'ΑΣ'.lower() }}", "{{ 'ﬁn'.upper() }} {{ 'ǆ'.title() }}", "{{ 'a,b,,c'.rsplit(',', 1) }}", "{{ ' a b  c '.rsplit(none, 1) }}", "{{ ' a b  c '.split(none, 1) }}",
    "{{ 'x=y=z'.rpartition('=') }}{{ 'q'.partition('=') }}", "{{ 'abcabc'.rfind('c') }}{{ 'abcabc'.find('c', 3) }}{{ 'abc'.index('b') }}", "{{ 'abc'.index('z') }}", "{{ 'aXbX'.count('X') }}",
    "{{ 'prefix-x'.removeprefix('prefix-') }}{{ 'x.py'.removesuffix('.py') }}", "{{ 'abc'.startswith('b', 1) }}{{ 'abc'.endswith('b', 0, 2) }}", "{{ 'abc'.startswith(1) }}",
    "{{ 'a'.isalpha() }}{{ 'a1'.isalnum() }}{{ '٣'.isdigit() }}{{ ' '.isspace() }}{{ 'A'.isupper() }}{{ ''.isalpha() }}", "{{ '-'.join(l) }}", "{{ ''.join(['a', 'b']) }}",
    "{{ '%5.2f|%-5s|%05d|%x|%+d|%e|%%' % (f, 'ab', neg, 255, 3, 12345.678) }}", "{{ '%(a)s %(b)05d' % {'a': 1, 'b': 2} }}", "{{ '%s' % l }}", "{{ '%d' % 'x' }}", "{{ '%s %s' % 'x' }}", "{{ '%s' % (1, 2) }}", "{{ '%r' % 'x' }}",
    "{{ '{0} {1} {0}'.format(1, 'b') }}", "{{ '{a}-{b:>5}|{c:.2f}|{d:05d}|{e:,}'.format(a=1, b='x', c=1.5, d=42, e=1234567) }}", "{{ '{{}} {!r}'.format('q') }}", "{{ '{:^7}|{:<4}|{:*>4}'.format('ab', 1, 2) }}", "{{ '{}'.format() }}", "{{ '{x[0]}'.format(x=l) }}",
    "{{ 7 // 2.0 }}{{ -7 // 2 }}{{ -7.5 % 2 }}{{ 7 % -3.0 }}", "{{ 2 ** -1 }}{{ 2 ** 0.5 }}{{ 2 ** 62 }}", "{{ 1 // 0 }}", "{{ 1 % 0 }}", "{{ 1.0 / 0 }}", "{{ 1.0 // 0 }}", "{{ 1.0 % 0 }}",
    "{{ 5 is divisibleby 0 }}", "{{ -5 % 3 }}{{ 5 - -3 }}{{ +n }}{{ --n }}{{ not n }}", "{{ 1 - 'a' }}", "{{ 'a' * 'b' }}", "{{ 'ab' * -1 }}|{{ 2 * [1] }}{{ (1,) * 2 }}", "{{ [1] + (2,) }}", "{{ none + 1 }}", "{{ {} + {} }}", "{{ l - 1 }}", "{{ -s }}", "{{ 2 ** s }}",
    "{{ 1e308 * 10 }}{{ -1e308 * 10 }}", "{{ 0.1 + 0.7 }}{{ 1e22 }}{{ 1.5e-7 }}{{ 123456789.123 }}{{ 5e-324 }}", "{{ 1.0 == 1 }}{{ true == 1 }}{{ 1 < 1.5 }}{{ 'a' < 'b' < 'c' }}{{ [1, 2] < [1, 3] }}{{ (1,) < (1, 2) }}", "{{ [1] < ['a'] }}", "{{ {} < {} }}", "{{ none < 1 }}", "{{ 2 > 'a' }}", "{{ 2 >= none }}",
    "{{ 2.675|round(2) }}{{ 0.5|round }}{{ 1.5|round|int }}{{ 1234.5|round(-2) }}{{ 7|round }}{{ 2.1|round(0, 'ceil') }}{{ 2.19|round(1, 'floor') }}", "{{ 'x'|round }}",
    "{{ '0x1F'|int(0, 16) }}{{ '12abc'|int }}{{ ' 42 '|int }}{{ '1_000'|int }}{{ '1e3'|int }}{{ none|int }}{{ l|int(9) }}", "{{ 'nan'|float }}{{ '-inf'|float }}{{ '1e5'|float }}{{ none|float(2) }}", "{{ true|int }}{{ tf + tf }}{{ tf ~ none }}",
    "{{ big }}{{ big == big }}{{ big|string|length }}{{ big is integer }}", "{{ [big]|tojson }}",
    "{{ d }}{{ d|tojson }}{{ d|string }}{{ d.a[0] }}{{ d['a'][1] is none }}", "{{ d.items() }}{{ d.keys() }}{{ d.values() }}", "{{ d.items()|list }}{{ d|items|list|length }}", "{{ d.items()|length }}", "{{ d|items|length }}", "{{ (d|items) is sequence }}{{ d.items() is sequence }}{{ d is sequence }}{{ range(3) is sequence }}",
    "{{ range(3) }}{{ range(1, 9, 2) }}{{ range(3)|list }}{{ range(5)[1] }}{{ range(5)[-1] }}{{ 3 in range(5) }}", "{{ range(0, 5, 0) }}", "{{ range('a') }}", "{{ range() }}",
    "{{ l[5] is undefined }}{{ l[-1] }}{{ l['x'] is undefined }}{{ l[1:2][0] }}", "{{ l[5].x }}", "{{ l[5] + 1 }}", "{{ d.zz.yy }}", "{{ d['zz']['yy'] }}", "{{ none.x.y }}", "{{ n.x.y }}", "{{ missing.x }}", "{{ missing[0] }}", "{{ missing() }}", "{{ missing|tojson }}", "{{ missing + 'x' }}", "{{ 'x' + missing }}", "{{ missing|upper }}|{{ missing|join }}|{{ missing|list }}|{{ missing|length }}", "{{ missing|first }}", "{{ -missing }}", "{{ missing < 1 }}", "{{ missing == missing2 }}{{ missing != 1 }}", "{{ missing is iterable }}{{ missing is sequence }}{{ missing is mapping }}{{ missing is callable }}",
    "{{ l.sort() }}", "{{ d.setdefault('q', 1) }}", "{{ l.copy() }}{{ d.copy() }}{{ l.count(1) }}{{ l.index(1) }}", "{{ l.index(9) }}", "{{ s.nope is undefined }}", "{{ s.__init__ is undefined }}", "{{ d._x is undefined }}{{ d.__class__ }}", "{{ d.__class__() }}",
    "{{ 'a' in d }}{{ 'b' not in d }}{{ 1 in l }}{{ [] in [[]] }}{{ 'el' in 'hello' }}{{ none in [none] }}", "{{ 1 in 5 }}", "{{ l in d }}", "{{ {[1]: 2} }}", "{{ {1: 'a', 1.0: 'b', true: 'c'} }}", "{{ {'a': 1, 'a': 2} }}", "{{ d[l] is undefined }}",
    "{{ (1, 2) == (1, 2) }}{{ (1, 2) == [1, 2] }}{{ [1, 2.0] == [1.0, 2] }}", "{{ {'a': 1, 'b': [1]} == {'b': [1], 'a': true} }}", "{{ deep == {'x': {'y': [1, {'z': 'q'}]}} }}",
    "{{ cycler('a', 'b').current }}", "{% set c = cycler(1, 2) %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{{ c.reset() }}{{ c.current }}", "{% set j = joiner('|') %}{% for i in l %}{{ j() }}{{ i }}{% endfor %}", "{% set ns = namespace(a=1) %}{% set ns.b = 2 %}{{ ns.a + ns.b }}{{ ns.c is defined }}{{ ns['a'] }}", "{% set d.x = 1 %}", "{% set nope.x = 1 %}", "{{ ns.x }}", "{% set ns = namespace(x=1) %}{{ ns }}",
    "{{ dict(a=1, **d) }}", "{{ dict([['x', 1]], y=2) }}", "{{ dict(1) }}", "{{ dict(['abc']) }}", "{% macro f(a, b=a) %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}{{ f(*[1, 2]) }}{{ f(**{'a': 3}) }}", "{% macro f(a) %}{{ a.x }}{% endmacro %}{{ f() }}", "{% macro f(a) %}{% endmacro %}{{ f(z=1) }}", "{% macro f() %}{{ caller is defined }}{% endmacro %}{{ f() }}", "{% macro f() %}{{ caller() }}{% endmacro %}{{ f() }}", "{% macro f(a, b) %}{{ varargs|length }}{{ kwargs|tojson }}{% endmacro %}{{ f(1, 2, 3, c=4) }}", "{{ f }}{% macro f() %}{% endmacro %}{{ f.name }}",
    "{% for x in l %}{% set n = n + x %}{{ n }} {% endfor %}{{ n }}", "{% for x in l %}{% if loop.first %}{% set z = 1 %}{% endif %}{{ z is defined }}{% endfor %}", "{% for x in l %}{% for y in l %}{{ loop.index }}{% endfor %}{{ loop.index }}{% endfor %}", "{% for a, b in [(1, 2, 3)] %}{% endfor %}", "{% for a, b in [(1,)] %}{% endfor %}", "{% for a, b in l %}{% endfor %}", "{% for (a, b), c in [((1, 2), 3)] %}{{ a }}{{ b }}{{ c }}{% endfor %}", "{% for x in n %}{% endfor %}", "{% for x in l if x > 1 %}{{ x }}{% if loop.last %}!{% endif %}{% else %}none{% endfor %}", "{% for x in l if x > 9 %}{{ x }}{% else %}none{% endfor %}", "{% for x in l %}{{ loop.previtem|default('-') }}{{ loop.nextitem is defined }}{{ loop.revindex }} {% endfor %}", "{% for x in 'aé' %}{{ x }}{{ loop.length }}{% endfor %}", "{% for x in d %}{{ x }}{% endfor %}", "{{ loop is defined }}", "{% for x in l %}{{ loop }}{% break %}{% endfor %}", "{% for i in [1, 1, 2] %}{{ loop.changed(i) }}{% endfor %}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set (c, e) = (3, 4) %}{{ c }}{{ e }}", "{% set x = 1, 2 %}{{ x }}", "{% set a, b = 1 %}", "{{ (1, 2)[0] }}{{ [1, 2][::-1] }}{{ 'héllo'[1:-1:2] }}{{ 'abc'[5:] }}|{{ 'abc'[-2:] }}{{ l[:none] }}", "{{ l[::0] }}", "{{ d[1:] is undefined }}", "{{ l['a':] is undefined }}",
    "{{ 'a' if false }}|{{ ('a' if false) is undefined }}", "{{ ('a' if false).x }}", "{{ (1 if tf else 2) ~ (3 if not tf else 4) }}", "{{ [1, 2, ] }}{{ (1, ) }}{{ {'a': 1, } }}", "{{ 'a' 'b' \"c\" }}", "{{ '\\u00e9\\x41\\n\\t\\\\\\'\\101\\q' }}", "{{ 0x10 + 0b11 + 0o7 + 1_0 }}", "{{ 1.5e3 }}{{ 1E2 }}{{ 1_0.5 }}", "{{ -1 ** 2 }}{{ 2 ** 3 ** 2 }}", "{{ 1 < 2 == true }}", "{{ not 1 == 2 and not none }}", "{{ n is number and s is string or false }}", "{{ s is not number }}{{ not s is number }}", "{{ 3 is in [1, 3] }}{{ 3 is in([1]) }}", "{{ n is gt 5 }}{{ n is ge(7) }}{{ n is lt 3 }}{{ n is le 7 }}{{ n is ne 7 }}", "{{ s is sameas s }}{{ none is sameas none }}{{ 1 is sameas true }}", "{{ 'x' is lower }}{{ 'X' is upper }}{{ 'upper' is filter }}{{ 'odd' is test }}", "{{ n is defined is defined }}", "{{ 'a'|e is escaped }}{{ '<'|e|e }}{{ ('<'|safe)|e }}{{ '<'|forceescape|forceescape }}", "{{ ('<b>'|safe) + '&' }}{{ '&' + ('<b>'|safe) }}", "{{ d|attr('items') is callable }}{{ d|attr('b') is undefined }}",
    "{{ l|first }}{{ l|last }}{{ []|first is undefined }}{{ []|last is undefined }}{{ 'abc'|last }}", "{{ l|reverse|list }}{{ 'abc'|reverse }}", "{{ (l|random) in l }}", "{{ l|tojson(indent=none) }}{{ {}|tojson(indent=2) }}{{ [[], {}]|tojson(indent=1) }}", "{{ d|tojson(sort_keys=true, separators=[',', ':']) }}", "{{ d|tojson(indent='\\t') }}", "{{ 'é\\u2028\\x7f'|tojson(ensure_ascii=true) }}", "{{ {(1, 2): 3}|tojson }}", "{{ range(3)|tojson }}", "{{ (l|map('string'))|tojson }}", "{{ 1e16|tojson }}",
    "{{ strftime_now('%d %B %Y') }}{{ strftime_now('%-d/%m %H:%M %p %a %%') }}", "{{ raise_exception('no: ' + s) }}", "{{ raise_exception(1) }}", "{{ lipsum is defined }}", "{{ s.upper() }}", "{{ s() }}", "{{ l() }}", "{{ 1() }}", "{{ d.b() }}", "{{ s|upper|nofilter }}", "{% if false %}{{ s|nofilter }}{% endif %}ok", "{% if true %}{{ s|nofilter }}{% endif %}", "{% if true %}{{ s is notest }}{% endif %}", "{% for x in l %}", "{% if n %}a{% endfor %}", "{% if n %}{% else %}{% elif %}", "{% macro f( %}", "{% set %}", "{% set 1 = 2 %}", "{% set true = 2 %}", "{{ a b }}", "{{ a. }}", "{{ a[ }}", "{{ (1 }}", "{{ ] }}", "{{ 'a' | }}", "{{ f(a=1, 2) }}", "{{ f(**a, b=1) }}", "{{ 1 ! 2 }}", "{{ $ }}", "{% raw %}{{ x }}", "{# open", "{{ 'x", "{% endmacro %}", "{% for x in l %}{% endif %}", "{% else %}", "{{ x is }}", "{% call f %}{% endcall %}", "{% macro f(a=1, b) %}{% endmacro %}", "{% elif x %}", "{{ loop.x }}", "{{ {1 2} }}",
    "a{%- if tf -%}\n b \n{%- endif -%}\n c", "{% if tf %}\n\n  x\n{% endif %}\n\ny\n\n", "  {%- set q = 1 -%}  z", "{{ 1 }}\n\n{{ 2 }}", "\n{% set q = 1 %}\n\n{{ q }}\n", "  {% raw %} {% x %} {% endraw %}\n y", "{%- raw %}\n a\n{%- endraw %} b", "x\r\n{% if tf %}\r\n y\r\n{% endif %}\r\n", "{%+ if tf %}a{%+ endif %} ", "{% if tf -%}  a  {%- endif +%}\nb", "{#- c +#}\nb", "{{- 1 -}} 2", "é {% if tf %}ü{% endif %}", "\u00a0{%- if tf -%}\u2003x{%- endif -%}\u00a0")

print(json.dumps({"variables": V}, ensure_ascii=False))
for source in ROWS:
    try:
        result = {"out": env.from_string(source).render(**copy.deepcopy(V))}
    except Exception as error:  # noqa: BLE001: whatever Python raises is the golden
        result = {"error": type(error).__name__, "message": str(error)[:200]}
    print(json.dumps({"src": source, **result}, ensure_ascii=False))
