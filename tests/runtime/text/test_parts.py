"""Content in parts, as a text or as parts: what published templates take. The reference is transformers, with the plain
text where a template takes one: it writes parts as Python shows them there, or nothing."""

import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from bonnx.errors import InputError
from bonnx.runtime.text.chat import ChatTemplate

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}

# How published templates write the content of a message `m`.
SHAPES = {
    "chatml": "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}",
    "llama 3": "{% set c = m['role'] + '\\n\\n' + m['content'] | trim + '<|eot|>' %}{{ c }}",
    "phi": "{{ '<|' ~ m.role ~ '|>' ~ m.content ~ '<|end|>' }}",
    "phi written out": "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n",
    "gemma": "{{ '<turn>' + m.role + '\\n' + (m['content'] | trim) + '</turn>\\n' }}",
    "mistral": "{% if m.role == 'user' %}{{ '[INST] ' + m.content.strip() + ' [/INST]' }}{% else %}"
    "{{ m.content + eos_token }}{% endif %}",
    "deepseek": "{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m['content'] }}"
    "{% endif %}",
    "formats": "{{ '%s: %s' | format(m.role, m.content) }}{{ '%s' % m.content }}{{ '{} {:}'.format(1, m.content) }}",
    "joins": "{{ [m.role, m.content] | join(': ') }}{{ m.content | string | length }}{{ m.content | e }}",
    "replaces": "{{ m.content | replace('a', 'b') }}{{ m.content | indent(2) }}{{ m.content[:9] }}",
    "texts only": "{% if m.content is string %}{{ m.content }}{% endif %}",
    "refuses parts": "{% if m.content is not string %}{{ raise_exception('texts only') }}{% endif %}{{ m.content }}",
    "each part": "{% for p in m.content %}{{ p }}{% endfor %}",
}
EACH = "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}PART{% endfor %}{% endif %}"
ITERATES = {
    "llama 3.2": EACH.replace(
        "PART", "{% if p.type == 'image' %}<i>{% elif p['type'] == 'text' %}{{ p['text'] }}{% endif %},"
    ),
    "qwen 2 vl": EACH.replace("PART", "{% if 'text' in p %}|{{ p.text }}{% endif %}"),
    "gemma 3": EACH.replace("PART", "{% if p['type'] == 'text' %}{{ p['text'] | trim }}{% endif %}"),
    "filters": "{{ m.content if m.content is string else m.content | selectattr('type', 'equalto', 'text') | "
    "map(attribute='text') | join('+') }}",
    "json": "{{ m | tojson }}",
    "indented": "{{ m.content | tojson(indent=1) }}",
}
READS_ONE = {
    "first": "{{ m.content if m.content is string else m.content[0].text }}",
    "last": "{{ m.content if m.content is string else (m.content | last).text }}",
    "first of a filter": "{{ m.content if m.content is string else (m.content | first).text }}",
    "no text": "{{ m.content[0].text }}|{{ m.content[0]['type'] }}",
}
SPOKEN = [
    {"role": "system", "content": [{"type": "text", "text": " Think & "}, {"type": "text", "text": "answer."}]},
    {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "6 * 7? "}]},
    {"role": "assistant", "content": "It is 42."},
    {"role": "user", "content": [{"type": "text", "text": "<think>a</think>And 7 * 8?"}]},
]


@pytest.fixture(scope="module")
def theirs():
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<s>": 1, "</s>": 2, "<image>": 3}, unk_token="a"))
    return PreTrainedTokenizerFast(tokenizer_object=core, **TOKENS)


def as_text(conversation):
    """The same, with content in parts joined."""
    contents = [m.get("content") for m in conversation]
    texts = ["".join(p["text"] for p in c) if isinstance(c, list) else c for c in contents]
    return [m | {"content": text} for m, text in zip(conversation, texts, strict=True)]


def rendered(theirs, source, conversation):
    return theirs.apply_chat_template(conversation, chat_template=source, tokenize=False)


@pytest.mark.parametrize("shape", SHAPES)
def test_parts_are_joined_where_a_template_takes_a_text(theirs, shape):
    source = "{{ bos_token }}{% for m in messages %}" + SHAPES[shape] + "{% endfor %}"
    ours = ChatTemplate(source, TOKENS)
    for conversation in (SPOKEN, SPOKEN[1:], SPOKEN[:1]):
        assert ours.render(conversation) == rendered(theirs, source, as_text(conversation))


@pytest.mark.parametrize("shape", ITERATES)
def test_parts_stay_where_a_template_reads_them(theirs, shape):
    source = "{% for m in messages %}" + ITERATES[shape] + "{% endfor %}"
    for conversation in (SPOKEN, as_text(SPOKEN)):
        assert ChatTemplate(source, TOKENS).render(conversation) == rendered(theirs, source, conversation)


@pytest.mark.parametrize("shape", READS_ONE)
def test_a_template_that_reads_one_part_gets_all_words_in_it(theirs, shape):
    source = "{% for m in messages %}" + READS_ONE[shape] + "{% endfor %}"
    one = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in as_text(SPOKEN)]
    # transformers loses the words of the other parts.
    assert rendered(theirs, source, SPOKEN[:1]) != rendered(theirs, source, one[:1])
    assert ChatTemplate(source, TOKENS).render(SPOKEN) == rendered(theirs, source, one)


def test_a_template_may_take_a_text_from_one_role_and_parts_from_another(theirs):
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}" + SHAPES["llama 3"] + "{% else %}" + ITERATES["llama 3.2"]
    )
    source += "{% endif %}{% endfor %}"
    mixed = [*as_text(SPOKEN[:1]), *SPOKEN[1:]]
    assert ChatTemplate(source, TOKENS).render(SPOKEN) == rendered(theirs, source, mixed)


def test_a_text_is_one_part_where_a_template_takes_parts_only(theirs):
    source = (
        "{% for m in messages %}{{ m.role }}: {% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] }}"
    )
    source += "{% endif %}{% endfor %}\n{% endfor %}"
    parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in as_text(SPOKEN)]
    assert "6 * 7" not in rendered(theirs, source, as_text(SPOKEN))  # transformers loses the words
    assert ChatTemplate(source, TOKENS).render(as_text(SPOKEN)) == rendered(theirs, source, parts)
    ((whole, start, stop),) = ChatTemplate(source, TOKENS).split(as_text(SPOKEN[:2]), ["It is 42."], ["candidates[0]"])
    assert whole[start:stop] == "assistant: It is 42."


def test_the_words_of_a_candidate_in_parts_are_those_of_a_text():
    template = ChatTemplate("{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}", TOKENS)
    own = [{"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "42."}]}]
    given = template.split(SPOKEN[:2], [own, as_text(own), "It is 42."], ["a", "b", "c"])
    assert given[0] == given[1] == given[2]


CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
TOOLS = """{% for m in messages %}<|{{ m.role }}|>{% if m.content %}{{ m.content }}{% endif %}
{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments | tojson }}</call>
{% endfor %}<|end|>{% endfor %}"""
CALLED = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "tool_calls": CALLS},
    {"role": "tool", "content": [{"type": "text", "text": "2"}]},
    {"role": "assistant", "content": None, "tool_calls": CALLS},
]


def test_tool_calls_need_no_content(theirs):
    template = ChatTemplate(TOOLS, TOKENS)
    assert template.render(CALLED) == rendered(theirs, TOOLS, as_text(CALLED))
    prompt, *others = CALLED
    for n in (1, 2, 3):
        ((whole, start, stop),) = template.split([prompt], [others[:n]], ["candidates[0]"])
        assert whole == rendered(theirs, TOOLS, as_text(CALLED[: n + 1]))
        assert whole[start:].startswith("<|assistant|>")
        assert stop > start
    with pytest.raises(InputError, match=r"cannot render.*content"):
        ChatTemplate("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", TOKENS).render(CALLED)
    with pytest.raises(InputError, match=r"messages\[0\]: there is no 'content'"):
        template.render([{"role": "assistant", "tool_calls": None}])
