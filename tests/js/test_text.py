"""Answers, chat templates and tokens of the npm package: those of Python, or an error that says so."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from bonnx import BonnxError, InputError
from bonnx.runtime.artifact.manifest import Scoring, TextRules
from bonnx.runtime.selection.answers import extractor
from bonnx.runtime.text.chat import ChatTemplate
from bonnx.runtime.text.tokenizer import Passage, Tokenizer
from tests import rerankers
from tests.checkpoints import make_tokenizer
from tests.js.asking import in_node
from tests.js.test_module import PIECES
from tests.runtime.text.test_chat import ALTERNATING as ALTERNATING_ROLES
from tests.runtime.text.test_chat import DEFAULT_SYSTEM, HEADERS, THINKING, TOKENS
from tests.runtime.text.test_parts import ITERATES, READS_ONE, SHAPES

SCRIPT = Path(__file__).with_name("parts.mjs")
REFUSED = {"input", "option", "tokenizer"}
# Divided by bars: what numbers are written with.
DIGITS = r"""1|12|345|0.5|.5|1,000|1{,}000|1\,000|1 000|1.234.567|1.234,56|3:2|2024-05-03|1/2|3 1/2|½|2½|\frac{3}{4}|
\dfrac34|\frac{1}{0}|2\frac{1}{2}|-|+|- |^|^2|^{3}|^ (6)|**|** 2|1.5 \times 10^{3}|x 10^2|e5|E-3| million| thousand|
 billions|$|\$|US$|€|\%| cm| cm^2|\text{ cm}|\text{|}|{|x = |answer: |=|(|)|\(|\)|\boxed{|\| |  |.|,|!|°|^\circ|²|⁻³|٣|
ⅷ|②|数|a|pi|cm2|_|'|~|/|*| and """
NUMERALS = [*DIGITS.replace("|\n", "|").split("|"), *"\n\t\xa0\u3000\ufeff\x85\u2212", "\uff11\uff12"]
PATTERNS = [
    *("[0-9]+", r"\d+", r"=(\d+);?$", r"\w+$", r"\bcm\b", r"^(.+)$", r"(?P<a>\d)\s*", r"[^\d]+", "a{,3}b", "{x}"),
    *("[]a]+", r"\Z", r"(?<=\$)\d+", r"(?:a|b)+\.", r"[\w.]+", r"[\s,]+\d", "(a)|(b)", r"(.)\1", r"\-\%\#"),
    *(r"\u0663", r"\S+", ".*"),
]
# As Qwen3 and Llama 3.1 write theirs, in what is uncommon about them.
QWEN = """{%- set ns = namespace(last=messages|length - 1) %}
{%- for m in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if m.role == "user" and m.content is string and not(m.content.startswith('<a>')) %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- set reasoning = '' %}
    {%- if m.reasoning_content is string %}
        {%- set reasoning = m.reasoning_content %}
    {%- elif '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n<think>' + reasoning.strip('\\n') + '</think>' + content + '<|im_end|>\\n' }}
    {%- for call in m.tool_calls %}{{- call.function.name }}{{- call.function.arguments | tojson }}{%- endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA = """{{- bos_token }}
{%- if not date is defined %}{%- set date = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}{%- set system = "" %}{%- endif %}
{{- date + "\\n\\n" + system }}{%- if tools is not none %}{{- "tools" }}{%- endif %}
{%- for m in messages %}
    {%- if 'tool_calls' in m and not m.tool_calls|length == 1 %}{{- raise_exception("single calls only") }}{%- endif %}
    {{- '<|head|>' + m['role'] + '<|/head|>\\n\\n' + m['content'] | trim + '<|turn|>' }}
{%- endfor %}"""
SCOPES = """{% for m in messages %}{% if m.role == 'user' %}{% set x = m.content %}{% endif %}{{ x }}|{{ loop.first }}
{%- if loop.index == 3 %}end{% break %}{% endif %}{% else %}none{% endfor %}{{ x }}{{ none }}{{ 1 == '1' }}"""
TEXTS = """{% for m in messages %}{{ m.content.strip() }}{{ m.content.split() | join('/') }}{{ m.content | length }}
{{- m.content[0] }}{{ m.content[-2:] }}{{ m.content | capitalize }}{{ m.content.rstrip('ab ') }}{% endfor %}
{{ (messages | selectattr('role', 'eq', 'x') | map(attribute='content') | first) | default('-') }}"""
WHOLE = [HEADERS, DEFAULT_SYSTEM, ALTERNATING_ROLES, THINKING, QWEN, LLAMA, SCOPES, TEXTS]
# They use what the package lacks, and fail.
LACKING = ("formats", "joins")
WORDS = [
    "",
    "a",
    "b ",
    "  a b\n",
    "<think>\nx\n</think>\n\ny",
    "</think>",
    "é🎉\r\n",
    "\ufeff",
    "\x85",
    "\x1c",
    "A b",
    "1",
]


def answered(folder, **questions):
    script, given, found = shutil.copy(SCRIPT, folder), folder / "questions.json", folder / "answers.json"
    given.write_text(json.dumps(questions), encoding="utf-8")
    in_node(folder, script, given, found)
    return json.loads(found.read_text(encoding="utf-8"))


def test_answers(npm_folder, dice):
    cases = []
    for _ in range(3000):
        name = dice.choice(["boxed", "number", f"regex:{dice.choice(PATTERNS)}"])
        text = "".join(dice.choice(NUMERALS) for _ in range(dice.randint(0, 12)))
        cases.append(["answer", name, rf"\boxed{{{text}}}" if name == "boxed" and dice.random() < 0.7 else text])
    for (_, name, text), answer in zip(cases, answered(npm_folder, cases=cases), strict=True):
        assert answer == {"result": extractor(name)(text)}, (name, text)


@pytest.mark.parametrize("pattern", ["(?i)a", r"[\S]", "a++", "(", r"\N{DIGIT ONE}", "(?(1)a)", "[a&&b]"])
def test_a_pattern_that_means_something_else_in_javascript_is_refused(npm_folder, pattern):
    assert answered(npm_folder, cases=[["answer", f"regex:{pattern}", "a1"]]) == [{"code": "option"}]


def conversation(dice):
    turns = []
    for i in range(dice.randint(1, 5)):
        content = ["".join(dice.choice(WORDS) for _ in range(dice.randint(0, 3))) for _ in range(dice.randint(0, 3))]
        role = (
            dice.choice(["user", "assistant", "system", "tool"])
            if dice.random() < 0.4
            else ("user", "assistant")[i % 2]
        )
        parts = [{"type": "text", "text": text} for text in content]
        turn = {"role": role, "content": "".join(content) if dice.random() < 0.7 else parts}
        if dice.random() < 0.2:
            turn[dice.choice(["name", "reasoning_content"])] = dice.choice([None, "x", 1.5, False])
        if dice.random() < 0.2:
            called = {"name": "f", "arguments": {"a": 1, "é": [True, None, "x<"]}}
            turn["tool_calls"] = [{"type": "function", "function": called}] * dice.randint(1, 2)
        turns.append(turn)
    return turns


def test_chat_templates(npm_folder, dice):
    shapes = {name: text for name, text in {**SHAPES, **ITERATES, **READS_ONE}.items() if name not in LACKING}
    sources = [*WHOLE, *("{{ bos_token }}{% for m in messages %}" + text + "{% endfor %}" for text in shapes.values())]
    count = len(sources)
    cases = [["render", dice.randrange(count), conversation(dice), dice.random() < 0.5] for _ in range(60 * count)]
    answers = answered(npm_folder, cases=cases, templates=sources, tokens=TOKENS)
    templates, refused = [ChatTemplate(source, TOKENS) for source in sources], 0
    for (_, place, messages, prompted), answer in zip(cases, answers, strict=True):
        try:
            expected = templates[place].render(messages, add_generation_prompt=prompted)
        except BonnxError:
            assert answer.get("code") in REFUSED, (sources[place], messages)
            continue
        refused += "code" in answer
        assert answer in ({"result": expected}, {"code": "input"}), (sources[place], messages, expected)
    # Uncommon ends of lines, where a template indents.
    assert refused < 0.05 * len(cases)


def test_a_template_that_uses_what_the_package_lacks_is_refused(npm_folder):
    sources = ["{% for m in messages %}" + SHAPES[name] + "{% endfor %}" for name in LACKING]
    sources += ["{{ messages }}", "{{ messages | groupby('role') }}", "{{ x.y }}", "{{ strftime_now('%j') }}"]
    cases = [["render", i, [{"role": "user", "content": "a"}], False] for i in range(len(sources))]
    assert answered(npm_folder, cases=cases, templates=sources, tokens=TOKENS) == [{"code": "input"}] * len(sources)


def kinds():
    """Tokenizers of the kinds that the families bring, and their variants."""

    def base(kind, normalizer=None, before=None, after=None, model=None, added=()):
        source = rerankers.make_tokenizer() if kind == "qwen" else make_tokenizer(kind)
        described = json.loads(source.backend_tokenizer.to_str())
        described["model"] |= model or {}
        made = tokenizers.Tokenizer.from_str(json.dumps(described))
        if normalizer is not None:
            made.normalizer = normalizer
        if before is not None:
            made.pre_tokenizer = before
        if after is not None:
            made.post_processor = after
        made.add_tokens([token for token in added if not token.special])
        made.add_special_tokens([token for token in added if token.special])
        return made

    spaces, whole = normalizers.Replace(" ", "▁"), pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=each) for each in (True, False)]
    around = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    marks = [
        AddedToken("<|user|>", rstrip=True, normalized=False, special=True),
        AddedToken("<|pad|>", lstrip=True, normalized=False, special=True),
    ]
    words = [AddedToken("It is", normalized=True), AddedToken("é", normalized=True)]
    legacy = tokenizers.pre_tokenizers.Sequence([])
    return {
        "bytes": base("bytes"),
        "spaces": base("spaces"),
        "qwen": base("qwen"),
        "qwen, NFC": base("qwen", normalizers.NFC(), added=words),
        "NFKC": base("qwen", normalizers.NFKC(), after=processors.ByteLevel(trim_offsets=True)),
        "trimmed": base("bytes", after=processors.ByteLevel(trim_offsets=True, add_prefix_space=True)),
        "gpt 2": base("bytes", before=whole),
        "smol": base("bytes", before=pre_tokenizers.Sequence([digits[0], whole])),
        "digits": base("bytes", before=pre_tokenizers.Sequence([digits[1], whole])),
        "llama 2": base("spaces", normalizers.Sequence([normalizers.Prepend("▁"), spaces]), before=legacy),
        "llama 3": base("bytes", after=processors.Sequence([processors.ByteLevel(trim_offsets=False), around])),
        "gemma": base("spaces", spaces, before=pre_tokenizers.Split(" ", "merged_with_previous")),
        "never": base("spaces", before=pre_tokenizers.Metaspace(prepend_scheme="never", split=False)),
        "phi": base("bytes", added=marks),
        "unknown": base("spaces", model={"byte_fallback": False, "fuse_unk": True}),
        "unknown, each": base("spaces", model={"byte_fallback": False, "fuse_unk": False}),
        "merges ignored": base("bytes", model={"ignore_merges": True}),
    }


def test_tokens_and_the_characters_that_they_cover(npm_folder, tmp_path, dice):
    pieces = [
        *PIECES,
        "\u0301",
        "e",
        "A\u030a",
        "각",
        "ᆫ",
        "क",
        "ि",
        "\u0344",
        "  <|user|> \n ",
        " <|pad|> ",
        "It is",
        "'ll",
        "the ",
    ]
    described, references = [], []
    for name, made in kinds().items():
        made.save(str(tmp_path / f"{name}.json"))
        rules = dice.choice([{"unknown": "refuse"}, {"unknown": "replace", "step_text": dice.choice(["\n", " ", "."])}])
        scoring = {"end_token": 3, "reward_token": None, "stop_tokens": []}
        path = str(tmp_path / f"{name}.json")
        described.append({"path": path, "scoring": scoring, "rules": {"step_text": None, **rules}})
        references.append(Tokenizer(Path(path), Scoring(end_token=3), TextRules(**rules)))
    cases, wanted = [], []
    for _ in range(100 * len(references)):
        k, passages = dice.randrange(len(references)), []
        for _ in range(dice.randint(1, 3)):
            before, own, behind = ("".join(dice.choice(pieces) for _ in range(dice.randint(0, n))) for n in (4, 4, 1))
            text = before + own + behind
            cuts = sorted({dice.randrange(1, len(text))}) if len(text) > 1 and dice.random() < 0.15 else []
            passages.append(Passage(text, len(before), len(before + own), tuple(cuts)))
        how = dice.random() < 0.5, dice.random() < 0.3
        wanted.append((k, passages, how))
        cases.append(["rows", k, [in_units(passage) for passage in passages], *how])
    answers, refused = answered(npm_folder, cases=cases, tokenizers=described), 0
    for (k, passages, (special, partial)), answer in zip(wanted, answers, strict=True):
        try:
            rows = references[k].rows(passages, special=special, partial=partial)
        except InputError:
            assert answer.get("code") in REFUSED, (described[k], passages)
            continue
        refused += "code" in answer
        expected = [row if isinstance(row, str) else vars(row) for row in rows]
        assert answer in ({"result": expected}, {"code": "tokenizer"}), (described[k], passages, expected)
    # A border between a letter and its accent, where the tokenizer makes them one.
    assert refused < 0.03 * len(cases)


def in_units(passage):
    """A passage whose places count UTF-16 units, as JavaScript's do."""

    def units(place):
        return len(passage.text[:place].encode("utf-16-le")) // 2

    return {
        "text": passage.text,
        "start": units(passage.start),
        "stop": units(passage.stop),
        "cuts": [units(place) for place in passage.cuts],
    }
