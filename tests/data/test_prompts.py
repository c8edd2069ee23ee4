"""Prompts and what else is known of them, from all forms of records; which of them a step asks; what is refused."""

import json

import numpy as np
import pytest

from llmq_jax.data import ByteTokenizer, FileTokenizer
from llmq_jax.data.prompts import PromptBatches, columns_of, read_prompts, step_seeds
from llmq_jax.errors import BadInput

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = ByteTokenizer()


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    PLAIN.save(folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    return FileTokenizer(folder)


@pytest.fixture
def read(tmp_path):
    """`read(records, tokenizer, **options)` of a file of these records."""

    def call(records, tokenizer=PLAIN, **options):
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return read_prompts(path, tokenizer, **options)

    return call


def user(text):
    return {"role": "user", "content": text}


def test_strings_are_read_as_they_are(read, monkeypatch):
    records = [{"prompt": "1 + 1 =", "answer": 2}, {"prompt": " é\n", "answer": None}]
    prompts, dropped = read(records)
    assert dropped == 0
    assert [prompt.text for prompt in prompts] == ["1 + 1 =", " é\n"]
    assert [prompt.tokens for prompt in prompts] == [list(prompt.text.encode()) for prompt in prompts]
    assert columns_of(prompts, 2) == {"answer": [2, 2, None, None]}
    assert prompts[1].where.endswith("prompts.jsonl: line 2")
    monkeypatch.setattr(ByteTokenizer, "beginning", (256,))  # as Llama's begins a text
    assert read(records)[0][0].tokens == [256, *b"1 + 1 ="]


def test_a_format_makes_prompts_of_any_fields(read):
    records = [{"question": "Which {one}?", "number": 3, "answer": "#### 4"}]
    (prompt,), _ = read(records, prompt_format="{number:02d}. {question} {{}}\nAnswer:")
    assert prompt.text == "03. Which {one}? {}\nAnswer:"
    assert prompt.columns == records[0]  # rewards may look at all of them
    (prompt,), _ = read([{"prompt": "2", "answer": "2"}], prompt_format="Q: {prompt}")
    assert (prompt.text, prompt.columns) == ("Q: 2", {"answer": "2"})
    (prompt,), _ = read([{"prompt": "2", "system": "Add."}], prompt_format="{system} {prompt}")
    assert (prompt.text, prompt.columns) == ("Add. 2", {"system": "Add."})


def test_a_format_names_fields_with_spaces(read):
    (prompt,), _ = read([{"Question Text": "1 + 1?", "answer": "2"}], prompt_format="Q: {Question Text}")
    assert (prompt.text, prompt.columns) == ("Q: 1 + 1?", {"Question Text": "1 + 1?", "answer": "2"})


def test_tables_have_prompts_too(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text('prompt,answer\n"1, 2, ",3\n')
    (prompt,), _ = read_prompts(path, PLAIN)
    assert (prompt.text, prompt.columns) == ("1, 2, ", {"answer": "3"})


def test_a_folder_of_files_with_the_same_fields(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,answer\nx,3\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "y", "answer": "4"}\n')
    prompts, _ = read_prompts(tmp_path, PLAIN)
    assert [(prompt.text, prompt.columns) for prompt in prompts] == [("x", {"answer": "3"}), ("y", {"answer": "4"})]
    (tmp_path / "c.jsonl").write_text('{"prompt": "y"}\n')
    with pytest.raises(
        BadInput, match=r"c\.jsonl: line 1 has the fields none beside the prompt, and .*a\.csv: line 2 ans"
    ):
        read_prompts(tmp_path, PLAIN)


def test_the_fields_of_most_rows_count(read):
    """Also where the first has others."""
    left_out = []
    rows = [{"prompt": "a"}, {"prompt": "b", "answer": "1"}, {"prompt": "c", "answer": "2"}]
    assert [prompt.text for prompt in read(rows, left_out=left_out)[0]] == ["b", "c"]
    (error,) = left_out
    assert "line 1 has the fields none beside the prompt" in str(error)


def test_the_chat_template_asks_for_an_answer(read, chat):
    """Of messages, and of strings where the model has a template; `plain` leaves strings as they are."""
    messages = [{"role": "system", "content": "Be brief."}, user("Hi")]
    (of_messages, of_string), _ = read([{"prompt": messages}, {"prompt": "Hi"}], chat)
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert of_string.text == asked
    assert of_messages.text == f"<|im_start|>system\nBe brief.<|im_end|>\n{asked}"
    assert chat.decode(of_messages.tokens) == of_messages.text
    assert chat.end_of_text in read([{"prompt": [user("<|endoftext|>")]}], chat)[0][0].tokens  # as templates spell it
    shared = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}]
    assert read([{"prompt": shared}], chat)[0][0].text == of_messages.text
    spoken = [user("a"), {"role": "assistant", "content": "b"}, user("c")]
    weighted = [{**message, "weight": 0} for message in spoken]
    assert read([{"prompt": weighted}], chat)[0][0].text == read([{"prompt": spoken}], chat)[0][0].text
    assert read([{"prompt": "Hi"}], chat, template="chat")[0][0].text == asked
    assert read([{"prompt": "Hi"}], chat, template="plain")[0][0].text == "Hi"
    assert read([{"question": "Hi", "tools": "a hammer"}], chat, prompt_format="{question}")[0][0].text == asked


def test_the_chat_template_is_given_a_records_tools(read, tmp_path):
    PLAIN.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ tools[0]['name'] }}:" + CHATML)
    (prompt,), _ = read([{"prompt": "x", "tools": [{"name": "search"}]}], FileTokenizer(tmp_path))
    assert prompt.text.startswith("search:<|im_start|>user")


def test_prompts_do_not_depend_on_the_day(read, tmp_path):
    """Or a run could not go on after midnight."""
    PLAIN.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + CHATML)
    (prompt,), _ = read([{"prompt": [user("x")]}], FileTokenizer(tmp_path))
    assert prompt.text.startswith("26 Jul 2024<|im_start|>user")


def test_prompts_that_are_too_long_are_left_out_and_counted(read):
    prompts, dropped = read([{"prompt": "12345"}, {"prompt": "1234"}, {"prompt": "123456"}], longest=4)
    assert [prompt.text for prompt in prompts] == ["1234"]
    assert dropped == 2


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([{"question": "a"}], {}, "line 1 has no field 'prompt' (fields found: question): have one, or say how it is"),
        ([{"prompt": "a"}, {"prompt": " \n"}], {}, "line 2: the prompt is empty, so there is nothing to answer"),
        ([{"prompt": [user(" ")]}], {}, "line 1: the prompt is empty, so there is nothing to answer"),
        ([{"prompt": 3}], {}, "line 1: the prompt must be a string or a list of messages, not 3"),
        ([{"prompt": [{"role": "user"}]}], {}, "prompt[0] has no field 'content'"),
        ([{"prompt": "\ud800"}], {}, "half a surrogate pair at character 0"),
        ([{"prompt": [user("a")]}], {}, "line 1: the model has no chat template: use strings and the template 'plain'"),
        ([{"prompt": "a"}], {"template": "chat"}, "the model has no chat template"),
        ([{"prompt": [user("a")]}], {"template": "plain"}, "the template 'plain' is for prompts that are strings"),
        (
            [{"prompt": [user("a"), {"role": "assistant", "content": "b"}]}],
            {},
            "line 1: the prompt ends with a message of the assistant",
        ),
        ([{"prompt": "a"}], {"template": "alpaca"}, "unknown template 'alpaca' for prompts: choose from chat, plain"),
        (
            [{"prompt": "a", "answer": "1"}, {"prompt": "b"}],
            {},
            "line 2 has the fields none beside the prompt, and",
        ),
        ([{"prompt": "a", "completions": "b"}], {}, "has a field 'completions', which reward functions are given"),
        ([{"prompt": "a", "system": "b"}], {}, "line 1 has 'system', which is not read: write it into the text, or"),
        ([{"prompt": [user("a")], "system": "b"}], {}, "line 1 has 'system', which is not read: write it into the"),
        ([{"prompt": "abc"}, {"prompt": "abcd"}], {"longest": 2}, "longer than 2 tokens, the shortest has 3"),
        ([{"q": "a"}], {"prompt_format": "Q:"}, "the prompt format names no field, so all prompts would be the same"),
        ([{"q": "a"}], {"prompt_format": "{q"}, "the prompt format '{q' is broken"),
        ([{"q": "a"}], {"prompt_format": "{q.upper}"}, "holds {q.upper}, which is no name of a field"),
        ([{"q": "a"}], {"prompt_format": "{the q}"}, "holds {the q}, which is no name of a field"),
        ([{"q": "a"}], {"prompt_format": "{}"}, "holds {}, which is no name of a field"),
        ([{"q": "a"}], {"prompt_format": "{p}"}, "has no field 'p' (fields found: q): choose one with --prompt-format"),
        ([{"q": "a"}, {"q": None}], {"prompt_format": "{q}"}, "line 2: field 'q' must be a string or a number"),
        ([{"q": "a"}], {"prompt_format": "{q:99999999999999}"}, "the prompt format pads {q} by '99999999999999': no p"),
        ([{"q": "a", "n": 10**14}], {"prompt_format": "{q:{n}}"}, "line 1: the prompt of the format '{q:{n}}' fits no"),
        ([{"q": "a"}], {"prompt_format": "{q:d}"}, "line 1: the prompt format '{q:d}' cannot be filled"),
        ([{"q": " "}], {"prompt_format": "{q}"}, "line 1: the prompt is empty"),
    ],
)
def test_bad_prompts_are_named(read, records, options, message):
    with pytest.raises(BadInput) as refused:
        read(records, **options)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("count", "size"), [(5, 2), (3, 7), (4, 4), (1, 2)])
def test_each_epoch_asks_every_prompt_once(count, size):
    batches = PromptBatches(count, size, seed=3)
    asked = np.concatenate([batches[step]["prompts"] for step in range(3 * count)])
    epochs = asked.reshape(-1, count)
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    if count == 5:
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_step_asks_the_same_whatever_was_asked_before():
    backwards = PromptBatches(5, 3, seed=1)
    last = {step: backwards[step] for step in reversed(range(12))}
    for step in range(12):
        fresh = PromptBatches(5, 3, seed=1)[step]
        assert fresh["step"] == step == last[step]["step"]
        np.testing.assert_array_equal(fresh["prompts"], last[step]["prompts"])
    found = [PromptBatches(5, 3, seed=1)[step]["prompts"].tolist() for step in range(4)]
    assert found == [[2, 0, 1], [4, 3, 0], [2, 1, 3], [4, 3, 2]]  # in every version, or a resumed run would ask others
    other = PromptBatches(5, 3, seed=2)
    assert any((other[step]["prompts"] != last[step]["prompts"]).any() for step in range(12))


def test_every_row_draws_by_a_seed_of_its_own():
    drawn = {(step, stream): step_seeds(7, step, 16, stream) for step in range(8) for stream in range(3)}
    everything = [seed for seeds in drawn.values() for seed in seeds]
    assert len(set(everything)) == len(everything)
    assert step_seeds(7, 3, 16, 1) == drawn[3, 1]
    assert step_seeds(8, 3, 16, 1) != drawn[3, 1]
    assert step_seeds(7, 3, 2, 1) == [1060801321, 3103788793]  # in every version, or a resumed run would draw others
    assert all(0 <= seed < 2**32 for seed in everything)
