import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmq_jax.data import ByteTokenizer, default_template, read_conversations, render
from llmq_jax.data.chat_template import ChatTemplate
from llmq_jax.errors import BadInput

PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Leaves the thought out of all answers but the last, and opens an answer with an empty one.
FORGETFUL = (
    "{% for m in messages %}[{{ m['role'] }}]"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def read(tmp_path, *records):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_conversations(path)


def learned(rendered, train_on="response"):
    return [rendered.text[start:end] for start, end in rendered.chosen(train_on)]


ALPACA = {"instruction": "Say it.", "input": "x 😀", "output": "x."}
CHAT = {"messages": [{"role": "system", "content": "S"}, user("a"), assistant("b"), user("c"), assistant("d\n")]}
PROMPT = {"prompt": "1 + 1 =", "completion": " 2"}
LISTS = {"prompt": [user("a"), assistant("b"), user("c")], "completion": [assistant("d")]}


def test_alpaca(tmp_path):
    full, bare, null = read(tmp_path, ALPACA, {**ALPACA, "input": ""}, {**ALPACA, "input": None, "id": 7})
    opening = f"{PREAMBLE}\n\n### Instruction:\nSay it.\n\n"
    rendered = render(full, "alpaca")
    assert rendered.text == opening + "### Input:\nx 😀\n\n### Response:\nx."
    assert learned(rendered) == ["x."]
    for conversation in (bare, null):
        assert render(conversation, "alpaca").text == opening + "### Response:\nx."
    rendered = render(full, "chat", ChatTemplate(CHATML))
    assert "<|im_start|>user\nSay it.\n\nx 😀<|im_end|>\n" in rendered.text
    assert learned(rendered) == ["x.<|im_end|>\n"]


def test_messages(tmp_path):
    (conversation,) = read(tmp_path, CHAT)
    template = ChatTemplate(CHATML)
    rendered = render(conversation, "chat", template)
    assert rendered.text == template.render(CHAT["messages"], add_generation_prompt=False)
    first, last = "b<|im_end|>\n", "d\n<|im_end|>\n"
    assert learned(rendered) == [first, last]
    assert learned(rendered, "last") == learned(rendered, (1,)) == learned(rendered, (-1, 1)) == [last]
    assert learned(rendered, (0,)) == [first]
    assert learned(rendered, (1, 0)) == [first, last]
    assert learned(rendered, "all") == [rendered.text]
    with pytest.raises(BadInput, match=r"data\.jsonl: line 1 has 2 answers, numbered from 0, and none with .* 2"):
        rendered.chosen((2,))


def test_an_answer_is_found_by_two_beginnings(monkeypatch, tmp_path):
    """Each takes time as the whole conversation does: its prompt with what opens the answer, and up to its end."""
    written = []
    render_as_it_is = ChatTemplate.render

    def counted(self, messages, **variables):
        written.append((len(messages), variables["add_generation_prompt"]))
        return render_as_it_is(self, messages, **variables)

    monkeypatch.setattr(ChatTemplate, "render", counted)
    (conversation,) = read(tmp_path, CHAT)
    render(conversation, "chat", ChatTemplate(CHATML))
    assert written == [(5, False), (2, True), (3, False), (4, True)]


@pytest.mark.parametrize("nothing", [None, [], "[]", ""])
def test_no_tools_are_none_however_they_are_written(tmp_path, nothing):
    """TRL reads a string as JSON."""
    record = {"messages": [user("Hi"), assistant("Hello")]}
    row = {**record, "tools": nothing, "chat_template_kwargs": {}}
    assert read(tmp_path, row)[0].messages == read(tmp_path, record)[0].messages


def test_prompt_and_completion(tmp_path):
    (conversation,) = read(tmp_path, PROMPT)
    rendered = render(conversation, "plain")
    assert (rendered.text, learned(rendered)) == ("1 + 1 = 2", [" 2"])
    assert learned(render(conversation, "chat", ChatTemplate(CHATML))) == [" 2<|im_end|>\n"]
    assert render(conversation, "alpaca").text.endswith("### Instruction:\n1 + 1 =\n\n### Response:\n 2")
    (conversation,) = read(tmp_path, LISTS)
    rendered = render(conversation, "chat", ChatTemplate(CHATML))
    assert learned(rendered) == ["d<|im_end|>\n"], "an answer in the prompt is given"


def test_question_and_answer(tmp_path):
    """As an instruction and its output, with a calculator's marks as they are; beside a form of its own they are no
    more than other fields."""
    answer = "48/2 = <<48/2=24>>24\n#### 24"
    asked, told = read(tmp_path, {"question": "How many?", "answer": answer}, {"instruction": "a", "output": "b"})
    assert (asked.form, asked.given) == (told.form, told.given) == ("alpaca", 1)
    assert asked.messages == (user("How many?"), assistant(answer))
    assert learned(render(asked, "alpaca")) == [answer]
    assert default_template([asked], ByteTokenizer()) == "alpaca"
    for record in (PROMPT, ALPACA, CHAT, {"text": "x"}):
        (alone,), (beside,) = read(tmp_path, record), read(tmp_path, {**record, "question": "q", "answer": "a"})
        assert alone == beside


def said(who, text):
    return {"from": who, "value": text}


SHAREGPT = {"conversations": [said("system", "S"), said("human", "a"), said("gpt", "b"), said("user", "c")], "id": "x"}
SHAREGPT["conversations"].append(said("assistant", "d\n"))


def test_sharegpt(tmp_path):
    """As messages, whatever it calls who says them; in the other fields of messages too, and beside them."""
    (shared,), (chat,) = read(tmp_path, SHAREGPT), read(tmp_path, CHAT)
    assert shared == chat
    turns = SHAREGPT["conversations"]
    (shared,), (lists,) = read(tmp_path, {"prompt": turns[1:4], "completion": turns[4:]}), read(tmp_path, LISTS)
    assert shared.messages[:3] == lists.messages[:3] and shared.given == lists.given == 3
    assert read(tmp_path, {"messages": turns})[0].messages == chat.messages
    assert read(tmp_path, {"conversations": CHAT["messages"]})[0].messages == chat.messages
    assert len(read(tmp_path, SHAREGPT, CHAT)) == 2, "one form"


def test_sharegpt_in_parquet(tmp_path):
    pq.write_table(pa.Table.from_pylist([SHAREGPT]), tmp_path / "a.parquet")
    (found,) = read_conversations(tmp_path / "a.parquet")
    assert found.messages == read(tmp_path, CHAT)[0].messages


def test_sharegpt_as_trl_converts_it(tmp_path):
    """TRL leaves the names of who says something as they are, which then are roles that no template knows: where they
    are roles, the messages are the same; human is the user, and gpt the assistant."""
    trl = pytest.importorskip("trl")
    turns = [("system", "S"), ("user", "é 😀"), ("assistant", " b\n"), ("user", "c"), ("assistant", "d")]
    named = {"user": "human", "assistant": "gpt"}
    records = [
        {"conversations": [said(*turn) for turn in turns]},
        {"conversations": [user("x"), assistant("y")]},
        {"prompt": [said(*turn) for turn in turns[:2]], "completion": [said(*turns[2])]},
        {"messages": [said(*turn) for turn in turns[1:]]},
    ]
    for record in records:
        (ours,) = read(tmp_path, record)
        theirs = trl.data_utils.maybe_convert_to_chatml(json.loads(json.dumps(record)))
        whole = theirs["messages"] if "messages" in theirs else theirs["prompt"] + theirs["completion"]
        assert list(ours.messages) == whole
        renamed = {
            field: [
                {**each, "from": named.get(each["from"], each["from"])} if "from" in each else each for each in value
            ]
            for field, value in record.items()
        }
        assert read(tmp_path, renamed)[0] == ours


def test_text(tmp_path):
    (conversation,) = read(tmp_path, {"text": "all of it"})
    rendered = render(conversation, "plain")
    assert learned(rendered, "all") == ["all of it"]
    with pytest.raises(BadInput, match=r"has no answer to a prompt: train on all of it \(--train-on all, "):
        rendered.chosen("response")
    with pytest.raises(BadInput, match="only the template 'plain'"):
        render(conversation, "alpaca")


def test_a_template_that_rewrites_answers(tmp_path):
    """What opens an answer need not stand before one that was given; where a rewritten one ends, nobody knows."""
    (conversation,) = read(tmp_path, CHAT)
    rendered = render(conversation, "chat", ChatTemplate(FORGETFUL))
    assert rendered.text == "[system]S</s>[user]a</s>[assistant]b</s>[user]c</s>[assistant]<think></think>d\n</s>"
    assert learned(rendered, "last") == ["</think>d\n</s>"]
    with pytest.raises(BadInput, match=r"line 1 has an answer that the chat template writes in another way.*last one"):
        rendered.chosen("response")
    # Nor where an answer begins, if the prompt before it is rewritten.
    said = "[{{ m.role }}{{ '!' if loop.last }}]{{ m.content }}"
    marking = f"{{% for m in messages %}}{said}{{% endfor %}}{{% if add_generation_prompt %}}[assistant!]{{% endif %}}"
    with pytest.raises(BadInput, match="in another way"):
        render(conversation, "chat", ChatTemplate(marking)).chosen("last")


def test_a_template_that_ends_what_opens_no_answer(tmp_path):
    """As Phi-3's: the prompt that an answer follows is another beginning than the prompt alone."""
    ending = CHATML.replace("{% endif %}", "{% else %}<|endoftext|>{% endif %}")
    (conversation,) = read(tmp_path, CHAT)
    rendered = render(conversation, "chat", ChatTemplate(ending))
    assert learned(rendered, "last") == ["d\n<|im_end|>\n<|endoftext|>"]
    with pytest.raises(BadInput, match="train on the last one only"):
        rendered.chosen("response")


def test_a_template_that_leaves_out_the_answer(tmp_path):
    """As those for images do with plain text."""
    (conversation,) = read(tmp_path, CHAT)
    with pytest.raises(BadInput, match=r"line 1: the chat template leaves out a part of what messages\[2\] says"):
        render(
            conversation,
            "chat",
            ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content if m.role != 'assistant' }}{% endfor %}"),
        )


THOUGHT = {"messages": [user("a"), assistant("<think>\nlong  ago\n</think>\n\n b ")]}


def test_a_template_that_leaves_out_a_part_of_the_answer(tmp_path):
    """As DeepSeek-R1's, which drops the thought of every answer: the last word is there all the same."""
    (conversation,) = read(tmp_path, THOUGHT)
    forgetful = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    with pytest.raises(BadInput, match=r"line 1: the chat template leaves out a part of what messages\[1\] says"):
        render(conversation, "chat", ChatTemplate(forgetful))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<think>\nlong  ago\n</think>\n\n b <|im_end|>\n"),
        (CHATML.replace("m['content']", "m['content'] | trim"), "<think>\nlong  ago\n</think>\n\n b<|im_end|>\n"),
        (CHATML.replace("assistant\n", "assistant\n<think>\n"), "long  ago\n</think>\n\n b <|im_end|>\n"),
    ],
)
def test_an_answer_may_be_trimmed_and_its_beginning_open_it(tmp_path, template, expected):
    (conversation,) = read(tmp_path, THOUGHT)
    assert learned(render(conversation, "chat", ChatTemplate(template))) == [expected]


def test_batches_do_not_depend_on_the_day(tmp_path):
    (conversation,) = read(tmp_path, CHAT)
    rendered = render(conversation, "chat", ChatTemplate("{{ strftime_now('%d %b %Y') }}" + CHATML))
    assert rendered.text.startswith("26 Jul 2024<|im_start|>system")


def test_other_files(tmp_path):
    pq.write_table(pa.Table.from_pylist([CHAT, CHAT]), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text('instruction,input,output\nSay it.,"x 😀",x.\n')
    (tmp_path / "a.json").write_text(json.dumps([ALPACA]))
    first, second = read_conversations(tmp_path / "a.parquet")
    assert [dict(message) for message in first.messages] == CHAT["messages"]
    assert second.where.endswith("a.parquet: row 2")
    csv, js = (read_conversations(tmp_path / name)[0] for name in ("a.csv", "a.json"))
    assert render(csv, "alpaca").text == render(js, "alpaca").text


def test_a_folder_of_files(tmp_path):
    """Of any formats, and of one form."""
    (tmp_path / "a.jsonl").write_text(json.dumps(CHAT))
    pq.write_table(pa.Table.from_pylist([CHAT, CHAT]), tmp_path / "b.parquet")
    found = read_conversations(tmp_path)
    assert [each.where for each in found] == [
        f"{tmp_path}/{place}" for place in ("a.jsonl: line 1", "b.parquet: row 1", "b.parquet: row 2")
    ]
    (tmp_path / "c.csv").write_text("instruction,output\na,b\n")
    with pytest.raises(
        BadInput, match=r"c\.csv: line 2 has the fields of the form 'alpaca' and .*a\.jsonl: line 1 those"
    ):
        read_conversations(tmp_path)
    (tmp_path / "c.csv").write_text("instruction,result\na,b\n")
    with pytest.raises(BadInput, match=r"c\.csv: line 2 is no conversation \(fields found: instruction, result\)"):
        read_conversations(tmp_path)


def test_default_template(tmp_path):
    plain, chat = ByteTokenizer(), ByteTokenizer().with_chat_template(CHATML)
    for record, without, with_template in (
        (ALPACA, "alpaca", "chat"),
        (CHAT, "chat", "chat"),
        (LISTS, "chat", "chat"),
        (PROMPT, "plain", "plain"),
        ({"text": "x"}, "plain", "plain"),
    ):
        conversations = read(tmp_path, record)
        assert (default_template(conversations, plain), default_template(conversations, chat)) == (
            without,
            with_template,
        )


BAD = [
    (
        {"question": "x", "reply": "y"},
        r"is no conversation \(fields found: question, reply\): it needs .*; or prompt, c.*; or question, answer; --",
    ),
    (
        {"instruction": "x", "input": "y"},
        r"\(fields found: instruction, input\): it needs output too, or the fields mes",
    ),
    (
        {"prompt": "x", "question": "y"},
        r"prompt, question\): it needs completion or answer too, or the fields messages",
    ),
    ({"question": "x", "answer": None}, r"is no conversation \(fields found: question; null: answer\)"),
    ({"question": "x", "answer": 2}, r"field 'answer' must be a string, not a number"),
    ({"question": "x", "answer": ""}, r"field 'answer': the response is empty"),
    ({"question": "x", "answer": "y", "choices": ["y", "z"]}, r"has 'choices', which is not read: write it into the"),
    ({"question": "x", "answer": "y", "context": "z"}, r"has 'context', which is not read: write it into the"),
    ({"prompt": "x", "completion": "y", "label": False}, r"label is false, and an answer that is not wanted would be"),
    ({**ALPACA, "output": " \n"}, r"field 'output': the response is empty"),
    ({**ALPACA, "output": 5}, r"field 'output' must be a string, not a number"),
    ({**ALPACA, "input": ["x"]}, r"field 'input' must be a string, not a list"),
    ({**PROMPT, "completion": ""}, r"field 'completion': the response is empty"),
    ({**PROMPT, "completion": [assistant("x")]}, r"prompt and completion must both be strings, or both"),
    ({"messages": "hello"}, r"field 'messages' must be a list of .*, not 'hello'"),
    ({"messages": []}, r"field 'messages' must be a list"),
    ({"messages": [user("x"), "y"]}, r"messages\[1\] must be \{\"role\""),
    ({"messages": [{"role": "user"}]}, r"messages\[0\] has no field 'content' \(fields found: role\)"),
    (
        {"messages": [{"role": "critic", "content": "x"}]},
        r"messages\[0\] has the role 'critic': choose from system, dev",
    ),
    ({"messages": [{"role": ["user"], "content": "x"}]}, r"messages\[0\] has the role \['user'\]"),
    ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]: content must be a string, not null"),
    ({"messages": [user("x"), assistant(" ")]}, r"messages\[1\]: the response is empty"),
    (
        {"prompt": [user("x"), assistant(""), user("y")], "completion": [assistant("z")]},
        r"prompt\[1\]: the assistant says nothing",
    ),
    (
        {"messages": [user("x"), {**assistant("y"), "weight": 0.5}]},
        r"messages\[1\]: weight is 0\.5: only 0 \(not learned\) and 1 \(learned\) are read: write one of",
    ),
    ({"messages": [user("x"), {**assistant("y"), "train": "false"}]}, r"messages\[1\]: train is 'false': only 0 \("),
    ({"messages": [user("x"), assistant("y")], "functions": [{"name": "z"}]}, r"has 'functions', which is not read"),
    ({**ALPACA, "system": "You are terse."}, r"has 'system', which is not read: write it into the text"),
    ({**PROMPT, "system": "You are terse."}, r"has 'system', which is not read: write it into the text"),
    ({"messages": [user("\ud800")]}, r"messages\[0\]: content: half a surrogate pair"),
    (
        {"conversations": [said("human", "x"), said("chatgpt", "y")]},
        r"conversations\[1\] is from 'chatgpt': choose from system, human, user, gpt, assistant, f",
    ),
    ({"conversations": [said(["human"], "x")]}, r"conversations\[0\] is from \['human'\]"),
    (
        {"conversations": [said("human", "x"), {"from": "gpt"}]},
        r"conversations\[1\] has no field 'value' \(fields found",
    ),
    ({"conversations": [{"value": "x"}]}, r"conversations\[0\] has no field 'from' \(fields found: value\)"),
    ({"conversations": [said("human", 5)]}, r"conversations\[0\]: value must be a string, not a number"),
    ({"conversations": [said("human", "x"), said("gpt", "")]}, r"conversations\[1\]: the response is empty"),
    (
        {"conversations": []},
        r"field 'conversations' must be a list of \{\"from\": \.\.\., \"value\": \.\.\.\}, not \[\]",
    ),
    (
        {"conversations": [said("human", "x"), {**said("gpt", "y"), "weight": -1}]},
        r"conversations\[1\]: weight is -1: only 0",
    ),
    ({**SHAREGPT, "system": "Be brief."}, r"has 'system', which is not read: write it into the text"),
    ({**CHAT, **SHAREGPT}, r"has 'conversations', which is not read: .*, or remove it"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_bad_records(tmp_path, record, message):
    with pytest.raises(BadInput, match=rf"data\.jsonl: line 2.*{message}") as caught:
        read(tmp_path, PROMPT, record)
    assert "\n" not in str(caught.value)


def test_forms_are_not_mixed(tmp_path):
    with pytest.raises(BadInput, match=r"line 2 has the fields of the form 'alpaca' and .*line 1 those of 'prompt'"):
        read(tmp_path, PROMPT, ALPACA)


@pytest.mark.parametrize(
    ("record", "template", "message"),
    [
        (CHAT, "alpaca", r"takes one message of the user and one answer, not system, user, assistant, user, assistant"),
        (CHAT, "plain", r"a prompt and a completion, both strings; choose 'alpaca', for one question"),
        (ALPACA, "plain", r"is for records with a prompt and a completion"),
        (CHAT, "chat", r"the model has no chat template"),
        (CHAT, "llama", r"unknown template 'llama': choose from alpaca, chat, plain"),
    ],
)
def test_templates_without_a_place(tmp_path, record, template, message):
    (conversation,) = read(tmp_path, record)
    with pytest.raises(BadInput, match=message):
        render(conversation, template)


def test_what_a_chat_template_refuses_names_the_row(tmp_path):
    (conversation,) = read(tmp_path, CHAT)
    with pytest.raises(BadInput, match=r"data\.jsonl: line 1: the chat template refused .*no system"):
        render(conversation, "chat", ChatTemplate("{{ raise_exception('no system') }}"))


def test_who_begins_answers_nothing(tmp_path):
    (conversation,) = read(tmp_path, {"messages": [assistant("hello"), user("x"), assistant("y")]})
    rendered = render(conversation, "chat", ChatTemplate(CHATML))
    for train_on in ("response", (0,)):
        with pytest.raises(BadInput, match=r"line 1 begins with the assistant"):
            rendered.chosen(train_on)
    assert learned(rendered, "last") == ["y<|im_end|>\n"] and learned(rendered, "all") == [rendered.text]
