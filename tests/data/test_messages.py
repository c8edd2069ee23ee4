"""Messages that call tools, think, or have parts: what is read of them, what a template is given, what is refused."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers

from llmq_jax.data import ByteTokenizer, FileTokenizer, read_conversations, read_preferences, read_records, render
from llmq_jax.data.chat_template import ChatTemplate
from llmq_jax.data.prompts import read_prompts
from llmq_jax.errors import BadInput
from tests.data.tool_calls import LOOP, QWENISH, TOOLED, TOOLS, assistant, call, result, user

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Reads a list of parts, and trims each, as Gemma 3's.
PARTED = CHATML.replace(
    "{{ m['content'] }}",
    "{% if m.content is string %}{{ m.content | trim }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text | trim }}{% endif %}{% endfor %}{% endif %}",
)


def text_part(text):
    return {"type": "text", "text": text}


def write(tmp_path, *records):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(tmp_path, *records):
    return read_conversations(write(tmp_path, *records))


def learned(conversation, source):
    rendered = render(conversation, "chat", ChatTemplate(source))
    return [rendered.text[start:end] for start, end in rendered.chosen("response")]


def by_transformers(source, messages, **variables):
    (text,), _ = transformers.utils.chat_template_utils.render_jinja_template(
        conversations=[messages], chat_template=source, **variables
    )
    return text


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_a_template_that_reads_parts_gets_them_in_every_role(role):
    messages = [{"role": role, "content": [text_part("a "), text_part(" b")]}, {"role": "user", "content": "c"}]
    written = ChatTemplate(PARTED).render(messages, add_generation_prompt=False)
    assert f"{role}\nab<|im_end|>" in written and written == by_transformers(PARTED, messages)


def test_calls_are_learned_and_what_tools_say_is_not(tmp_path):
    (conversation,) = read(tmp_path, {"messages": LOOP, "tools": TOOLS})
    assert learned(conversation, TOOLED) == [
        '<think>I should ask.</think><call>weather({"city": "Zürich"})</call><call>clock({})</call></s>',
        "It is cold.</s>",
    ]
    text = render(conversation, "chat", ChatTemplate(TOOLED)).text
    assert text == by_transformers(TOOLED, LOOP, tools=TOOLS)
    assert text.startswith('[tools]{"type": "function", "function": {"name": "weather"')


def test_of_several_names_of_reasoning_the_first_counts(tmp_path):
    messages = [user("a"), assistant("b", reasoning="3", thinking="2", reasoning_content="1")]
    (conversation,) = read(tmp_path, {"messages": messages})
    text = render(conversation, "chat", ChatTemplate(TOOLED)).text
    assert "<think>1</think>" in text and text == by_transformers(TOOLED, messages)


@pytest.mark.parametrize("null", [{}, {"content": None}, {"content": ""}])
def test_who_only_calls_says_nothing(tmp_path, null):
    messages = [user("How warm?"), {"role": "assistant", **null, "tool_calls": [call("clock")], "reasoning": None}]
    (conversation,) = read(tmp_path, {"messages": messages, "tools": json.dumps(TOOLS)})
    assert learned(conversation, TOOLED) == ["<call>clock({})</call></s>"]
    assert dict(conversation.variables) == {"tools": TOOLS}, "TRL reads a string as JSON"


def test_variables_of_a_record(tmp_path):
    """Those of chat_template_kwargs are the template's; null is none, and one that is not read must say nothing."""
    source = TOOLED + "{{ mood }}"
    kwargs = {"mood": "!", "other": None, "empty": [], "off": False}
    (conversation,) = read(tmp_path, {"messages": LOOP, "tools": [], "chat_template_kwargs": kwargs})
    assert dict(conversation.variables) == {"mood": "!", "empty": [], "off": False, "tools": []}, "not those of none"
    (conversation,) = read(tmp_path, {"messages": LOOP, "tools": TOOLS, "chat_template_kwargs": kwargs})
    assert render(conversation, "chat", ChatTemplate(source)).text.endswith("</s>!")
    with pytest.raises(BadInput, match=r"data\.jsonl: line 1: the chat template has no place for 'mood'"):
        render(conversation, "chat", ChatTemplate(TOOLED))


def test_sharegpt_calls_a_tool_in_json(tmp_path):
    turns = [
        {"from": "human", "value": "How warm?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bern"}}'},
        {"from": "observation", "value": "5"},
        {"from": "gpt", "value": "Cold."},
    ]
    (shared,) = read(tmp_path, {"conversations": turns, "tools": json.dumps(TOOLS)})
    messages = [user("How warm?"), assistant("", tool_calls=[call("weather", city="Bern")])]
    messages += [{"role": "tool", "content": "5"}, assistant("Cold.")]
    assert list(shared.messages) == messages
    assert learned(shared, TOOLED) == ['<call>weather({"city": "Bern"})</call></s>', "Cold.</s>"]


@pytest.mark.parametrize(("source", "expected"), [(CHATML, "a b\nc"), (PARTED, "ab\nc"), (QWENISH, "a b\nc")])
def test_parts_of_a_content(tmp_path, source, expected):
    """As they are for a template that reads them, which is what transformers gives; in a row for others."""
    messages = [user([text_part("a "), text_part("b\nc")]), assistant([text_part("d")])]
    (conversation,) = read(tmp_path, {"messages": messages})
    text = render(conversation, "chat", ChatTemplate(source)).text
    assert f"<|im_start|>user\n{expected}<|im_end|>\n" in text
    assert learned(conversation, source)[0].endswith("d<|im_end|>\n")
    if source == PARTED:
        assert text == by_transformers(source, messages)


def test_parts_are_texts_for_other_templates(tmp_path):
    record = {"prompt": [user([text_part("1 + "), text_part("1")])], "completion": [assistant([text_part("2")])]}
    (conversation,) = read(tmp_path, record)
    rendered = render(conversation, "alpaca")
    assert rendered.text.endswith("### Instruction:\n1 + 1\n\n### Response:\n2")


ROWS = [
    {"messages": LOOP, "tools": TOOLS},
    {"messages": [user("Hi"), assistant("", tool_calls=[call("other", deep={"er": [{"x": 1}]})])], "tools": TOOLS[:1]},
]


@pytest.mark.parametrize("mixed", [{}, {"on_mixed_types": "use_json"}], ids=["structs", "JSON"])
def test_parquet_gives_back_what_datasets_wrote(tmp_path, mixed):
    """Structs have the keys of all rows, null where a row has none; or values are JSON, which is what `datasets` writes
    where rows differ too much."""
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "data.parquet"
    datasets.Dataset.from_list(ROWS, **mixed).to_parquet(path)
    assert [record.fields for record in read_records(path)] == ROWS
    written = [conversation.messages for conversation in read(tmp_path, *ROWS)]
    assert [conversation.messages for conversation in read_conversations(path)] == written


def test_null_in_parquet_is_absent_in_what_templates_read_alone(tmp_path):
    """A reward's columns are as they are: tests of a program may expect None."""
    nested = [[{"g": None, "h": [None]}]]
    row = {"a": None, "b": {"c": 1, "d": None}, "e": [1, None], "tests": nested, "tools": nested}
    pq.write_table(pa.Table.from_pylist([row] * 2), tmp_path / "a.parquet")
    assert read_records(tmp_path / "a.parquet")[1].fields == {**row, "tools": [[{"h": [None]}]]}


def test_broken_json_in_parquet(tmp_path):
    kind = pa.json_(pa.string())
    column = pa.ExtensionArray.from_storage(kind, pa.array(['{"a": 1}', "{"]))
    pq.write_table(pa.table({"tools": column}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"a\.parquet: row 2: column 'tools' holds broken JSON"):
        read_records(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("record", "source", "message"),
    [
        ({"messages": LOOP, "tools": TOOLS}, CHATML, "has no place for 'tools'"),
        ({"messages": LOOP}, CHATML, r"has no place in messages\[1\] for 'tool_calls'"),
        (
            {"messages": [user("a"), assistant("b", reasoning="c")]},
            CHATML + "{{ thinking_on }}",
            r"has no place in messages\[1\] for 'reasoning'",
        ),
        (
            {"messages": [{"role": "developer", "content": "Be brief."}, user("a"), assistant("b")]},
            CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'developer' %}"),
            r"leaves out messages\[0\], of the developer",
        ),
        (
            {"messages": LOOP, "tools": TOOLS},
            TOOLED.replace("{{ m.content }}</s>", "{% if m.role != 'tool' %}{{ m.content }}</s>{% endif %}"),
            r"leaves out messages\[2\], of the tool",
        ),
        (
            {"messages": LOOP, "tools": TOOLS},
            TOOLED.replace("m.reasoning_content", "m.reasoning_content and shown"),
            r"leaves out a part of what messages\[1\] says",
        ),
        (
            {"messages": LOOP, "tools": TOOLS},
            TOOLED.replace("call in m.tool_calls", "call in (m.tool_calls or [])[:1]"),
            r"leaves out a part of what messages\[1\] says",
        ),
        (
            {"messages": [user("a"), assistant("", tool_calls=[call("clock"), call("clock")])]},
            TOOLED.replace("call in m.tool_calls", "call in (m.tool_calls or [])[:1]"),
            r"leaves out a part of what messages\[1\] says",
        ),
        (  # what opens an answer holds such a word too
            {"messages": [user("a"), assistant("assist")]},
            CHATML.replace("m['content']", "m['content'] if m['role'] != 'assistant'"),
            r"leaves out a part of what messages\[1\] says",
        ),
    ],
)
def test_a_template_that_has_no_place(tmp_path, record, source, message):
    (conversation,) = read(tmp_path, record)
    with pytest.raises(BadInput, match=rf"data\.jsonl: line 1: the chat template {message}") as caught:
        render(conversation, "chat", ChatTemplate(source))
    assert "\n" not in str(caught.value)


TWICE = [
    user("Here and there?"),
    assistant("", tool_calls=[call("weather", city="Bern"), call("weather", city="Genf")]),
]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("call in m.tool_calls", "call in (m.tool_calls or [])[:1]"),
        ("{{ call.function.arguments | tojson }}", "{{ '' if loop.index > 1 else call.function.arguments | tojson }}"),
    ],
    ids=["a second call", "its arguments"],
)
def test_a_call_is_not_lost_beside_another_of_its_tool(tmp_path, old, new):
    (conversation,) = read(tmp_path, {"messages": TWICE, "tools": TOOLS})
    assert learned(conversation, TOOLED)[0].count("weather") == 2
    assert old in TOOLED
    with pytest.raises(BadInput, match=r"leaves out a part of what messages\[1\] says"):
        learned(conversation, TOOLED.replace(old, new))


def test_arguments_as_strings_in_python(tmp_path):
    """Between single quotes, as LFM2's template writes them, and between those that Python chooses."""
    texts = ["don't", 'say "no"', "a 'b' \"c\"", "it's\n\xa0two", "back\\slash"]
    asked = [user("a"), assistant("", tool_calls=[call("weather", **dict(zip("abcde", texts, strict=True)))])]
    (conversation,) = read(tmp_path, {"messages": asked, "tools": TOOLS})
    escaped = r"""call.function.arguments.values() | map("replace", "\\", "\\\\") | map("replace", "'", "\\'")"""
    written = escaped + r""" | map("replace", "\n", "\\n") | join("', '")"""
    for arguments in (written, "call.function.arguments"):
        (answer,) = learned(conversation, TOOLED.replace("call.function.arguments | tojson", arguments))
        assert "two" in answer


@pytest.mark.parametrize("role", ["user", "system"])
def test_what_is_asked_is_not_lost(tmp_path, role):
    (conversation,) = read(tmp_path, {"messages": [{"role": role, "content": "Hi"}, user("a"), assistant("b")]})
    source = CHATML.replace("{% for m in messages %}", "{% for m in messages[1:] %}")
    with pytest.raises(BadInput, match=rf"leaves out messages\[0\], of the {role}"):
        learned(conversation, source)


VISION = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}{% endfor %}{% endfor %}"
)


def test_a_template_that_writes_only_parts_says_so(tmp_path):
    for asked, lost in (("Well?", r"messages\[0\], of the user"), ("a", r"a part of what messages\[1\] says")):
        (conversation,) = read(tmp_path, {"messages": [user(asked), assistant("b")]})
        fault = rf"leaves out {lost}: it reads texts only from parts: write content as \[{{.*}}\], or use another"
        with pytest.raises(BadInput, match=fault):
            learned(conversation, VISION)
    (conversation,) = read(tmp_path, {"messages": [user([text_part("a")]), assistant([text_part("b")])]})
    assert learned(conversation, VISION) == ["<assistant>b"]


def test_parts_are_one_text_for_roles_whose_lists_a_template_does_not_read(tmp_path):
    """Gemma 3's writes the first part of what the system says."""
    source = PARTED.replace("{% if m.content is string", "{% if m.role == 'system' %}{{ m.content[0].text if m.content "
        "is not string else m.content }}{% elif m.content is string")  # fmt: skip
    parts = [text_part("a "), text_part("b")]
    messages = [{"role": "system", "content": parts}, user(parts), assistant("c")]
    (conversation,) = read(tmp_path, {"messages": messages})
    text = render(conversation, "chat", ChatTemplate(source)).text
    assert text.startswith("<|im_start|>system\na b<|im_end|>\n<|im_start|>user\nab<|im_end|>\n")


def test_a_call_of_sharegpt_keeps_what_stands_beside_it(tmp_path):
    call_in_json = {"from": "function_call", "value": '{"name": "clock", "arguments": {}}'}
    turns = [{"from": "human", "value": "How late?"}, {**call_in_json, "reasoning": "I look."}]
    (shared,) = read(tmp_path, {"conversations": turns})
    assert learned(shared, TOOLED) == ["<think>I look.</think><call>clock({})</call></s>"]
    observed = {"from": "observation", "value": "5"}
    marked = [turns[0], {**call_in_json, "weight": 0}, observed, {"from": "gpt", "value": "Late."}]
    (shared,) = read(tmp_path, {"conversations": marked})
    assert learned(shared, TOOLED) == ["Late.</s>"]


NOT = [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"weight": 1, "train": False}]


@pytest.mark.parametrize("mark", NOT)
def test_an_answer_that_is_marked_is_read_and_not_learned(tmp_path, mark):
    """By OpenAI's, axolotl's and LLaMA-Factory's marks: what the template writes stays the same."""
    kept = dict.fromkeys(mark, 1)
    turns = [user("a"), assistant("b", **mark), {**user("c"), **mark}, assistant("d", **kept), user("e")]
    shared = [{"from": each.pop("role"), "value": each.pop("content"), **each} for each in map(dict, turns)]
    plain, chat, shared, parted = read(
        tmp_path,
        {"messages": [{name: each[name] for name in ("role", "content")} for each in turns]},
        {"messages": turns},
        {"messages": shared},
        {"prompt": turns[:1], "completion": turns[1:]},
    )
    for conversation in (chat, shared, parted):
        assert conversation.messages == plain.messages
        rendered = render(conversation, "chat", ChatTemplate(CHATML))
        assert rendered.text == render(plain, "chat", ChatTemplate(CHATML)).text
        assert learned(conversation, CHATML) == ["d<|im_end|>\n"]
        assert rendered.chosen((0, 1)) == rendered.chosen((1,)) == rendered.chosen("last"), "numbers count all answers"
        with pytest.raises(
            BadInput, match=r"line \d has no answer to learn: all that are chosen are marked .* remove the row, "
        ):
            rendered.chosen((0,))
    (sparse,) = read(tmp_path, {"messages": [user("a"), assistant("b", weight=None, train=True, loss=1)]})
    assert learned(sparse, CHATML) == ["b<|im_end|>\n"]


def test_a_conversation_of_marked_answers_is_refused_as_one_without_an_answer(tmp_path):
    for template, answers in (("chat", 2), ("alpaca", 1)):
        (conversation,) = read(tmp_path, {"messages": [user("a"), assistant("b", weight=0)] * answers})
        for train_on in ("response", "last", (-1,)):
            with pytest.raises(BadInput, match=r"data\.jsonl: line 1 has no answer to learn: all that"):
                render(conversation, template, ChatTemplate(CHATML)).chosen(train_on)


def test_a_marked_answer_may_be_one_that_could_not_be_learned(tmp_path):
    """A greeting before any prompt; an earlier answer, whose thought the template leaves out once others follow."""
    greeted = [assistant("Hello", weight=0), user("a"), assistant("b")]
    thoughtful = [user("a"), assistant("b", thinking="B", train=False), user("c"), assistant("d", thinking="D")]
    forgetful = TOOLED.replace("{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.last %}")
    assert forgetful != TOOLED
    for messages, source, expected in (
        (greeted, CHATML, "b<|im_end|>\n"),
        (thoughtful, forgetful, "<think>D</think>d</s>"),
    ):
        (conversation,) = read(tmp_path, {"messages": messages})
        assert learned(conversation, source) == [expected]


def test_calls_and_thoughts_of_a_marked_answer_are_not_learned(tmp_path):
    (conversation,) = read(tmp_path, {"messages": [LOOP[0], {**LOOP[1], "weight": 0}, *LOOP[2:]], "tools": TOOLS})
    assert learned(conversation, TOOLED) == ["It is cold.</s>"]
    (conversation,) = read(tmp_path, {"messages": [*LOOP[:-1], {**LOOP[-1], "weight": 0}], "tools": TOOLS})
    assert learned(conversation, TOOLED) == [
        '<think>I should ask.</think><call>weather({"city": "Zürich"})</call><call>clock({})</call></s>'
    ]


def test_the_end_of_a_text_belongs_to_a_last_answer_that_is_marked(tmp_path):
    ending = CHATML + "{% if not add_generation_prompt and messages[-1].role == 'assistant' %}<eot>{% endif %}"
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    (first,) = read(tmp_path, {"messages": [*turns[:3], {**turns[3], "weight": 0}]})
    (last,) = read(tmp_path, {"messages": [turns[0], {**turns[1], "weight": 0}, *turns[2:]]})
    assert learned(last, ending) == ["d<|im_end|>\n<eot>"]
    assert learned(first, CHATML + "{% if messages | length == 4 %}<eot>{% endif %}") == ["b<|im_end|>\n"]


def test_marks_of_a_parquet_file(tmp_path):
    """Where the messages of others have null, and numbers may be floats."""
    rows = [{"messages": [user("a"), assistant("b", weight=0.0), user("c"), assistant("d", weight=1.0)]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (conversation,) = read_conversations(tmp_path / "a.parquet")
    assert learned(conversation, CHATML) == ["d<|im_end|>\n"]


def test_what_tools_say_may_stand_in_json(tmp_path):
    """As Llama 3.1's template has it."""
    source = TOOLED.replace("{{ m.content }}</s>", "{{ m.content | tojson }}</s>")
    said = '{"t": "5 °C",\n "wind": "1"}'
    (conversation,) = read(tmp_path, {"messages": [*LOOP[:2], result(said), LOOP[-1]], "tools": TOOLS})
    assert json.dumps(said, ensure_ascii=False) in render(conversation, "chat", ChatTemplate(source)).text


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"prompt": "a", "completion": "b", "tools": TOOLS}, "tools"),
        ({"prompt": [user("a")], "completion": [assistant("", tool_calls=[call("clock")])]}, "tool_calls"),
        ({"instruction": "a", "output": "b", "chat_template_kwargs": {"x": 1}}, "x"),
        ({"prompt": [user("a")], "completion": [assistant("b", thinking="c")]}, "thinking"),
    ],
)
def test_a_style_has_no_place_for_tools(tmp_path, record, name):
    (conversation,) = read(tmp_path, record)
    with pytest.raises(BadInput, match=rf"line 1: the template 'alpaca' has no place for '{name}': use the model's"):
        render(conversation, "alpaca")


PICTURE = {"type": "image_url", "image_url": {"url": "a.png"}}


def answered(**keys):
    return {"messages": [user("a"), {"role": "assistant", "content": "b", **keys}]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"messages": [user([text_part("a"), PICTURE]), assistant("b")]},
            r"messages\[0\]: content\[1\] is a part of the type 'image_url': only \{\"type\": \"text\"",
        ),
        ({"messages": [user(["a"]), assistant("b")]}, r"content\[0\] is a part of the type str"),
        ({"messages": [user([]), assistant("b")]}, r"messages\[0\]: content is a list without a part"),
        ({"messages": [user([{"type": "text"}])]}, r"content\[0\]: text must be a string, not null"),
        ({"messages": [user("a"), assistant([text_part(" ")])]}, r"messages\[1\]: the response is empty"),
        (
            {"messages": [user("a"), assistant(None, tool_calls=[])]},
            r"messages\[1\]: content must be a string, not null",
        ),
        ({"messages": [user("a"), assistant("", tool_calls=[])]}, r"messages\[1\]: the response is empty"),
        ({"messages": [user("a"), assistant("", reasoning="c")]}, r"messages\[1\]: the response is empty"),
        (answered(tool_calls="clock()"), r"messages\[1\]: tool_calls must be a list of objects, not 'clock\(\)'"),
        (
            answered(tool_calls=[{"function": {"arguments": {}}}]),
            r"tool_calls\[0\] must be \{\"type\": \"function\", \"",
        ),
        (answered(tool_calls=["clock"]), r"tool_calls\[0\] must be .*, not 'clock'"),
        ({"messages": [{**user("a"), "tool_calls": [call("clock")]}]}, r"only the assistant calls tools, .* 'user'"),
        (answered(function_call={"name": "clock"}), r"has 'function_call', which is not read"),
        (
            {"prompt": [user("a"), assistant("b", weight=2), user("c")], "completion": [assistant("d")]},
            r"prompt\[1\]: weight is 2: only 0",
        ),
        (answered(reasoning=["c"]), r"messages\[1\]: reasoning must be a string, not a list"),
        ({**answered(), "tools": "clock"}, r"field 'tools' is a string and no JSON"),
        ({**answered(), "tools": ["clock"]}, r"field 'tools' must be a list of objects, not \['clock'\]"),
        ({**answered(), "tools": '{"name": "clock"}'}, r"field 'tools' must be a list of objects, not \{'name'"),
        ({**answered(), "chat_template_kwargs": "{}"}, r"field 'chat_template_kwargs' must be an object, not '\{\}'"),
        ({**answered(), "chat_template_kwargs": {"messages": []}}, r"holds 'messages', which the template is given"),
        ({**answered(), "tools": [{"name": "\ud800"}]}, r"what it has for the chat template: half a surrogate pair"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "clock()"}]},
            r"conversations\[1\]: value must be a call of a tool in JSON, not 'clock\(\)'",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "5"}]},
            r"conversations\[1\]: tool_calls\[0\] must be",
        ),
    ],
)
def test_what_is_refused(tmp_path, record, message):
    with pytest.raises(BadInput, match=rf"data\.jsonl: line 1.*{message}") as caught:
        read(tmp_path, record)
    assert "\n" not in str(caught.value)


def test_times_in_parquet_are_no_json(tmp_path):
    row = {"messages": [user("a"), assistant("b")], "tools": [{"since": pa.scalar(0, pa.timestamp("s")).as_py()}]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=r"row 1: what it has for the chat template is no JSON: .*datetime"):
        read_conversations(tmp_path / "a.parquet")


def test_pairs_of_calls(tmp_path):
    """Either answer may call, and call again after what the tool said; what differs in the calls alone is a pair."""
    rejected = [assistant("", tool_calls=[call("clock")])]
    path = write(tmp_path, {"prompt": LOOP[:1], "chosen": LOOP[1:], "rejected": rejected, "tools": TOOLS})
    (pair,) = read_preferences(path)
    assert learned(pair.chosen, TOOLED)[1:] == ["It is cold.</s>"]
    assert learned(pair.rejected, TOOLED) == ["<call>clock({})</call></s>"]
    both = {"chosen": [*LOOP[:1], assistant("", tool_calls=[call("weather")])], "rejected": [*LOOP[:1], *rejected]}
    (pair,) = read_preferences(write(tmp_path, both))
    assert pair.chosen.given == pair.rejected.given == 1
    assert learned(pair.chosen, TOOLED) == ["<call>weather({})</call></s>"]
    others = write(tmp_path, both, {**both, "tools": TOOLS})
    assert len({pair.prompt for pair in read_preferences(others)}) == 2, "other tools are another prompt"


def test_prompts_with_tools(tmp_path):
    """The answer goes on after what a tool said; rewards see the tools too."""
    ByteTokenizer().save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TOOLED)
    tokenizer = FileTokenizer(tmp_path)
    (prompt,), _ = read_prompts(write(tmp_path, {"prompt": LOOP[:-1], "tools": TOOLS}), tokenizer)
    assert prompt.text == by_transformers(TOOLED, LOOP[:-1], tools=TOOLS, add_generation_prompt=True)
    assert prompt.columns == {"tools": TOOLS}
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    with pytest.raises(BadInput, match=r"data\.jsonl: line 1: the chat template has no place for 'tools'"):
        read_prompts(write(tmp_path, {"prompt": "a", "tools": TOOLS}), FileTokenizer(tmp_path))
    (prompt,), _ = read_prompts(write(tmp_path, {"query": "a", "tools": TOOLS}), tokenizer, prompt_format="{query}!")
    assert prompt.text == "[user]a!</s>[assistant]", "a format says what the model reads"
    (prompt,), _ = read_prompts(write(tmp_path, {"prompt": "a", "tools": ["x"]}), ByteTokenizer())
    assert prompt.columns == {"tools": ["x"]}, "a field like any other where prompts are texts"
