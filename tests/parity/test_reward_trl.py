"""Tokens, loss, gradients and metrics of reward models against TRL's RewardTrainer, which prepares the same records."""

import json
import logging

import jax
import jax.numpy as jnp
import pytest
import tokenizers
import torch
import transformers

import llmq_jax as lq
from llmq_jax.data import (
    ByteTokenizer,
    PreferenceBatches,
    PreferenceEvaluation,
    read_preferences,
    tokenize_preferences,
    without_padding,
)
from llmq_jax.interop import to_state_dict
from llmq_jax.objectives.reward import RewardModel
from tests.parity.references import assert_same_gradients, numpy_gradients, randomise

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

CONTEXT = 160
END, START, PAD = "<|endoftext|>", "<s>", "<pad>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# An end of turn that is the end of text: as Llama 2's and Mistral's templates.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)


def turn(role, content):
    return {"role": role, "content": content}


STRINGS = [
    {"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 11"},
    {"prompt": "The capital of Japan (日本) is", "chosen": " Tokyo 😀, a city.", "rejected": " Kyoto"},
    {"prompt": "Say\n", "chosen": "\nwhat I say: é", "rejected": "no"},
    {"prompt": "too long " * 60, "chosen": "a", "rejected": "b"},
    {"prompt": "Count: ", "chosen": "1, 2", "rejected": ", ".join(map(str, range(100)))},  # too long, on one side
]
MARGINS = [{**record, "margin": margin} for record, margin in zip(STRINGS, (0.5, -1.0, 2.0, 0.0, 0.0), strict=True)]
PROMPT = [turn("user", "a"), turn("assistant", "b"), turn("user", " c\n")]
MESSAGES = [
    {"prompt": [turn("user", "Hi")], "chosen": [turn("assistant", "Hello 😀")], "rejected": [turn("assistant", "No.")]},
    {"prompt": PROMPT, "chosen": [turn("assistant", "d")], "rejected": [turn("assistant", "e, f")]},
]
IMPLICIT = [{side: record["prompt"] + record[side] for side in ("chosen", "rejected")} for record in MESSAGES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama of transformers with a scalar head and random weights, and a tokenizer of bytes that we saved."""
    folder = tmp_path_factory.mktemp("reward")
    ByteTokenizer().save(folder)
    loaded = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded.add_special_tokens([PAD, START])
    loaded.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, loaded.token_to_id(START))]
    )
    loaded.save(str(folder / "tokenizer.json"))
    config = transformers.LlamaConfig(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        eos_token_id=256,
        bos_token_id=258,
        num_labels=1,
    )
    model = transformers.LlamaForSequenceClassification(config)
    randomise(model)
    model.save_pretrained(folder)
    return folder


def both(folder, tmp_path, records, chat_template, template, pad, **arguments):
    """(TRL's trainer, our examples, our model) of the same records."""
    (folder / "chat_template.jinja").write_text(chat_template or "")
    named = {"bos_token": START, "eos_token": END, "pad_token": pad}
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.chat_template = chat_template
    trainer = trl.RewardTrainer(
        model=transformers.AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager"),
        args=trl.RewardConfig(
            output_dir=str(tmp_path / "trl"),
            max_length=CONTEXT,
            **arguments,
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
    ours = tokenize_preferences(
        read_preferences(path), lm.tokenizer, template=template, context=CONTEXT, too_long="drop"
    )
    return trainer, ours, lm


CASES = {
    "strings": (STRINGS, None, "plain", PAD, {}),
    "strings, padded with their end": (STRINGS, None, "plain", END, {}),
    "margins": (MARGINS, None, "plain", PAD, {}),
    "margins and centring": (MARGINS, None, "plain", END, {"center_rewards_coefficient": 0.1}),
    "messages": (MESSAGES, CHATML, "chat", PAD, {}),
    "messages, centring": (MESSAGES, BRACKETS, "chat", PAD, {"center_rewards_coefficient": 0.01}),
    "messages, padded with their end": (MESSAGES, BRACKETS, "chat", END, {}),
    "implicit prompts": (IMPLICIT, CHATML, "chat", PAD, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_one_batch(folder, tmp_path, caplog, case):
    caplog.set_level(logging.ERROR)
    records, chat_template, template, pad, arguments = CASES[case]
    trainer, ours, lm = both(folder, tmp_path, records, chat_template, template, pad, **arguments)

    # The same tokens, and the same pairs left out.
    rows = list(trainer.train_dataset)
    assert len(ours) == len(rows) and ours.dropped == len(records) - len(rows) == (2 if template == "plain" else 0)
    for pair, row in zip(ours.pairs, rows, strict=True):
        assert pair.chosen.tokens.tolist() == row["chosen_ids"]
        assert pair.rejected.tokens.tolist() == row["rejected_ids"]

    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()

    pad_id = lm.tokenizer.encode(pad, allow_special=True)[0]
    assert trainer.model.config.pad_token_id == pad_id
    read = [without_padding(pair, pad_id) for pair in ours.pairs]
    assert any(len(a) != len(b) for a, b in zip(read, ours.pairs, strict=True)) == (pad == END)
    objective = RewardModel(lm.model, center=arguments.get("center_rewards_coefficient", 0.0))
    batch = PreferenceBatches(read, len(read) + 1, CONTEXT)[0]  # a place is left over
    assert ("margins" in batch) == ("margin" in records[0])

    @jax.jit
    def compute(variables, batch):
        def total(variables):
            return objective.loss(variables, batch, objective.weights(batch))[:2]

        return jax.value_and_grad(total, has_aux=True)(variables)

    (found, metrics), gradients = compute(lm.variables, {name: jnp.asarray(array) for name, array in batch.items()})
    assert float(found) == pytest.approx(loss.item(), rel=2e-6, abs=1e-5)
    gradients = to_state_dict(gradients, lm.config)
    assert_same_gradients(gradients, numpy_gradients(trainer.model, gradients))
    for name in ("accuracy", "margin", "mean_reward", "min_reward", "max_reward"):
        assert float(metrics[name]) == pytest.approx(trainer._metrics["train"][name][-1], rel=1e-5, abs=1e-5), name
    assert abs(float(metrics["margin"])) > 1e-2


def test_evaluation_is_over_pairs_where_theirs_is_over_batches(folder, tmp_path, caplog):
    """The mean over all pairs, however many the last batch has."""
    caplog.set_level(logging.ERROR)
    from llmq_jax.training.step import evaluate, make_eval_step

    trainer, ours, lm = both(folder, tmp_path, STRINGS, None, "plain", PAD)
    rows = list(trainer.train_dataset)
    with torch.no_grad():
        expected = trainer.compute_loss(trainer.model.eval(), trainer.data_collator(rows)).item()
    found = evaluate(make_eval_step(RewardModel(lm.model)), lm.variables, PreferenceEvaluation(ours.pairs, 2, CONTEXT))
    assert found["loss"] == pytest.approx(expected, rel=2e-6, abs=1e-5)
    metrics = trainer._metrics["eval"]
    assert {name: found[name] for name in found if name != "loss"} == pytest.approx(
        {name: metrics[name][-1] for name in found if name != "loss"}, rel=1e-5, abs=1e-5
    )


def test_equal_rewards(folder, tmp_path, caplog):
    """The one difference: a tie counts one half, theirs as wrong."""
    caplog.set_level(logging.ERROR)
    trainer, ours, lm = both(folder, tmp_path, STRINGS[:2], None, "plain", PAD)
    score = jax.tree.map(jnp.zeros_like, lm.params["score"])
    variables = {**lm.variables, "params": {**lm.params, "score": score}}
    with torch.no_grad():
        trainer.model.score.weight.zero_()
        trainer.compute_loss(trainer.model.eval(), trainer.data_collator(list(trainer.train_dataset)))
    batch = {name: jnp.asarray(array) for name, array in PreferenceBatches(ours.pairs, 2, CONTEXT)[0].items()}
    objective = RewardModel(lm.model)
    _, metrics, _ = jax.jit(objective.loss)(variables, batch, objective.weights(batch))
    assert (trainer._metrics["eval"]["accuracy"][-1], float(metrics["accuracy"])) == (0.0, 0.5)
