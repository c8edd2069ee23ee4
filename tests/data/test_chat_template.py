"""Chat templates give the text that transformers gives, and nothing that a template does gets out of hand."""

import contextlib
import json
import re
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from llmq_jax.data import ByteTokenizer, FileTokenizer, GPT2Tokenizer, template_sandbox
from llmq_jax.data.chat_template import ChatTemplate, parse_variables, read_chat_template
from llmq_jax.errors import BadInput

CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "One\ntwo <b>&'\"\n"}],
    [
        {"role": "user", "content": "naïve café 😀 你好"},
        {"role": "assistant", "content": "{{ messages }}{% raw %}", "reasoning": "why"},
        {"role": "user", "content": "", "name": "Ada", "weight": 0.5, "empty": None},
    ],
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "number"}}, "note": "é <&>"}}]

TEMPLATES = {
    "chatml": """\
{% for message in messages %}
    {% if loop.first and messages[0]['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
    {% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}""",
    "llama 2": """\
{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set rest = messages[1:] %}\
{% else %}{% set system = none %}{% set rest = messages %}{% endif %}
{{ bos_token }}{% for message in rest %}
{% if message.role == 'user' %}[INST] {% if loop.index0 == 0 and system %}<<SYS>>{{ system }}<</SYS>>{% endif %}
{{ message.content | trim }} [/INST]{% else %} {{ message.content | trim }} {{ eos_token }}{% endif %}{% endfor %}""",
    "tools": """\
{%- if tools is defined and tools is not none %}{{ tools | tojson }}{{ tools | tojson(indent=2) }}
{{- tools | map(attribute='function.name') | join(', ') }}{{ tools | tojson(separators=(',', ':'), sort_keys=true) }}
{%- elif tools is defined %}none{% endif %}
{%- for message in messages recursive %}{{ message | tojson }}{{ message.get('name', '?') }}{% endfor %}""",
    "loops": """\
{%- set state = namespace(users=0, last='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if loop.index > 2 %}{% break %}{% endif %}
    {%- set state.users = state.users + 1 %}{% set state.last = message.content %}
    {{- loop.index }}/{{ loop.length }}/{{ loop.revindex0 }}{{ ' last' if loop.last else '' }}
    {{- loop.previtem.role if loop.previtem is defined }}{{ loop.nextitem.role if loop.nextitem is defined }}
    {{- loop.cycle('odd', 'even') }}{{ loop.changed(message.role) }}
{%- else %}nobody{% endfor %}
{{- state.users }}{{ state.last * 2 }}{% for a, b in dict(x=1, y=2).items() if b > 1 %}{{ a }}{{ b }}{% endfor %}
{%- for word in messages[0].content.split() | reverse %}<{{ word }}>{% else %}-{% endfor %}
{%- for i in range(3, 0, -1) %}{{ i * 2 }}{{ '%02d' % i }}{% endfor %}
{{- '12345 **%(n)s** says' % {'n': 1} }}{% for x in nothing %}{% else %}.{% endfor %}""",
    "macros": """\
{%- macro turn(role, text='') -%}
<{{ role }}>{{ text }}{{ caller() if caller else '' }}{{ kwargs | tojson }}
{%- endmacro %}
{%- for message in messages %}{{ turn(message.role, message.content, context='x', obj=1) }}
{%- call turn('inner') %}{{ loop.index }}{% endcall %}{% endfor %}
{%- filter upper %}ß{{ messages | length }}{% endfilter %}{{ strftime_now('%Y') | length }}{# nothing #}""",
    "generation": """\
{%- set mark = 'outer' %}{% for message in messages %}
{%- if message.role == 'assistant' %}{% generation %}{% set mark = 'inner' %}{{ message.content }}{{ loop.index }}
{%- endgeneration %}{% else %}{{ message.content }}{% endif %}{{ mark }}
{% endfor %}""",
}


def theirs(template, messages, **variables) -> str:
    (text,), _ = render_jinja_template(conversations=[messages], chat_template=template, **variables)
    return text


def without_empty(messages):
    """What `apply_chat_template` does before it renders."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("variables", [{}, {"tools": TOOLS, "eos_token": "<end>"}], ids=["plain", "tools"])
def test_text_is_that_of_transformers(name, variables):
    template = ChatTemplate(TEMPLATES[name], TOKENS)
    for messages in CONVERSATIONS:
        for prompt in (True, False):
            expected = theirs(
                TEMPLATES[name], without_empty(messages), add_generation_prompt=prompt, **TOKENS | variables
            )
            assert template.render(messages, add_generation_prompt=prompt, **variables) == expected
            assert expected


def refused(template, messages=CONVERSATIONS[0]) -> str:
    start = time.process_time()
    with pytest.raises(BadInput) as caught:
        ChatTemplate(template).render(messages)
    assert time.process_time() - start < 20  # mostly milliseconds
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_a_template_raises():
    message = refused("{{ raise_exception('After a user\n comes   an assistant') }}")
    assert message == "the chat template refused these messages: After a user comes an assistant"
    assert refused("{{ nothing.at.all }}").startswith(
        "the chat template refused these messages: 'nothing' is undefined"
    )
    assert "division" in refused("{{ 1 // (messages | length - 1) }}")
    assert refused("{{ nothing | tojson }}").startswith("the chat template refused these messages: ")
    assert refused("{% include 'file' %}").startswith("the chat template refused these messages: ")


@pytest.mark.parametrize(
    "expression",
    [
        "messages.__class__.__mro__",
        "''.__class__.__base__.__subclasses__()",
        "messages.append(1)",
        "raise_exception.__globals__['json']",
        "'{0.__class__.__base__}'.format(messages)",
        "self.__init__.__globals__",
        "cycler.__init__.__globals__.os",
        "dict.__class__.__mro__",
        "namespace(_x=1)",
        "namespace({'__class__': 1})",
        "1 }}{% set names = namespace(x=1) %}{% set names._x = 1 %}{{ 1",
    ],
)
def test_a_template_stays_in_its_sandbox(expression):
    assert "unsafe" in refused(f"{{{{ {expression} ~ '' }}}}")


def test_not_jinja():
    with pytest.raises(BadInput, match="is not valid Jinja: line 2: ") as caught:
        ChatTemplate("one\n{% for message in messages %}")
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="the chat template "):
        ChatTemplate("{{ " + "(" * 5000)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% set r = range(100000) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
            "it takes more than 10,000 steps",
        ),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "steps"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for i in range(10**9) %}{% endfor %}", "** is not allowed"),
        ("{% for i in range(1000000000) %}{% endfor %}", "Range too big"),
        ("{{ 10 ** 10 ** 10 }}", "** is not allowed"),
        ("{{ 'a' * 1000000000 }}", "steps"),
        ("{{ 1000000000 * [0] }}", "steps"),
        ("{% for i in range(9000) %}{{ messages[0].content }}{% endfor %}", "it writes more than 100,000 characters"),
        ("{{ lipsum(n=1000000) }}", "'lipsum' is undefined"),
        ("{% macro f() %}{% for i in range(99999) %}{{ f() }}{% endfor %}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_bounds(monkeypatch, template, reason):
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 10_000)
    monkeypatch.setattr(template_sandbox, "MAX_CHARACTERS", 100_000)
    assert reason in refused(template, [{"role": "user", "content": "x" * 1000}])


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10000000000 }}",
        "{{ 'a' | center(10000000000) }}",
        "{{ 'a' | indent(1000000000, true) }}",
        "{{ messages | tojson(indent=1000000000) }}",
        "{{ 'a'.ljust(10000000000) }}",
        "{{ '\t'.expandtabs(1000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{{ '%9000000000d' | format(1) }}",
        "{{ '%*d' | format(9000000000, 1) }}",
        "{{ '%(a)9000000000d' % {'a': 1} }}",
        "{{ '%(a(b)c)9000000000d' | format(**{'a(b)c': 1}) }}",
        "{{ ('a' * 90000).translate({97: 'b' * 90000}) }}",
        "{{ ('a\n' * 90000) | indent('b' * 90000) }}",
        "{{ range(90000) | list | tojson(indent='b' * 90000) }}",
        "{{ range(90000) | list | tojson(separators=('b' * 90000, '')) }}",
        "{{ 'a'.encode().center(9000000000) }}",
        "{{ (1).to_bytes(9000000000, 'big') }}",
        "{{ ('{:9999}' * 90000).format(*range(90000)) }}",
        "{{ ('a' * 90000).replace('a', 'b' * 90000) }}",
        "{{ ('a' * 90000) | replace('', 'b' * 90000) }}",
        "{{ ('a' * 90000).join('b' * 90000) }}",
        "{{ range(9000) | map('string') | join('a' * 90000) }}",
        "{% set s = namespace(x='a') %}{% for i in range(60) %}{% set s.x = s.x + s.x %}{% endfor %}",
        "{% set s = namespace(x='a') %}{% for i in range(60) %}{% set s.x = s.x ~ s.x %}{% endfor %}",
        "{% set s = namespace(x=[1]) %}{% for i in range(60) %}{% set s.x = s.x + s.x %}{% endfor %}",
        "{% set s = namespace(x=[1]) %}{% for i in range(60) %}{% set s.x = [s.x, s.x] %}{% endfor %}",
        "{% set s = namespace(x={}) %}{% for i in range(60) %}{% set s.x = {1: s.x, 2: s.x} %}{% endfor %}",
        "{% set s = namespace(x={}) %}{% for i in range(60) %}{% set s.x = dict(a=s.x, b=s.x) %}{% endfor %}",
        "{% set s = namespace(x=1) %}{% for i in range(60) %}{% set s.x = namespace(a=s.x, b=s.x) %}{% endfor %}",
        "{% set s = namespace() %}{% set s.x = s %}{{ s }}",
        "{% set s = namespace(x=99) %}{% for i in range(60) %}{% set s.x = s.x * s.x %}{% endfor %}",
        "{% set a = 'x' * 900000 %}{% for i in range(99999) %}{% set b = a + 'y' %}{% endfor %}",
    ],
)
def test_memory_is_bounded(template):
    """Each would take gigabytes, or what is more than there is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, hard))
    try:
        assert re.search(r"could make|makes|steps|width|too big|not allowed", refused(template))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_the_time_of_a_step_is_bounded(monkeypatch):
    """Each would take minutes or hours."""
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 2)
    long = "{% set a = namespace(x='a') %}{% for i in range(23) %}{% set a.x = a.x ~ a.x %}{% endfor %}"  # 2^23 letters
    begun = time.process_time()
    for slow in (
        "{{ ('{}' ~ ':' * 900000).format(1) }}",
        "{{ a.x.strip('b' ~ a.x) }}",
        "{{ a.x | trim('b' ~ a.x) }}",
        "{{ a.x.rfind('a' * 900000 ~ 'b' ~ 'a' * 90000) }}",
        "{{ (['b'] * 900000) | select('in', a.x) | list }}",
    ):
        with contextlib.suppress(BadInput):
            ChatTemplate(long + slow).render(CONVERSATIONS[0])
    assert time.process_time() - begun < 10


def test_time_is_bounded(monkeypatch):
    """In any thread, and of a template that another thread renders at the same time."""
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 1)
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 10**12)
    # Of each thread's own time: the short one waits for the long one and, on a busy machine, for others.
    monkeypatch.setattr(template_sandbox, "time", SimpleNamespace(monotonic=time.thread_time))
    letters = "messages[0].content"
    template = ChatTemplate(f"{{% for i in {letters} %}}{{% for j in {letters} %}}{{% endfor %}}{{% endfor %}}")
    messages = [{"role": "user", "content": "x" * 10**6}]

    def render(messages: list) -> str:
        try:
            return template.render(messages)
        except BadInput as error:
            return str(error)

    with ThreadPoolExecutor(2) as threads:
        long, short = threads.map(render, [messages, CONVERSATIONS[0]])
    assert long == "the chat template refused these messages: it takes more than 1 seconds"
    assert short == ""


def test_files_are_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text("secret")
    for template in (
        "{% include 'secret' %}",
        "{% import 'secret' as s %}{{ s }}",
        "{% extends 'secret' %}",
        "{% from '/etc/passwd' import x %}",
        "{{ open('secret').read() }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ messages.__init__.__globals__ }}",
    ):
        assert "secret" not in refused(template).removeprefix("the chat template refused these messages: 'secret'")


def test_steps_do_not_add_up(monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_STEPS", 1000)
    template = ChatTemplate("{% for i in range(900) %}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}")
    for _ in range(3):
        assert template.render(CONVERSATIONS[0]) == "Hello"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("Hello", 'messages must be a list of {"role": ..., "content": ...}, not str'),
        ({"role": "user", "content": "a"}, "messages must be a list of"),
        ([], "messages are empty; give at least one"),
        (["Hello"], 'messages[0] must be {"role": ..., "content": ...}, not str'),
        ([{"role": "user", "content": "a"}, {"role": "user"}], "messages[1] has no 'content'; its keys are 'role'"),
        ([{"from": "human", "value": "a"}], "messages[0] has no 'role'; its keys are 'from', 'value'"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "messages[0]['content'][0]: text must be a string, not null",
        ),
        ([{"role": "user", "content": [{"type": "image"}]}], "messages[0]['content'][0] is a part of the type 'image'"),
        ([{"role": "user", "content": None}], "messages[0]['content'] must be text, not NoneType"),
        ([{"role": 1, "content": "a"}], "messages[0]['role'] must be text, not int"),
    ],
)
def test_messages_of_another_form(messages, reason):
    assert reason in refused(TEMPLATES["chatml"], messages)


@pytest.fixture
def folder(tmp_path):
    ByteTokenizer().save(tmp_path)
    return tmp_path


def write_config(folder, **fields):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_where_a_tokenizer_s_template_is_found(folder):
    assert FileTokenizer(folder).chat_template is None
    write_config(folder, chat_template=None)
    assert FileTokenizer(folder).chat_template is None
    write_config(folder, chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}])
    assert FileTokenizer(folder).chat_template.source == "d"
    write_config(folder, chat_template=[{"name": "tool_use", "template": "t"}])
    assert FileTokenizer(folder).chat_template is None
    write_config(folder, chat_template="config")
    assert FileTokenizer(folder).chat_template.source == "config"
    (folder / "chat_template.json").write_text('{"chat_template": "json"}')
    assert FileTokenizer(folder).chat_template.source == "json"
    (folder / "chat_template.jinja").write_text("jinja")
    assert FileTokenizer(folder).chat_template.source == "jinja"


@pytest.mark.parametrize("added", [False, True], ids=["old", "with added_tokens_decoder"])
def test_special_tokens_reach_the_template(folder, added):
    """As transformers names them: special_tokens_map.json has the last word, and none beside the newer form."""
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "a"}, "unk_token": "b"}))
    template = "{{ bos_token }} {{ eos_token }} {{ unk_token }}"
    write_config(folder, bos_token="c", unk_token="d", extra_special_tokens=["x"], chat_template=template)
    if added:
        write_config(folder, added_tokens_decoder={"256": {"content": "<|endoftext|>", "special": True}})
    expected = "c <|endoftext|> d" if added else "a <|endoftext|> b"
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.apply_chat_template(CONVERSATIONS[0], tokenize=False) == expected
    assert FileTokenizer(folder).chat_template.render(CONVERSATIONS[0]) == expected


def test_tokenizers_of_our_own_have_none():
    assert ByteTokenizer().chat_template is None
    assert GPT2Tokenizer().chat_template is None


def test_a_broken_template_is_named_with_its_folder(folder):
    (folder / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(BadInput, match=r"the chat template is not valid Jinja: line 1") as caught:
        FileTokenizer(folder).chat_template  # noqa: B018
    assert str(folder) in str(caught.value)


def test_a_template_in_a_file_of_its_own(tmp_path):
    path = tmp_path / "a.jinja"
    path.write_bytes(b"\xef\xbb\xbf{{ messages }}\r\n")
    assert read_chat_template(path) == "{{ messages }}\r\n", "without the byte order mark, which would be written"
    for content, message in (
        ("{{ bos_token }}\n\n{% if %}", "the chat template is not valid Jinja: line 3: "),
        (" \n", "the chat template is empty"),
        ("{{ messages | nothing }}", "the chat template is not valid Jinja: line 1: No filter named 'nothing'"),
    ):
        path.write_text(content)
        with pytest.raises(BadInput) as caught:
            read_chat_template(path)
        assert str(caught.value).startswith(f"{path}: {message}") and "\n" not in str(caught.value)
    with pytest.raises(BadInput, match=r"b\.jinja cannot be read \(No such file"):
        read_chat_template(tmp_path / "b.jinja")


THINKS = (
    "\n  {% macro said(m) %}{{ m.content }}{% if enable_thinking is defined and not enable_thinking %} briefly"
    "{% endif %}{% endmacro %}{% for m in messages %}{{ said(m) }}|{% endfor %}"
    "{% if level is not defined %}{% set level = 3 %}{% endif %}{{ level }}"
    "{% if add_generation_prompt and not enable_thinking | default(true) %}<t></t>{% endif %}"
)


def test_variables_become_a_part_of_the_template():
    """Also inside of macros and loops, without changing its white space, and of less weight than what is given."""
    template, said = ChatTemplate(THINKS, {"eos_token": "</s>"}), [{"role": "user", "content": "a"}]
    assert template.variables() == ["enable_thinking", "level"]
    assert template.render(said) == "\na|3"
    source = template.with_variables({"enable_thinking": False, "level": 'high "é"'})
    ours = ChatTemplate(source)
    assert ours.render(said) == '\na briefly|high "é"<t></t>'
    assert theirs(source, said, add_generation_prompt=True) == ours.render(said)
    for values in ({"enable_thinking": True}, {"level": 2}, {"enable_thinking": True, "level": "low"}):
        expected = template.render(said, **{"enable_thinking": False, "level": 'high "é"', **values})
        assert ours.render(said, **values) == expected
        assert ChatTemplate(ours.with_variables(values)).render(said) == expected
    assert ChatTemplate(template.with_variables({})).source == THINKS


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"enable_thinkin": True}, "reads no variable 'enable_thinkin'; did you mean enable_thinking"),
        ({"messages": "x"}, "reads no variable 'messages'"),
        ({"tools": True}, "reads no variable 'tools'"),
        ({"level": None}, "variable 'level' must be text, a number, true or false"),
        ({"level": [1]}, "variable 'level' must be text, a number, true or false"),
        ({"level": float("nan")}, "variable 'level' must be text, a number, true or false"),
    ],
)
def test_variables_that_a_template_does_not_read(values, message):
    with pytest.raises(BadInput, match=message):
        ChatTemplate(THINKS).with_variables(values)
    with pytest.raises(BadInput, match="it reads none at all"):
        ChatTemplate("{{ messages[0].content }}").with_variables({"level": 1})


@pytest.mark.parametrize("text", ["", "enable_thinking=false", "{}", "[1]", "{'a': false}", "null"])
def test_variables_that_are_no_json(text):
    with pytest.raises(BadInput, match=r"--chat-template-kwargs .* is no object in JSON"):
        parse_variables(text, "--chat-template-kwargs")
