"""Chat templates, held against transformers' own rendering; untrusted templates that misbehave."""

import subprocess
import sys
import threading
from datetime import datetime

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from bonnx.errors import ArtifactError, InputError
from bonnx.runtime.text.chat import ChatTemplate, is_messages

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}

# The shapes of templates that reward models come with, written for these tests.
HEADERS = """{{- bos_token }}
{%- for m in messages %}
    {{- '<|head|>' + m['role'] + '<|/head|>\\n\\n' + (m['content'] | trim) + '<|turn|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|/head|>\\n\\n' }}
{%- endif %}
"""
DEFAULT_SYSTEM = """{% for m in messages %}{% if loop.first and m.role != 'system' %}
<|start|>system
You help & <listen>.<|stop|>
{% endif %}
<|start|>{{ m.role }}
{{ m.content }}<|stop|>{{ '\\n' }}
{%- endfor %}
  {% if add_generation_prompt %}<|start|>assistant
{% endif %}
"""
ALTERNATING = """{{ bos_token }}{% set rest = messages %}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role is not supported') }}{% endif %}
{%- for m in messages -%}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Roles must alternate user/assistant, found ' ~ m['role']) }}
    {%- endif -%}
    {%- if m['role'] == 'user' %} [ASK] {{ m['content'] }} [/ASK]
    {%- else %}{{ ' ' + m['content'].strip() + eos_token }}{% endif -%}
{% endfor %}"""
THINKING = """{%- set ns = namespace(last=-1, tools=false) %}
{%- for m in messages[::-1] %}
    {%- set i = messages|length - 1 - loop.index0 %}
    {%- if m.role == "user" and ns.last < 0 and m.content is string %}{% set ns.last = i %}{% endif %}
    {%- if m.role == "skip" %}{% continue %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else m.content | map(attribute='text') | join('|') %}
    {%- if m.role == "assistant" %}
        {%- set thought = m.reasoning_content | default('') %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
        {%- endif %}
        {%- generation %}{{- content }}{% endgeneration %}{{- '<|/im|>\\n' }}
    {%- else %}
        {{- '<|im|>' + m.role + '\\n' + content + '<|/im|>' + '\\n' }}
    {%- endif %}
    {%- if loop.index0 > 50 %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im|>assistant\\n' }}{% endif %}
"""
FILTERS = """{% macro one(m, mark='*') %}{{ mark }}{{ m | tojson }}{{ m.extra | default(none) | tojson(indent=2) }}
{%- endmacro -%}
{{ strftime_now('%Y') }}{{ image_token }}{{ unk_token }}{{ tools is none }}{{ documents is none }}
{%- for m in messages %}{{ one(m) if loop.index is odd else one(m, '-') | upper }}{% endfor %}
{{ dict(a=messages|length).a * 3 }}{{ messages | groupby('role') | map('first') | join(',') }}
{{ (messages | selectattr('role', 'equalto', 'user') | list | length) ** 2 }}{{ '=' * 3 }}
{{ dict.fromkeys('ab', 0) }}"""
TEMPLATES = [HEADERS, DEFAULT_SYSTEM, ALTERNATING, THINKING, FILTERS]
TAKE_TEXT = [HEADERS, DEFAULT_SYSTEM, ALTERNATING]


def as_text(conversation):
    """The same, with content in parts joined."""
    texts = [
        "".join(p["text"] for p in m["content"]) if isinstance(m["content"], list) else m["content"]
        for m in conversation
    ]
    return [m | {"content": text} for m, text in zip(conversation, texts, strict=True)]


texts = st.text(max_size=12) | st.sampled_from(
    ["  a b\n", "<think>\nx\n</think>\n\ny", "</think>", "<|im|>", "{{ bos_token }}", "é🎉\r\n"]
)
parts = st.lists(st.builds(lambda t: {"type": "text", "text": t}, texts), max_size=2)
extras = st.dictionaries(
    st.sampled_from(["extra", "name", "reasoning_content", "thinking", "tool_calls"]),
    st.none() | texts | st.lists(st.integers() | st.floats(allow_nan=False) | st.booleans(), max_size=2),
    max_size=2,
)
messages = st.builds(
    lambda role, content, extra: {"role": role, **extra, "content": content},
    st.sampled_from(["user", "assistant", "system", "tool"]),
    texts | parts,
    extras,
)
alternating = st.lists(texts, min_size=1, max_size=5).map(
    lambda ts: [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(ts)]
)
conversations = st.lists(messages, min_size=1, max_size=5) | alternating


@pytest.fixture(scope="module")
def theirs():
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<s>": 1, "</s>": 2, "<image>": 3}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=core, **TOKENS)


@pytest.mark.parametrize("source", TEMPLATES)
@settings(deadline=None, max_examples=40)
@given(conversation=conversations, prompted=st.booleans())
def test_renders_as_transformers_does_or_refuses_with_it(theirs, source, conversation, prompted):
    template = ChatTemplate(source, TOKENS)
    try:
        expected = theirs.apply_chat_template(  # which writes parts as Python shows them where a text is expected
            as_text(conversation) if source in TAKE_TEXT else conversation,
            chat_template=source,
            tokenize=False,
            add_generation_prompt=prompted,
        )
    except Exception:
        with pytest.raises(InputError):
            template.render(conversation, add_generation_prompt=prompted)
    else:
        assert template.render(conversation, add_generation_prompt=prompted) == expected


def test_each_template_accepts_a_plain_conversation(theirs):
    conversation = [{"role": ("user", "assistant")[i % 2], "content": f"say {i}"} for i in range(3)]
    for source in TEMPLATES:
        expected = theirs.apply_chat_template(conversation, chat_template=source, tokenize=False)
        assert "say 2" in expected
        assert ChatTemplate(source, TOKENS).render(conversation) == expected


def test_a_refusal_carries_the_words_of_the_template():
    with pytest.raises(InputError, match="refuses these messages: System role is not supported"):
        ChatTemplate(ALTERNATING, TOKENS).render([{"role": "system", "content": "x"}])


@settings(deadline=None, max_examples=30)
@given(prompt=conversations, words=st.lists(texts, min_size=1, max_size=3))
def test_where_the_candidate_begins(prompt, words):
    for source in (HEADERS, DEFAULT_SYSTEM, THINKING):
        template = ChatTemplate(source, TOKENS)
        try:
            head = template.render(prompt, add_generation_prompt=True)
        except InputError:
            continue
        for word, (whole, start, _) in zip(words, template.split(prompt, words, words), strict=True):
            assert whole == template.render([*prompt, {"role": "assistant", "content": word}])
            assert whole[:start] == head[:start]
            assert start == len(head) or whole[start : start + 1] != head[start : start + 1]
    # Headers never look back: the prompt's own rendering is always where its words begin.
    template = ChatTemplate(HEADERS, TOKENS)
    plain = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]
    for word, (whole, start, _) in zip(words, template.split(plain, words, words), strict=True):
        assert whole[start:] == word.strip() + "<|turn|>"


def test_a_template_that_rewrites_the_past_parts_where_the_texts_do():
    prompt = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>t</think>a"}]
    template = ChatTemplate(THINKING, TOKENS)
    own = [{"role": "user", "content": "again"}, {"role": "assistant", "content": "b"}]
    ((whole, start, _),) = template.split(prompt, [own], ["own"])
    assert whole == template.render([*prompt, *own])
    head = template.render(prompt, add_generation_prompt=True)
    assert not whole.startswith(head)
    assert whole[:start] == head[:start] == "<|im|>user\nq<|/im|>\n<|im|>assistant\n"
    assert whole[start] != head[start]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{% set x = messages.append(1) %}{{ x }}", "SecurityError"),
        ("{% set x = messages[0].update(role='x') %}{{ x }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__['os'] }}", "SecurityError"),
        ("{{ (messages|attr('__class__')).x }}", "SecurityError"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "cannot hold '_x'"),
        ("{{ namespace(_x=1) }}", "cannot hold '_x'"),
        ("{{ range(10**9) }}", "Range too big"),
        ("{{ 'a' * 10**12 }}", r"a result of `\*`"),
        ("{{ [1] * (messages|length * 10**12) }}", r"a result of `\*`"),
        ("{{ 7 ** 10**9 }}{{ 7 ** (10**9) }}", r"a result of `\*\*`"),
        ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "turns of its loops"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}",
            "was stopped",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "more than 10000000 characters"),
    ],
)
def test_a_template_that_misbehaves_is_stopped(source, message):
    with pytest.raises(ArtifactError, match=message):
        ChatTemplate(source, TOKENS).render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("source", ["{% for x %}", "{{ 'a' | nothing }}", "a\n{% endif %}", "{{ 1" + "+ (1" * 3000])
def test_what_is_no_template_is_refused_when_it_is_read(source):
    with pytest.raises(ArtifactError, match="chat template"):
        ChatTemplate(source, TOKENS)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "not empty"),
        ("hello", "expected a list"),
        (["hello"], r"messages\[0\]: expected"),
        ([{"content": "x"}], "'role' must be a text"),
        ([{"role": 3, "content": "x"}], "'role' must be a text"),
        ([{"role": "user"}], "there is no 'content'"),
        ([{"role": "user", "content": None}], "there is no 'content'"),
        ([{"role": "user", "content": 3}], "'content' must be a text"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], r"\['content'\]\[0\].*only text"),
        ([{"role": "user", "content": "x", "extra": object()}], "plain JSON values; got object <object"),
        ([{"role": "user", "content": "x", 3: "y"}], "keys must be texts"),
    ],
)
def test_malformed_messages(messages, message):
    with pytest.raises(InputError, match=message):
        ChatTemplate(HEADERS, TOKENS).render(messages)


def test_messages_nested_without_end():
    endless = {"role": "user", "content": "x"}
    endless["extra"] = endless
    with pytest.raises(InputError, match="nested"):
        ChatTemplate(HEADERS, TOKENS).render([endless])


def test_all_renderings_of_a_split_see_one_time(monkeypatch):
    template = ChatTemplate("{{ strftime_now('%f') }}{{ messages[-1].content }}", TOKENS)
    before = datetime.now().strftime("%f")
    results = template.split([{"role": "user", "content": ""}], *[[str(i) for i in range(50)]] * 2)
    assert len({whole[:6] for whole, *_ in results}) == 1
    assert [start for _, start, _ in results] == [6] * 50, before


def test_threads_share_a_template():
    template = ChatTemplate(DEFAULT_SYSTEM, TOKENS)
    found = {}

    def work(i):
        found[i] = [template.render([{"role": "user", "content": f"{i}"}]) for _ in range(50)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(set(found[i]) == {template.render([{"role": "user", "content": f"{i}"}])} for i in range(8))


def test_what_counts_as_messages():
    assert is_messages([{"role": "user", "content": "x"}])
    assert not any(is_messages(other) for other in ("x", [], [1, 2], ["x"], {"role": "user"}, None))


def test_jinja2_is_imported_by_templates_only():
    code = """
import sys
sys.modules["jinja2"] = None
import bonnx
from bonnx.runtime.text.chat import ChatTemplate
try:
    ChatTemplate("x", {})
except bonnx.BonnxError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "run `pip install jinja2`" in done.stdout
