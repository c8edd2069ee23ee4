"""Whole runs of the recipes beside TRL's trainers, which get the same rows in the same order: figures of all steps, and
the last weights."""

import importlib
import json
import logging
import runpy

import numpy as np
import pytest
import torch
import transformers

import llmq_jax as lq
import llmq_jax.training.grpo as grpo_loop
import train.dpo
import train.grpo
from llmq_jax.command_line import run
from llmq_jax.data import ByteTokenizer
from llmq_jax.data.batching import pad
from llmq_jax.interop import to_state_dict
from llmq_jax.training import engine
from llmq_jax.training.metrics import read_metrics
from llmq_jax.training.rollouts import Rollout
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


EVERY_STEP = {  # is told, nothing is saved, and all of it is computed in float32
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


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
            **EVERY_STEP,
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


REWARDS = """
def vowels(prompts, completions, **columns):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]

def even(prompts, completions, **columns):
    return [None if len(text) % 2 else bonus * len(set(text)) for text, bonus in zip(completions, columns["bonus"])]
"""
QUESTIONS = [{"prompt": "ab cdef"[: 1 + number], "bonus": number} for number in range(7)]
GROUP, LONGEST = 4, 10


def forced(lm, prompts, *, group_size, max_new_tokens, sampler, seeds):
    """In place of `roll_out`: letters by the row's seed, half of the answers cut, with the policy's own
    log-probabilities."""
    rows, asked, texts = [], [], []
    for number, seed in enumerate(seeds):
        prompt, rng = prompts[number // group_size].tokens, np.random.default_rng(seed)
        length = max_new_tokens if number % 2 else int(rng.integers(2, max_new_tokens))
        letters = rng.integers(ord("a"), ord("j"), length).tolist()
        if number % 2 == 0:
            letters[-1] = lm.tokenizer.end_of_text
        rows.append([*prompt, *letters])
        asked.append(len(prompt))
        texts.append(bytes(letters[: length - 1 + number % 2]).decode())
    tokens, lengths = pad(rows, 32)
    asked = np.array(asked, np.int32)
    arrays = lm.variables, tokens, lengths, asked, None
    named = {"count": max_new_tokens, "temperature": sampler.temperature, "group_size": 1}
    logprobs = np.asarray(grpo_loop._completion_logprobs(lm.model, *arrays, **named))
    mask = (np.arange(max_new_tokens) < (lengths - asked)[:, None]).astype(np.float32)
    ended = np.arange(len(rows)) % 2 == 0
    return Rollout(list(prompts), group_size, tokens, lengths, asked, logprobs, mask, ended, texts)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.exhaustive
@pytest.mark.parametrize("recipe", ["grpo"])
def test_figures_of_grpo_and_the_last_weights(recipe, folder, tmp_path, monkeypatch, caplog):
    """Answers that are given: rewards with weights, some of them None, masked answers, several updates on the same
    answers, a distance from a reference, and another temperature."""
    caplog.set_level(logging.ERROR)
    rollouts, ours, states, step_of = [], [], [], grpo_loop.Loop.step

    def spied_roll_out(*arguments, **named):
        rollouts.append(forced(*arguments, **named))
        return rollouts[-1]

    def spied_step(loop, state, batch):
        state, metrics = step_of(loop, state, batch)
        ours.append({name: float(value) for name, value in metrics.items()})
        states.append(state)
        return state, metrics

    monkeypatch.setattr(grpo_loop, "roll_out", spied_roll_out)
    monkeypatch.setattr(grpo_loop.Loop, "step", spied_step)
    data, functions = tmp_path / "data.jsonl", tmp_path / "functions.py"
    data.write_text("".join(json.dumps(record) + "\n" for record in QUESTIONS))
    functions.write_text(REWARDS)
    names, weights, steps, prompts, updates = ("vowels", "even"), (1.0, 0.5), 3, 3, 2
    options = {
        "data": data,
        "init-from": folder,
        "out": tmp_path / "run",
        "train": "all",
        "steps": steps,
        "prompts-per-step": prompts,
        "group-size": GROUP,
        "max-new-tokens": LONGEST,
        "temperature": 0.7,
        "reward": ",".join(f"{functions}:{name}" for name in names),
        "reward-weights": ",".join(map(str, weights)),
        "scale": "batch",
        "loss": "dapo",
        "iterations": updates,
        "clip-low": 0.1,
        "clip-high": 0.15,
        "beta": 0.3,
        "learning-rate": RATE,
        "schedule": "constant",
        "warmup-steps": 0,
        "clip": CLIP,
        **dict.fromkeys(("evaluate-every", "sample-every", "checkpoint-every", "log-every"), 0),
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    with pytest.raises(SystemExit) as stop:
        run(train.grpo.main, [*arguments, "--mask-truncated", "--kl-by-ratio"], program="python -m train.grpo")
    assert not stop.value.code

    found = runpy.run_path(str(functions))
    trainer = trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder),
        reward_funcs=[found[name] for name in names],
        args=trl.GRPOConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=prompts * GROUP,
            num_generations=GROUP,
            max_completion_length=LONGEST,
            temperature=0.7,
            reward_weights=list(weights),
            scale_rewards="batch",
            loss_type="dapo",
            num_iterations=updates,
            max_steps=steps * updates,
            epsilon=0.1,
            epsilon_high=0.15,
            beta=0.3,
            mask_truncated_completions=True,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_grad_norm=CLIP,
            gradient_checkpointing=False,
            **EVERY_STEP,
        ),
        train_dataset=datasets.Dataset.from_list(QUESTIONS),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )
    give_rollouts(trainer, rollouts)
    trainer.train()

    theirs = [record for record in trainer.state.log_history if "loss" in record]
    assert len(ours) == steps and len(theirs) == steps * updates
    of_updates = ("loss", "grad_norm", "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean")
    of_answers = ("reward", *(f"rewards/{name}/{what}" for name in names for what in ("mean", "std")))
    for name in (*of_updates, *of_answers, "completions/mean_length", "completions/clipped_ratio"):
        each = [record.get(name) for record in theirs]
        expected = np.reshape(each, (steps, updates)).mean(1) if name in of_updates else each[::updates]
        np.testing.assert_allclose([x[name] for x in ours], expected, rtol=1e-4, atol=1e-5, err_msg=name)
    assert all(record["clip_ratio/region_mean"] > 0 for record in theirs[1::updates])
    last = trainer.model.state_dict()
    for name, array in to_state_dict(states[-1].variables, lq.load(folder).config).items():
        np.testing.assert_allclose(array, last[name], atol=1e-4, err_msg=name)


def give_rollouts(trainer, rollouts):
    """Let TRL's trainer take these answers, one rollout after another, in place of drawing its own."""
    left, rewards_of = list(rollouts), trainer._calculate_rewards

    def prompts(_):
        rows = zip(left[0].tokens, left[0].prompt_lengths, strict=True)
        return [row[:length].tolist() for row, length in rows], None, {}

    def answers(*_):
        rows = zip(left[0].tokens, left[0].prompt_lengths, left[0].lengths, strict=True)
        return [row[begin:end].tolist() for row, begin, end in rows], None

    def rewards(_, *others):
        rollout = left.pop(0)
        columns = [prompt.columns for prompt in rollout.prompts for _ in range(rollout.group_size)]
        return rewards_of(columns, *others)

    trainer._tokenize_prompts, trainer._generate_single_turn, trainer._calculate_rewards = prompts, answers, rewards
