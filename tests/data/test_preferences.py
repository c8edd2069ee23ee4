"""Preference pairs in all the forms that people keep them in, as text, tokens and masks; and what is refused."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmq_jax.data import (
    ByteTokenizer,
    GPT2Tokenizer,
    chat_ending,
    default_template,
    read_preferences,
    split_preferences,
    tokenize_preferences,
    without_padding,
)
from llmq_jax.data.chat_template import ChatTemplate
from llmq_jax.errors import BadInput
from tests.documented import ROOT

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


ALPACA = {"instruction": "Say it.", "input": "x 😀", "output": "ignored", "chosen": "x.", "rejected": "No!"}
STRINGS = {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3, é"}
LISTS = {
    "prompt": [user("a"), assistant("b"), user("c")],
    "chosen": [assistant("d")],
    "rejected": [assistant("e"), user("f"), assistant("g")],
}
MIXED = {**LISTS, "chosen": "d", "rejected": "e"}
BOTH = {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
IMPLICIT = {side: LISTS["prompt"] + LISTS[side] for side in ("chosen", "rejected")}


@pytest.fixture
def read(tmp_path):
    def read(*records):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return read_preferences(path)

    return read


@pytest.fixture
def chat():
    return ByteTokenizer().with_chat_template(CHATML)


def parts(tokenizer, preferences, template, **arguments):
    """[(prompt and what else is no response, response) of the chosen and of the rejected side] of each pair."""
    found = tokenize_preferences(preferences, tokenizer, template=template, **{"context": 500, **arguments})
    return [
        [
            tuple(tokenizer.decode(side.tokens[mask].tolist()) for mask in (~side.learned, side.learned))
            for side in (pair.chosen, pair.rejected)
        ]
        for pair in found.pairs
    ]


END = "<|endoftext|>"


def test_alpaca(read, chat):
    pairs = read(ALPACA, {**ALPACA, "input": None})
    ((chosen, rejected), (bare, _)) = parts(ByteTokenizer(), pairs, "alpaca")
    assert chosen[0].endswith("### Instruction:\nSay it.\n\n### Input:\nx 😀\n\n### Response:\n")
    assert chosen[1] == "x." + END and rejected == (chosen[0], "No!" + END)
    assert bare[0].endswith("### Instruction:\nSay it.\n\n### Response:\n")
    by_chat = "<|im_start|>user\nSay it.\n\nx 😀<|im_end|>\n<|im_start|>assistant\n"
    assert parts(chat, pairs, "chat")[0] == [(by_chat, "x.<|im_end|>\n"), (by_chat, "No!<|im_end|>\n")]


def test_strings(read):
    assert parts(ByteTokenizer(), read(STRINGS), "plain") == [[("1 + 1 =", " 2" + END), ("1 + 1 =", " 3, é" + END)]]


@pytest.mark.parametrize("record", [LISTS, IMPLICIT], ids=["prompt", "implicit prompt"])
def test_messages(read, chat, record):
    """The assistant's part of what follows the prompt is the response."""
    ((chosen, rejected),) = parts(chat, read(record), "chat")
    opened = "<|im_start|>assistant\n"
    prompt = f"<|im_start|>user\na<|im_end|>\n{opened}b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n{opened}"
    assert chosen == (prompt, "d<|im_end|>\n")
    assert rejected == (f"{prompt}<|im_start|>user\nf<|im_end|>\n{opened}", "e<|im_end|>\ng<|im_end|>\n")


def test_transcripts(read, chat):
    """Turns are messages, whose common beginning is the prompt; only a speaker after an empty line begins one."""
    talk = "\n\nHuman: a\n\nb: Human: c\n\nAssistant: d\n\nHuman:e \n\nAssistant:"
    pairs = read({"chosen": f"{talk} f\nHuman: g", "rejected": f"{talk} h\n", "margin": 2})
    turns = [user("a\n\nb: Human: c"), assistant("d"), user("e")]
    same = read({"chosen": [*turns, assistant("f\nHuman: g")], "rejected": [*turns, assistant("h")]})
    assert parts(chat, pairs, "chat") == parts(chat, same, "chat")
    assert pairs.pairs[0].prompt == same.pairs[0].prompt and pairs.pairs[0].margin == 2
    windows = {side: f"{talk} {side}".replace("\n", "\r\n") for side in ("chosen", "rejected")}
    roles = [message["role"] for message in read(windows).pairs[0].chosen.messages]
    assert roles == ["user", "assistant", "user", "assistant"]
    quoted = read({"instruction": "a", **windows}).pairs[0].chosen
    assert quoted.messages == (user("a"), assistant(windows["chosen"]))


def test_the_documented_template_writes_transcripts(read, chat):
    (text,) = re.findall(r"```jinja\n(.*?)```", (ROOT / "docs" / "reward.md").read_text(), re.DOTALL)
    chat.chat_template = ChatTemplate(text, {"eos_token": END})
    talk = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    ((chosen, rejected),) = parts(chat, read({"chosen": f"{talk} d", "rejected": f"{talk} e"}), "chat")
    assert chosen == (talk, f" d{END}") and rejected == (talk, f" e{END}")


@pytest.mark.parametrize("record", [LISTS, IMPLICIT], ids=["prompt", "implicit prompt"])
def test_marked_messages(read, chat, record):
    """Those of the prompt are learned in no case; of an answer in several messages some may be; none is refused."""
    record = json.loads(json.dumps(record))
    assert parts(chat, read(record), "chat") == parts(chat, read(marked(record, "b", "f")), "chat")
    ((_, rejected),) = parts(chat, read(marked(record, "e")), "chat")
    assert rejected[1] == "g<|im_end|>\n"
    for messages in (("d",), ("e", "g")):
        with pytest.raises(BadInput, match=r"pairs\.jsonl: line 1 has no answer to learn: all that are chosen are"):
            parts(chat, read(marked(record, *messages)), "chat")


def marked(record, *texts):
    """The record with weight 0 at messages of these texts, on one side alone for those that both sides have."""
    done = set()

    def mark(message):
        if message["content"] not in texts or message["content"] in done:
            return message
        done.add(message["content"])
        return {**message, "weight": 0}

    return {field: [mark(message) for message in messages] for field, messages in record.items()}


def test_messages_beside_their_prompt_as_a_string(read):
    """As in UltraFeedback, whose `prompt` is what the user says in the messages."""
    system = {"role": "system", "content": "s"}
    spoken = {side: [system, *BOTH[side]] for side in ("chosen", "rejected")}
    for record in (BOTH, BOTH | spoken):
        implicit = {side: record[side] for side in ("chosen", "rejected")}
        (found,), (expected,) = read(record).pairs, read(implicit).pairs
        assert found == expected


def test_messages_of_sharegpt(read):
    names = {"user": "human", "assistant": "gpt"}
    for record in (LISTS, IMPLICIT):
        renamed = {
            field: [{"from": names[message["role"]], "value": message["content"]} for message in messages]
            for field, messages in record.items()
        }
        assert read(renamed).pairs == read(record).pairs


def test_answers_to_messages_may_be_strings(read, chat):
    ((chosen, rejected),) = parts(chat, read(MIXED), "chat")
    assert chosen[0] == rejected[0] and (chosen[1], rejected[1]) == ("d<|im_end|>\n", "e<|im_end|>\n")


def test_pairs_of_equal_answers_are_counted(read):
    beginning = LISTS["prompt"][:2]
    found = read(IMPLICIT, dict.fromkeys(IMPLICIT, IMPLICIT["chosen"]), dict.fromkeys(IMPLICIT, beginning))
    assert (len(found), found.equal) == (1, 2)
    found = read(STRINGS, {**STRINGS, "rejected": " 2"}, {**STRINGS, "rejected": " 2 "})
    assert (len(found), found.equal) == (2, 1) and [pair.where[-6:] for pair in found] == ["line 1", "line 3"]
    with pytest.raises(BadInput, match=r"pairs\.jsonl: the chosen and the rejected answer are the same in every row"):
        read({**STRINGS, "rejected": " 2"})


def test_margins(read, tmp_path):
    found = read(STRINGS, {**STRINGS, "margin": 2}, {**STRINGS, "margin": -0.5}, {**STRINGS, "margin": None})
    assert [pair.margin for pair in found] == [None, 2.0, -0.5, None]
    examples = tokenize_preferences(found, ByteTokenizer(), template="plain", context=50)
    assert [pair.margin for pair in examples.pairs] == [None, 2.0, -0.5, None]
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,margin\na,b,c,0.25\na,b,d,\n")
    assert [pair.margin for pair in read_preferences(tmp_path / "a.csv")] == [0.25, None]


def test_other_files(tmp_path):
    pq.write_table(pa.Table.from_pylist([LISTS, LISTS]), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps([LISTS]))
    one, other = read_preferences(tmp_path / "a.parquet"), read_preferences(tmp_path / "a.json")
    assert one.pairs[0].chosen.messages == other.pairs[0].chosen.messages
    assert one.pairs[1].where.endswith("a.parquet: row 2")


def test_a_folder_of_files(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\na,b,c\na,b,b\n")
    (tmp_path / "b.json").write_text(json.dumps([STRINGS]))
    found = read_preferences(tmp_path)
    assert found.equal == 1
    assert [pair.where for pair in found] == [f"{tmp_path}/a.csv: line 2", f"{tmp_path}/b.json: row 1"]
    (tmp_path / "c.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b"}))
    with pytest.raises(BadInput, match=r"c\.jsonl: line 1 is no preference pair \(fields found: prompt, chosen\)"):
        read_preferences(tmp_path)


def test_default_template(read, chat):
    for record, without, with_template in (
        (ALPACA, "alpaca", "chat"),
        (STRINGS, "plain", "plain"),
        (LISTS, "chat", "chat"),
        (MIXED, "chat", "chat"),
        (IMPLICIT, "chat", "chat"),
    ):
        chosen = [pair.chosen for pair in read(record)]
        assert [default_template(chosen, tokenizer) for tokenizer in (ByteTokenizer(), chat)] == [
            without,
            with_template,
        ]


def test_too_long(read):
    """ "1 + 1 =" are 7 tokens, the answers 2 and 4 with what ends them 3 and 5 more."""
    short, long = STRINGS, {**STRINGS, "rejected": " 30 or 40"}
    pairs, tokenizer = read(short, long), ByteTokenizer()
    assert "é" in short["rejected"]  # two bytes
    found = tokenize_preferences(pairs, tokenizer, template="plain", context=15)
    assert (len(found), found.truncated, found.dropped) == (2, 1, 0)
    assert tokenizer.decode(found.pairs[1].rejected.tokens.tolist()) == "1 + 1 = 30 or 4"
    assert found.pairs[1].rejected.cut and not found.pairs[1].chosen.cut
    assert found.tokens == 10 + 14 + 10 + 15 and [len(pair) for pair in found.pairs] == [14, 15]
    assert tokenize_preferences(pairs, tokenizer, template="plain", context=17).truncated == 0
    found = tokenize_preferences(pairs, tokenizer, template="plain", context=15, too_long="drop")
    assert (len(found), found.truncated, found.dropped) == (1, 0, 1)
    with pytest.raises(BadInput, match=r"line 2 has 17 tokens and the context 15: shorten it, .*--too-long"):
        tokenize_preferences(pairs, tokenizer, template="plain", context=15, too_long="error")


def test_what_nothing_is_left_of_is_dropped(read):
    """Both sides need a response, and a difference, within the context."""
    pairs, tokenizer = read(STRINGS, {**STRINGS, "prompt": "1"}), ByteTokenizer()
    found = tokenize_preferences(pairs, tokenizer, template="plain", context=7)
    assert (len(found), found.truncated, found.dropped) == (1, 1, 1)
    # Nine tokens: "1 + 1 = 2" and "1 + 1 = 3"; eight: the same on both sides.
    assert tokenize_preferences(pairs, tokenizer, template="plain", context=9).dropped == 0
    assert tokenize_preferences(pairs, tokenizer, template="plain", context=8).dropped == 1
    # "1", " Saying", end; "1", " Say", " no", end: of the second one nothing but the prompt is within two tokens.
    merged = read({"prompt": "1 Say", "chosen": "ing", "rejected": " no"}, {**STRINGS, "prompt": "1"})
    found = tokenize_preferences(merged, GPT2Tokenizer(), template="plain", context=3)
    assert [len(side.tokens) for side in (found.pairs[0].chosen, found.pairs[0].rejected)] == [3, 3]
    found = tokenize_preferences(merged, GPT2Tokenizer(), template="plain", context=2)
    assert (len(found), found.dropped) == (1, 1) and found.pairs[0].where.endswith("line 2")
    with pytest.raises(BadInput, match="of 1 pair none differs in its responses within the context of 7 tokens"):
        tokenize_preferences(read(STRINGS), tokenizer, template="plain", context=7)

    class Ascii(ByteTokenizer):
        """It knows no other characters: what is left of such a side is the end, before which nothing stands."""

        def encode_with_offsets(self, text, **options):
            ids, offsets = map(np.asarray, super().encode_with_offsets(text, **options))
            return ids[ids < 128].tolist(), offsets[ids < 128]

    pairs = read({"prompt": "é", "chosen": "a", "rejected": "è"}, STRINGS)
    assert tokenize_preferences(pairs, Ascii(), template="plain", context=50).dropped == 1


@pytest.mark.parametrize(("arguments", "message"), [({"context": 1}, "at least 2"), ({"too_long": "cut"}, "too_long")])
def test_arguments(read, arguments, message):
    with pytest.raises(BadInput, match=message):
        tokenize_preferences(read(STRINGS), ByteTokenizer(), **{"template": "plain", "context": 9, **arguments})


def test_no_prompt_is_in_both_parts(read):
    records = [{**STRINGS, "prompt": f"{i % 7}", "rejected": f"{i}"} for i in range(30)]
    pairs = read(*records)
    training, held_out = split_preferences(pairs, 0.3, seed=1)
    prompts = [{pair.prompt for pair in part} for part in (training, held_out)]
    assert len(training) + len(held_out) == 30 and not prompts[0] & prompts[1] and len(prompts[1]) == 2
    numbers = [int(pair.where.split()[-1]) for pair in held_out]
    assert numbers == sorted(numbers)
    assert split_preferences(pairs, 0.3, seed=1)[1] == held_out and split_preferences(pairs, 0.3, seed=2)[1] != held_out
    with pytest.raises(BadInput, match="needs at least 2 different prompts, found 1"):
        split_preferences(read(STRINGS, {**STRINGS, "chosen": "x"}), 0.5)
    # An input is part of the prompt; what is an answer is none.
    assert len({pair.prompt for pair in read(ALPACA, {**ALPACA, "input": "y"}, {**ALPACA, "chosen": "y"})}) == 2
    assert len({pair.prompt for pair in read(LISTS, IMPLICIT, {**LISTS, "prompt": [user("a")]})}) == 2
    assert len({pair.prompt for pair in read(LISTS, {**LISTS, "tools": [{"name": "search"}]})}) == 2


BAD = [
    ({"question": "x"}, r"is no preference pair \(fields found: question\): it needs the fields instruction, chosen"),
    ({"prompt": "x", "chosen": "y"}, r"\(fields found: prompt, chosen\): it needs rejected too, or the fields instruc"),
    ({**STRINGS, "rejected": None}, r"is no preference pair \(fields found: prompt, chosen; null: rejected\)"),
    ({**ALPACA, "prompt": "x"}, "has both an instruction and a prompt"),
    ({**ALPACA, "system": "Be brief."}, "has 'system', which is not read: write it into the text, or remove it"),
    ({**STRINGS, "system": "Be brief."}, "has 'system', which is not read: write it into the text, or remove it"),
    ({**STRINGS, "functions": [{"name": "search"}]}, "has 'functions', which is not read"),
    ({**LISTS, "tools": ["search"]}, r"field 'tools' must be a list of objects, not \['search'\]"),
    ({**IMPLICIT, "conversations": [{"from": "human", "value": "a"}]}, "has 'conversations', which is not read"),
    ({**ALPACA, "chosen": " \n"}, "field 'chosen': the response is empty"),
    ({**ALPACA, "rejected": 5}, "field 'rejected' must be a string, not a number"),
    ({**ALPACA, "chosen": [assistant("x")]}, "field 'chosen' must be a string, not a list"),
    ({**ALPACA, "instruction": " ", "input": ""}, "the prompt is empty, so there is nothing to answer"),
    ({**STRINGS, "prompt": "\n"}, "the prompt is empty"),
    ({**STRINGS, "rejected": ""}, "field 'rejected': the response is empty"),
    ({**STRINGS, "rejected": [assistant("x")]}, "the prompt is a string and rejected a list of messages: give the"),
    ({**BOTH, "prompt": "x"}, "no message that chosen and rejected begin with is the prompt's string"),
    ({**BOTH, "prompt": "a", "chosen": [assistant("x")], "rejected": [assistant("y")]}, "must begin with the same"),
    ({**STRINGS, "chosen": 5}, "field 'chosen' must be a string, not a number"),
    ({**LISTS, "prompt": []}, "field 'prompt' must be a list of"),
    ({**LISTS, "prompt": [user(" ")]}, "the prompt is empty"),
    ({**LISTS, "chosen": "d"}, "chosen and rejected must both be strings, or both be lists"),
    ({**LISTS, "chosen": [assistant(" ")]}, r"chosen\[0\]: the response is empty"),
    ({**LISTS, "chosen": [user("d")]}, "chosen, after the prompt, must begin with a message of the assistant, not of"),
    ({**LISTS, "rejected": [assistant("e"), user("d")]}, "rejected, after the prompt, must end with a message of the"),
    (
        {**LISTS, "rejected": [{"role": "tool", "content": "x"}]},
        "must begin with a message of the assistant, not of the t",
    ),
    (
        {"chosen": "x", "rejected": "y"},
        "neither lists of messages nor transcripts, whose turns 'Human:' and 'Assistant:' follow empty lines: give w",
    ),
    (
        {side: f"Human: x\nAssistant: {side}" for side in ("chosen", "rejected")},
        "neither lists of messages nor transcripts, whose turns",
    ),
    ({"chosen": "\n\nHuman: x\n\nAssistant: y", "rejected": "z"}, "neither lists of messages nor transcripts"),
    (
        {side: f"\n\nHuman: {side}\n\nAssistant: y" for side in ("chosen", "rejected")},
        "must begin with the same messages",
    ),
    (
        {side: f"\n\nHuman: x\n\nHuman: {side}" for side in ("chosen", "rejected")},
        "must begin with a message of the assis",
    ),
    ({"chosen": [assistant("x")], "rejected": [assistant("y")]}, "must begin with the same messages, the prompt"),
    ({"chosen": IMPLICIT["chosen"], "rejected": LISTS["prompt"]}, "rejected has no answer after the prompt"),
    ({"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("c")]}, "must begin with the same"),
    ({**STRINGS, "margin": "much"}, "field 'margin' must be a finite number, not 'much'"),
    ({**STRINGS, "margin": float("nan")}, "field 'margin' must be a finite number, not nan"),
    ({**STRINGS, "margin": True}, "field 'margin' must be a finite number, not True"),
    ({**STRINGS, "margin": [1]}, r"field 'margin' must be a finite number, not \[1\]"),
]


@pytest.mark.parametrize(("record", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_what_is_refused(read, record, message):
    good = ALPACA if "instruction" in record else STRINGS if isinstance(record.get("prompt"), str) else LISTS
    with pytest.raises(BadInput, match=message) as error:
        read(good, record)
    assert "pairs.jsonl: line 2" in str(error.value) and "\n" not in str(error.value)


def test_one_form_a_file(read):
    with pytest.raises(BadInput, match=r"line 2 has the fields of the form 'alpaca' and .*line 1 those of 'prompt'"):
        read(STRINGS, ALPACA)


def test_masks_are_those_of_tokens(read):
    (pair,) = tokenize_preferences(read(STRINGS), ByteTokenizer(), template="plain", context=50).pairs
    np.testing.assert_array_equal(pair.chosen.learned, [False] * 7 + [True] * 3)
    np.testing.assert_array_equal(pair.rejected.learned, [False] * 7 + [True] * 7)


def test_what_a_chat_template_writes_after_an_answers_end(chat):
    """Texts that it wrote end with that: what a reward model learned to read, and no policy draws."""
    (end,) = chat.encode(END, allow_special=True)
    chat.chat_template = ChatTemplate(CHATML.replace("<|im_end|>\n", f"{END}!\n"))
    assert chat.decode(chat_ending(chat, [end])) == f"{END}!\n"
    assert chat_ending(chat, [end + 1]) == []  # no end token that it writes
    chat.chat_template = ChatTemplate(CHATML.replace("<|im_end|>\n", f"{END}!{END}"))
    assert chat.decode(chat_ending(chat, [end])) == f"{END}!{END}"  # a model stops at the first
    chat.chat_template = ChatTemplate(CHATML.replace("<|im_end|>\n", END))
    assert chat_ending(chat, [end]) == [end]
    asked_alone = "{% if m['role'] == 'user' %}" + END + "{% endif %}"
    chat.chat_template = ChatTemplate(CHATML.replace("<|im_end|>\n", asked_alone))
    assert chat_ending(chat, [end]) == []  # the question's end is none of an answer
    assert chat_ending(ByteTokenizer(), [256]) == []


def test_texts_without_what_pads_them(read):
    """At their ends alone, and with their masks."""
    (pair,) = tokenize_preferences(read(STRINGS), ByteTokenizer(), template="plain", context=12).pairs
    assert pair.rejected.cut and pair.chosen.tokens[-1] == 256
    found = without_padding(pair, 256)
    assert (len(found.chosen.tokens), len(found.rejected.tokens)) == (9, 12) and found.rejected.cut
    np.testing.assert_array_equal(found.chosen.learned, [False] * 7 + [True] * 2)
    assert (found.where, found.margin) == (pair.where, pair.margin)
    within = without_padding(pair, ord("1"))  # which begins the prompt
    assert [len(side.tokens) for side in (within.chosen, within.rejected)] == [10, 12]
    (pair,) = tokenize_preferences(read(STRINGS), ByteTokenizer(), template="plain", context=50).pairs
    assert len(without_padding(pair, 256).rejected.tokens) == len(pair.rejected.tokens) - 1
