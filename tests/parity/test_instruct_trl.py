"""Tokens, labels and loss of instruction tuning against TRL's SFTTrainer, which prepares the same records."""

import json
import logging

import numpy as np
import pytest
import tokenizers
import torch
import transformers

import llmq_jax as lq
from llmq_jax.data import ByteTokenizer, GPT2Tokenizer, instruction_batches, read_conversations, tokenize_conversations
from llmq_jax.objectives.next_token import NextToken
from llmq_jax.training.step import evaluate, make_eval_step
from tests.parity.references import randomise

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

CONTEXT = 160
END, START = "<|endoftext|>", "<s>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A beginning, a trimmed content, an end of turn that is the end of text: as Llama 2's and Mistral's templates.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% elif m['role'] == 'system' %}<<{{ m['content'] }}>> {% else %} {{ m['content'] | trim }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
# Opens an answer with a thought that answers which were given do not have.
THOUGHTFUL = CHATML.replace("assistant\n'", "assistant\n<think>\n'")


def turn(role, content):
    return {"role": role, "content": content}


PLAIN = [
    {"prompt": "1 + 1 =", "completion": " 2"},
    {"prompt": "The capital of Japan (日本) is", "completion": " Tokyo 😀, a city."},
    {"prompt": "Say\n", "completion": "\nwhat I say: é"},
    {"prompt": "Count: ", "completion": ", ".join(map(str, range(100)))},  # longer than the context
    {"prompt": "too long " * 60, "completion": "nothing of this is left"},
]
LISTS = [
    {"prompt": [turn("user", "Hi")], "completion": [turn("assistant", "Hello there 😀")]},
    {
        "prompt": [turn("system", "Be brief."), turn("user", "a"), turn("assistant", "b"), turn("user", " c\n")],
        "completion": [turn("assistant", "d")],
    },
]
MESSAGES = [{"messages": record["prompt"] + record["completion"]} for record in LISTS]
TEXTS = [{"text": record["prompt"] + record["completion"]} for record in PLAIN]


@pytest.fixture(scope="module", params=["bytes", "gpt2", "beginning"])
def folder(request, tmp_path_factory):
    """A tiny Llama of transformers with random weights, and a tokenizer that we saved, to which templates come. The
    last tokenizer puts a token before a text."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = GPT2Tokenizer() if request.param == "gpt2" else ByteTokenizer()
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size + 1,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        eos_token_id=tokenizer.end_of_text,
        bos_token_id=tokenizer.end_of_text,
    )
    model = transformers.LlamaForCausalLM(config)
    randomise(model)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    file = folder / "tokenizer_config.json"
    named = dict.fromkeys(("bos_token", "eos_token"), END)
    if request.param == "beginning":
        loaded = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        loaded.add_special_tokens([START])
        loaded.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{START} $A", special_tokens=[(START, loaded.token_to_id(START))]
        )
        loaded.save(str(folder / "tokenizer.json"))
        named["bos_token"] = START
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    return folder


def both(folder, tmp_path, records, chat_template, train_on, template, **arguments):
    """(TRL's trainer, our examples, our model) of the same records."""
    (folder / "chat_template.jinja").write_text(chat_template or "")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = chat_template
    trainer = trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder),
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "trl"),
            max_length=CONTEXT,
            **{"completion_only_loss": train_on != "all", **arguments},
            per_device_train_batch_size=len(records),
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=theirs,
    )
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    lm = lq.load(folder)
    ours = tokenize_conversations(
        read_conversations(path), lm.tokenizer, template=template, context=CONTEXT, train_on=train_on
    )
    return trainer, ours, lm


CASES = {
    "prompts and completions": (PLAIN, None, "response", "plain"),
    "prompts and completions, all of it": (PLAIN, None, "all", "plain"),
    "texts": (TEXTS, None, "all", "plain"),
    "lists of messages": (LISTS, CHATML, "response", "chat"),
    "lists of messages by another template": (LISTS, BRACKETS, "response", "chat"),
    "lists of messages with thoughts": (LISTS, THOUGHTFUL, "response", "chat"),
    "messages, all of them": (MESSAGES, CHATML, "all", "chat"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.product
def test_tokens_labels_and_loss(folder, tmp_path, case, caplog):
    caplog.set_level(logging.ERROR)
    records, chat_template, train_on, template = CASES[case]
    trainer, ours, lm = both(folder, tmp_path, records, chat_template, train_on, template)

    theirs = trainer.data_collator(list(trainer.train_dataset))
    assert len(ours) == len(theirs["input_ids"]) > 1
    for example, tokens, labels, real in zip(
        ours.examples, theirs["input_ids"], theirs["labels"], theirs["attention_mask"].bool(), strict=True
    ):
        np.testing.assert_array_equal(example.tokens, tokens[real])
        # The first token is nobody's target.
        expected = np.where(example.learned, example.tokens, -100)[1:]
        np.testing.assert_array_equal(expected, labels[real][1:])

    with torch.no_grad():
        expected = trainer.compute_loss(trainer.model.eval(), dict(theirs)).item()
    for packing in (True, False):
        batches = instruction_batches(ours.examples, context=CONTEXT, batch_size=2, packing=packing, seed=None)
        loss = evaluate(make_eval_step(NextToken(lm.model)), lm.variables, batches)["loss"]
        assert loss == pytest.approx(expected, abs=1e-5)


# The answers and their ends of turn are marked, as transformers' masks of assistant tokens want it.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SEVERAL_TURNS = [
    {"messages": [turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "a?"), turn("assistant", "b, c.")]},
    {"messages": [turn("system", "S"), turn("user", "x"), turn("assistant", "y\nz"), turn("user", "never answered")]},
]


# TRL itself knows no weights: a template that marks none of the answers that have weight 0.
WEIGHED = MARKED.replace("== 'assistant'", "== 'assistant' and m.get('weight') != 0")
WEIGHTS = [
    {"messages": [{**each, "weight": weight} for each, weight in zip(record["messages"], weights, strict=True)]}
    for record, weights in zip(SEVERAL_TURNS, ((None, 0, None, 1), (0, None, 1, 0)), strict=True)
]


@pytest.mark.parametrize(("records", "source"), [(SEVERAL_TURNS, MARKED), (WEIGHTS, WEIGHED)])
def test_all_answers_of_several_turns(folder, tmp_path, caplog, records, source):
    """`assistant_only_loss`, whose mask comes from the template's own marks."""
    caplog.set_level(logging.ERROR)
    options = {"completion_only_loss": None, "assistant_only_loss": True}
    trainer, ours, lm = both(folder, tmp_path, records, source, "response", "chat", **options)
    theirs = trainer.data_collator(list(trainer.train_dataset))
    assert len(ours) == len(theirs["input_ids"]) == 2
    for example, tokens, labels, real in zip(
        ours.examples, theirs["input_ids"], theirs["labels"], theirs["attention_mask"].bool(), strict=True
    ):
        np.testing.assert_array_equal(example.tokens, tokens[real])
        np.testing.assert_array_equal(np.where(example.learned, example.tokens, -100), labels[real])
        assert 0 < example.learned.sum() < len(example.tokens)
    with torch.no_grad():
        expected = trainer.compute_loss(trainer.model.eval(), dict(theirs)).item()
    batches = instruction_batches(ours.examples, context=CONTEXT, batch_size=2, seed=None)
    loss = evaluate(make_eval_step(NextToken(lm.model)), lm.variables, batches)["loss"]
    assert loss == pytest.approx(expected, abs=1e-5)


def test_the_one_difference(tmp_path, folder):
    """Where the prompt alone becomes other tokens than before its answer, theirs learn from the first that differs,
    ours from the first that holds a character of the answer."""
    records = [{"prompt": "a\n\n", "completion": "x"}, {"prompt": "a", "completion": "b"}]
    trainer, ours, _ = both(folder, tmp_path, records, None, "response", "plain")
    theirs, example = trainer.train_dataset[0], ours.examples[0]
    assert theirs["input_ids"] == example.tokens.tolist()  # a, line break, line break, x, end
    differs = folder.name.startswith("gpt2")  # whose two line breaks are one token at the end of a text
    assert [label != -100 for label in theirs["labels"]][-5:] == [False, differs, differs, True, True]
    assert example.learned.tolist()[-5:] == [False, False, False, True, True]
