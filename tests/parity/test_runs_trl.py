"""Whole runs of the recipes beside TRL's trainers, which get the same rows in the same order: figures of all steps, and
the last weights."""

import importlib
import json
import logging

import numpy as np
import pytest
import torch
import transformers

import llmq_jax as lq
import train.dpo
from llmq_jax.command_line import run
from llmq_jax.data import ByteTokenizer
from llmq_jax.interop import to_state_dict
from llmq_jax.training import engine
from llmq_jax.training.metrics import read_metrics
from tests.parity.references import randomise

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

EPOCHS, BATCH, PARTS = 2, 4, 2
RATE, DECAY, CLIP, WARMUP, STEPS = 3e-3, 0.3, 1.5, 2, 6
WORDS = ["a", "bc", "def", "é", "日本", "😀", "ghij"]
PAIRS = [
    {"prompt": f"{n} {' '.join(WORDS[: n % 5])}:", "chosen": f" {WORDS[n % 7]}", "rejected": f" {WORDS[-1 - n % 4]}!"}
    for n in range(10)
]
ANSWERS = [{"prompt": pair["prompt"], "completion": f" and so it goes on and on,{pair['chosen']}"} for pair in PAIRS]
HELD_OUT = {"prompt": "x", "chosen": " y", "rejected": " z"}
# Of each recipe: records, metrics of one name, and a seed whose short batch is the last of each epoch, as theirs is.
CASES = {
    "instruct": (ANSWERS, [], 24),
    "dpo": (PAIRS, ["rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"], 7),
    "reward": (PAIRS, ["accuracy", "margin", "mean_reward"], 7),
}


@pytest.fixture
def folder(tmp_path, request):
    """A tiny Llama of transformers with random weights, and with a scalar head where rewards are learned."""
    tokenizer = ByteTokenizer()
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=96,
        eos_token_id=tokenizer.end_of_text,
        bos_token_id=tokenizer.end_of_text,
        pad_token_id=tokenizer.end_of_text,
        num_labels=1,
    )
    scores = request.node.callspec.params["recipe"] == "reward"
    kind = transformers.LlamaForSequenceClassification if scores else transformers.LlamaForCausalLM
    model = kind(config)
    randomise(model)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    named = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    return tmp_path / "model"


def our_run(recipe, folder, tmp_path, monkeypatch):
    """(the batches of a run, what it logged of its steps, its weights at the end)."""
    records, _, seed = CASES[recipe]
    data, out, kept, inner = tmp_path / "data.jsonl", tmp_path / "run", {}, engine.run
    data.write_text("".join(json.dumps(record) + "\n" for record in records))

    def spied(state, step, batches, *rest, **named):
        kept["batches"], kept["result"] = batches, inner(state, step, batches, *rest, **named)
        return kept["result"]

    monkeypatch.setattr(engine, "run", spied)
    options = {
        "data": data,
        "init-from": folder,
        "out": out,
        "train": "all",
        "epochs": EPOCHS,
        "batch-size": BATCH,
        "accumulate": PARTS,
        "learning-rate": RATE,
        "schedule": "linear",
        "minimum-learning-rate": RATE / (STEPS - WARMUP),
        "warmup-steps": WARMUP,
        "weight-decay": DECAY,
        "clip": CLIP,
        "seed": seed,
        **dict.fromkeys(("evaluate-every", "sample-every", "checkpoint-every"), 0),
        "log-every": 1,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    if recipe == "instruct":
        arguments.append("--no-pack")
    else:
        (tmp_path / "held_out.jsonl").write_text(json.dumps(HELD_OUT))
        options = ["--validation-data", tmp_path / "held_out.jsonl"]
        arguments += map(str, options)
    if recipe == "dpo":
        monkeypatch.setattr(train.dpo, "distance", lambda *_: "")  # draws answers
    with pytest.raises(SystemExit) as stop:
        run(importlib.import_module(f"train.{recipe}").main, arguments, program=f"python -m train.{recipe}")
    assert not stop.value.code
    figures = [record for record in read_metrics(out / "metrics.jsonl") if "loss" in record]
    return kept["batches"], figures, kept["result"].state.variables


def their_trainer(recipe, folder, tmp_path):
    kind, options = {
        "instruct": ("SFT", {}),
        "dpo": ("DPO", {"gradient_checkpointing": False}),
        "reward": ("Reward", {"gradient_checkpointing": False}),
    }[recipe]
    model = transformers.AutoModelForSequenceClassification if recipe == "reward" else transformers.AutoModelForCausalLM
    return getattr(trl, f"{kind}Trainer")(
        model=model.from_pretrained(folder),
        args=getattr(trl, f"{kind}Config")(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=BATCH // PARTS,
            gradient_accumulation_steps=PARTS,
            num_train_epochs=EPOCHS,
            learning_rate=RATE,
            lr_scheduler_type="linear",
            warmup_steps=WARMUP,
            weight_decay=DECAY,
            max_grad_norm=CLIP,
            max_length=96,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            **options,
        ),
        train_dataset=datasets.Dataset.from_list(CASES[recipe][0]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )


def rows_of(batch):
    """The tokens of each row that counts; of a pair's, those of the chosen answer, with the prompt."""
    if "segment_ids" in batch:
        lengths = (batch["segment_ids"] > 0).sum(axis=1)
        return [row[:length].tolist() for row, length in zip(batch["tokens"], lengths, strict=True) if length]
    return [
        row[0, : length[0]].tolist() for row, length in zip(batch["tokens"], batch["lengths"], strict=True) if length[0]
    ]


def their_row(row):
    return row["input_ids"] if "input_ids" in row else [*row.get("prompt_ids", []), *row["chosen_ids"]]


def named(row):
    """A row to be told from others by; a reward model does not read an end that is its padding."""
    return tuple(token for token in row if token != ByteTokenizer().end_of_text)


class MicroBatches:
    """Of one epoch after another."""

    def __init__(self, epochs):
        self.epochs = iter(epochs)

    def __len__(self):
        return -(-len(PAIRS) // (BATCH // PARTS))

    def __iter__(self):
        return iter(next(self.epochs))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.exhaustive
@pytest.mark.parametrize("recipe", CASES)
def test_figures_of_every_step_and_the_last_weights(recipe, folder, tmp_path, monkeypatch, capsys, caplog):
    """Warm-up, fall, decay, clipping, micro-batches, and an epoch that ends with a part of a batch."""
    caplog.set_level(logging.ERROR)
    batches, ours, variables = our_run(recipe, folder, tmp_path, monkeypatch)
    trainer = their_trainer(recipe, folder, tmp_path)
    numbers = {named(their_row(row)): number for number, row in enumerate(trainer.train_dataset)}
    steps = [[numbers[named(row)] for row in rows_of(batches[step])] for step in range(STEPS)]
    assert [len(step) for step in steps] == [4, 4, 2] * EPOCHS
    size, each = BATCH // PARTS, STEPS // EPOCHS
    epochs = [
        [step[start : start + size] for step in steps[first : first + each] for start in range(0, len(step), size)]
        for first in range(0, STEPS, each)
    ]
    loader = torch.utils.data.DataLoader(
        trainer.train_dataset, batch_sampler=MicroBatches(epochs), collate_fn=trainer.data_collator
    )
    trainer.get_train_dataloader = lambda: trainer.accelerator.prepare(loader)
    trainer.train()

    theirs = [record for record in trainer.state.log_history if "loss" in record]
    assert len(ours) == len(theirs) == STEPS
    for name in ("learning_rate", "loss", "grad_norm", *CASES[recipe][1]):
        found, expected = ([record[name] for record in records] for records in (ours, theirs))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=name)
    if recipe != "reward":  # see `named`
        assert [record["tokens"] for record in ours] == [record["num_tokens"] for record in theirs]
    last = trainer.model.state_dict()
    for name, array in to_state_dict(variables, lq.load(folder).config).items():
        np.testing.assert_allclose(array, last[name], atol=1e-4, err_msg=name)
