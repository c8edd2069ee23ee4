"""Reinforcement learning in a few minutes: a model learns to add by trying, from nothing but right or wrong.

    python -m train.arithmetic --out runs/arithmetic

A small GPT-2 first learns from sums with their answers, until it gets a part of other sums right. From then on it sees
no answers: GRPO (train.grpo) rewards what it tries. The sums on which it is measured were in neither stage.

Answers are written with the units first, 12+34=640, as one adds by hand: each digit then needs no more than a carry of
those before it (Lee et al. 2023, arXiv:2307.03381).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmq_jax.backend import Device, use_device
from llmq_jax.command_line import run
from train import grpo

HELD_OUT, WATCHED = 600, 200
ENOUGH = 0.28
"""The share of right answers to the watched sums at which the warm-up ends."""
WARM_UP_STEPS, WARM_UP_BATCH, WARM_UP_RATE, WATCH_EVERY = 2000, 256, 5e-4, 5
SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "initializer_range": 0.09,  # at this width it takes a fifth of the steps that 0.02 does
    **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
}
ANSWER_TOKENS = 4
SETTINGS = {
    "train": "all",
    "template": "plain",
    "prompts_per_step": 128,  # fewer, or slower: the answers lose their variety before they are right
    "group_size": 8,
    "max_new_tokens": ANSWER_TOKENS,
    "learning_rate": 6e-4,
    "minimum_learning_rate": 6e-4,
}
"""Options of train.grpo."""


@dataclass(frozen=True)
class Options:
    out: str
    """Folder for the sums, the model after its warm-up, and the run."""
    seed: int = 0
    """Seed of the split, the model and the run."""
    steps: int = 350
    """Steps of GRPO, after the warm-up."""
    device: Device = "auto"
    """Where to compute; auto takes the fastest that JAX finds."""


def main(options: Options) -> None:
    folder = Path(options.out)
    model = folder / f"warm-{options.seed}"
    files = {"data": folder / "sums.jsonl", "validation_data": folder / "held-out.jsonl"}
    run_options = grpo.Options(
        init_from=str(model),
        out=str(folder / "run"),
        steps=options.steps,
        seed=options.seed,
        device=options.device,
        **{name: str(path) for name, path in files.items()},
        **SETTINGS,
    )
    grpo.check(run_options)
    use_device(options.device)
    training, watched, held_out = sums(options.seed)
    for name, part in (("sums", training), ("held-out", held_out)):
        write_records(folder / f"{name}.jsonl", part)
    if not model.exists():
        warm_up(training, watched, options.seed, model)
    grpo.main(run_options)


def sums(seed: int) -> tuple[list, list, list]:
    """(training, watched, held-out) pairs of numbers from 0 to 99, each pair in one of them."""
    from llmq_jax.data.splits import seeded_order

    pairs = [divmod(int(index), 100) for index in seeded_order(100 * 100, seed)]
    return pairs[HELD_OUT + WATCHED :], pairs[HELD_OUT : HELD_OUT + WATCHED], pairs[:HELD_OUT]


def prompt(a: int, b: int) -> str:
    return f"{a:02}+{b:02}="


def answer(a: int, b: int) -> str:
    return f"{a + b:03}"[::-1]


def write_records(path: Path, pairs: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": prompt(a, b), "answer": answer(a, b)}) + "\n" for a, b in pairs))


def warm_up(training: list, watched: list, seed: int, folder: Path) -> None:
    """Learn sums with their answers until a part of the watched ones is right; the model goes to `folder`."""
    import numpy as np

    import llmq_jax as lq
    from llmq_jax.language_model import LanguageModel
    from llmq_jax.model_files import save
    from llmq_jax.objectives.next_token import NextToken
    from llmq_jax.training.optimizer import adamw
    from llmq_jax.training.state import create_state
    from llmq_jax.training.step import make_train_step

    tokenizer = lq.ByteTokenizer()
    config = lq.GPT2Config(vocab_size=tokenizer.vocab_size, **SIZES)
    ends = lq.GenerationConfig(eos_token_id=(tokenizer.end_of_text,))
    lm = LanguageModel(config, lq.build(config), lq.init(config, seed=seed), tokenizer, ends)
    texts = [tokenizer.encode(prompt(a, b) + answer(a, b)) for a, b in training]
    rows = np.array([[*ids, tokenizer.end_of_text] for ids in texts], np.int32)
    answers = np.arange(1, rows.shape[1]) >= len(prompt(0, 0))
    mask = np.broadcast_to(answers.astype(np.float32), (WARM_UP_BATCH, rows.shape[1] - 1))

    optimizer = adamw(lambda step: WARM_UP_RATE, weight_decay=0.0)
    state = create_state(lm.variables, optimizer, seed=seed)
    train_step = make_train_step(NextToken(lm.model), optimizer)
    rng = np.random.default_rng(seed)
    for step in range(1, WARM_UP_STEPS + 1):
        batch = rows[rng.integers(0, len(rows), WARM_UP_BATCH)]
        state, _ = train_step(state, {"tokens": batch[:, :-1], "targets": batch[:, 1:], "mask": mask})
        if step % WATCH_EVERY == 0:
            learner = lm.replace(variables=state.variables)
            right = exact(learner, watched)
            if right >= ENOUGH:
                break
    print(f"warm-up: {step} steps of {WARM_UP_BATCH} sums, {right:.1%} of {len(watched)} others right", flush=True)
    save(learner, folder)


def exact(lm: Any, pairs: list) -> float:
    """The share of sums whose greedy answer is right."""
    from llmq_jax.generation import Sampler, generate

    prompts = [prompt(a, b) for a, b in pairs]
    found = generate(lm, prompts, max_new_tokens=ANSWER_TOKENS, sampler=Sampler(temperature=0.0)).text
    return sum(text == answer(a, b) for text, (a, b) in zip(found, pairs, strict=True)) / len(pairs)


if __name__ == "__main__":
    run(main)
