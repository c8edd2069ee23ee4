"""Conversations that call tools, think or have parts: tokens and labels of TRL's trainers, of the same records."""

import json
import logging
import shutil

import numpy as np
import pytest
import transformers

import llmq_jax as lq
from llmq_jax.data import (
    ByteTokenizer,
    read_conversations,
    read_preferences,
    tokenize_conversations,
    tokenize_preferences,
)
from tests.data.tool_calls import LOOP, QWENISH, TOOLED, TOOLS, assistant, call, result, user

# Before 5.1 it sorted the keys of tools, which a template writes as they come.
datasets = pytest.importorskip("datasets", minversion="5.1")
trl = pytest.importorskip("trl")

CONTEXT = 2048
LATER = [*LOOP, user("And now?"), assistant("", tool_calls=[call("clock")], reasoning_content="Once more.")]
SPELLED = json.dumps(TOOLS)
ARGUMENTS = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
"""OpenAI's spelling, which some templates write as it is, and others as a string in JSON."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama of transformers, and a tokenizer that we saved, to which templates come."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = ByteTokenizer()
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size + 1, num_hidden_layers=1, max_position_embeddings=CONTEXT, **sizes
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder)
    file = folder / "tokenizer_config.json"
    named = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    return folder


@pytest.fixture
def prepared(folder, tmp_path, caplog):
    """`prepared("SFT", records, chat_template)` -> (what TRL's trainer of this name makes of them, a file of the same,
    our tokenizer)."""
    caplog.set_level(logging.ERROR)

    def prepare(kind, records, chat_template, **arguments):
        (folder / "chat_template.jinja").write_text(chat_template)
        sizes = {"per_device_train_batch_size": len(records), "max_length": CONTEXT}
        where = {"output_dir": str(tmp_path / "trl"), "report_to": "none", "use_cpu": True, "bf16": False}
        automatic = {"Reward": transformers.AutoModelForSequenceClassification}
        kinds = {"num_labels": 1} if kind == "Reward" else {}
        model = automatic.get(kind, transformers.AutoModelForCausalLM).from_pretrained(folder, **kinds)
        trainer = getattr(trl, f"{kind}Trainer")(
            model=model,
            args=getattr(trl, f"{kind}Config")(**sizes, **where, **arguments),
            train_dataset=datasets.Dataset.from_list(records, on_mixed_types="use_json"),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        )
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return trainer.train_dataset, path, lq.load(folder).tokenizer

    return prepare


CASES = {
    "all answers": (
        [{"messages": LOOP, "tools": TOOLS}, {"messages": LATER, "tools": SPELLED}, {"messages": LATER, "tools": None}],
        TOOLED,
        {"completion_only_loss": None, "assistant_only_loss": True},
    ),
    "all answers, with variables": (
        [{"messages": LOOP, "tools": TOOLS, "chat_template_kwargs": {"mood": text}} for text in "!?"],
        "{{ mood }}" + TOOLED,
        {"completion_only_loss": None, "assistant_only_loss": True},
    ),
    "a list without tools": (
        [{"messages": LOOP, "tools": TOOLS}, {"messages": LATER, "tools": []}, {"messages": LATER, "tools": None}],
        "{% if tools is not none %}You may call tools.{% endif %}" + TOOLED,
        {"completion_only_loss": None, "assistant_only_loss": True},
    ),
    "the last answer, by a template as Qwen 3's": (
        [
            {"prompt": LOOP[:4], "completion": LOOP[4:], "tools": TOOLS},
            {"prompt": LOOP[:1], "completion": LOOP[1:2], "tools": TOOLS},
            {"prompt": LATER[:-1], "completion": LATER[-1:], "tools": SPELLED},
            {"prompt": LOOP[:1], "completion": [assistant("Wait.", tool_calls=[ARGUMENTS])], "tools": SPELLED},
        ],
        QWENISH,
        {"completion_only_loss": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_labels_of_instructions(prepared, case):
    records, chat_template, arguments = CASES[case]
    theirs, path, tokenizer = prepared("SFT", records, chat_template, **arguments)
    ours = tokenize_conversations(read_conversations(path), tokenizer, template="chat", context=CONTEXT)
    assert len(ours) == len(theirs)
    for example, row in zip(ours.examples, theirs, strict=True):
        assert example.tokens.tolist() == row["input_ids"]
        assert np.where(example.learned, example.tokens, -100).tolist() == row["labels"]
        assert 0 < example.learned.sum() < len(example.tokens)


PAIRS = [
    {
        "prompt": LOOP[:4],
        "chosen": LOOP[4:],
        "rejected": [assistant("No.", tool_calls=[call("clock")])],
        "tools": TOOLS,
    },
    {"prompt": LOOP[:1], "chosen": LOOP[1:2], "rejected": [assistant("It is warm.")], "tools": SPELLED},
    {"prompt": [user("Hi")], "chosen": [assistant("Hello.")], "rejected": [assistant("What?")], "tools": None},
]


@pytest.mark.parametrize("chat_template", [TOOLED, QWENISH], ids=["marked", "as Qwen 3's"])
def test_tokens_of_pairs(prepared, chat_template):
    for kind in ("DPO", "Reward"):
        theirs, path, tokenizer = prepared(kind, PAIRS, chat_template)
        ours = tokenize_preferences(read_preferences(path), tokenizer, template="chat", context=CONTEXT)
        assert len(ours) == len(theirs)
        for pair, row in zip(ours.pairs, theirs, strict=True):
            for side, example in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                given = row.get("prompt_ids", [])
                assert example.tokens.tolist() == given + row[f"{side}_ids"]
                if given:
                    assert example.learned.tolist() == [False] * len(given) + [True] * len(row[f"{side}_ids"])


def test_a_chat_with_tools(folder, monkeypatch):
    (folder / "chat_template.jinja").write_text(QWENISH)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    lm = lq.load(folder)
    for messages in (LOOP[:1], LOOP[:4], [*LOOP, user("And now?")]):
        expected = theirs.apply_chat_template(messages, tools=TOOLS, add_generation_prompt=True)["input_ids"]
        assert lm.chat_tokens(messages, TOOLS) == expected
    asked = []
    monkeypatch.setattr(lq.language_model, "generate", lambda _, prompts, **options: asked.extend(prompts) or lq)
    monkeypatch.setattr(lq, "text", ["It is cold."], raising=False)
    assert (lm.chat(messages, tools=TOOLS), asked) == ("It is cold.", [expected])


def test_a_template_of_its_own_for_tools(folder, tmp_path):
    """Of several under names; values of variables go into each that reads them."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    file = tmp_path / "tokenizer_config.json"
    named = {"default": "{{ mood }}" + TOOLED.replace("tools", "none"), "tool_use": QWENISH, "rag": "{{ documents }}"}
    listed = [{"name": name, "template": template} for name, template in named.items()]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": listed}))
    for values in ("as transformers saves it", {}, {"mood": "!"}):
        if values == "as transformers saves it":
            (saved := tmp_path / "saved").mkdir()
            transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(saved)
            assert (saved / "additional_chat_templates" / "tool_use.jinja").is_file()
            ours = lq.data.load_tokenizer(saved).chat_template
            assert (ours.source, ours.tool_use.source) == (named["default"], named["tool_use"])
            continue
        lm = lq.load(tmp_path)
        if values:
            lm.tokenizer.with_chat_variables(values).save(tmp_path)
            lm = lq.load(tmp_path)
        theirs, texts = transformers.AutoTokenizer.from_pretrained(tmp_path), []
        for tools in (None, TOOLS):
            messages = LOOP[:-1] if tools else [user("Hi")]
            expected = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True)["input_ids"]
            assert lm.chat_tokens(messages, tools) == expected
            texts.append(lm.tokenizer.decode(expected))
        assert texts[0].startswith("!") == bool(values) and TOOLS[0]["function"]["name"] in texts[1]


def test_the_differences(prepared):
    """What tools say within a completion is learned there, and here what the assistant says."""
    records = [{"prompt": LOOP[:1], "completion": [LOOP[1], result("5"), LOOP[-1]], "tools": TOOLS}] * 2
    theirs, path, tokenizer = prepared("SFT", records, TOOLED)
    example = tokenize_conversations(read_conversations(path), tokenizer, template="chat", context=CONTEXT).examples[0]
    differs = [label != -100 and not ours for label, ours in zip(theirs[0]["labels"], example.learned, strict=True)]
    assert example.tokens.tolist() == theirs[0]["input_ids"]
    assert tokenizer.decode(example.tokens[np.array(differs)].tolist()) == "[tool]5</s>[assistant]"
