"""A whole process, timed from outside: `python -m bench.start SIDE WHAT FOLDER [BATCH CONTEXT]`.

WHAT is `step` (a first training step, from fresh weights), `token` (the first token after a prompt, with model and
tokenizer from a Hugging Face folder), or `folder`, which writes that folder from the config in its `fields.json`. The
line `done` on standard output stops the clock.
"""

import json
import sys
from pathlib import Path

from bench.inputs import random_batch
from llmq_jax.backend import keep_programs

PROMPT = "The capital of France is"


def write_folder(folder: Path) -> None:
    import llmq_jax as lq
    from llmq_jax.models import ARCHITECTURES

    fields = json.loads((folder / "fields.json").read_text())
    config = ARCHITECTURES[fields.pop("model_type")].config_class(**fields)
    tokenizer = lq.load_tokenizer("gpt2" if config.vocab_size == 50257 else "bytes")
    lq.save_hf(lq.LanguageModel(config, lq.build(config), lq.init(config), tokenizer), folder / "model")


def our_step(folder: Path, batch: int, context: int) -> None:
    import llmq_jax as lq

    keep_programs()
    config = lq.interop.config_from_hf(json.loads((folder / "model" / "config.json").read_text()))
    objective = lq.objectives.NextToken(lq.build(config, scan_layers=False))
    optimizer = lq.training.adamw(1e-3)
    state = lq.training.create_state(lq.init(config, seed=0), optimizer)
    train_step = lq.training.make_train_step(objective, optimizer)
    _, metrics = train_step(state, random_batch(config.vocab_size, batch, context))
    float(metrics["loss"])


def our_token(folder: Path) -> None:
    import llmq_jax as lq

    keep_programs()
    pieces = lq.stream(lq.load(folder / "model"), PROMPT, sampler=lq.Sampler(temperature=0.0))
    next(pieces)


def their_step(folder: Path, batch: int, context: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    drawn = random_batch(config.vocab_size, batch, context)
    tokens, targets = (torch.from_numpy(drawn[name]).long() for name in ("tokens", "targets"))
    logits = model(tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.view(-1, config.vocab_size), targets.reshape(-1))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    loss.item()


def their_token(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=1, pad_token_id=0)
    tokenizer.decode(tokens[0])


def main() -> None:
    side, what, folder, *shape = sys.argv[1:]
    run = {
        ("ours", "folder"): write_folder,
        ("ours", "step"): our_step,
        ("ours", "token"): our_token,
        ("transformers", "step"): their_step,
        ("transformers", "token"): their_token,
    }[side, what]
    run(Path(folder), *map(int, shape))
    print("done", flush=True)


if __name__ == "__main__":
    main()
