"""The options of a recipe reach what computes: each with a value of its own, in a run up to its first step."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import llmq_jax as lq
from llmq_jax import data
from llmq_jax.data import ByteTokenizer
from llmq_jax.errors import BadInput
from llmq_jax.generation import Sampler
from llmq_jax.language_model import LanguageModel, with_classifier
from llmq_jax.layers import fresh_adapters
from llmq_jax.layers.lora import LoRA
from llmq_jax.objectives.grpo import LossOptions
from llmq_jax.training import engine, optimizer, step
from llmq_jax.training.optimizer import warmup_schedule
from llmq_jax.training.run_options import RunOptions
from train.grpo import Options, loss_options

CONFIG = lq.Llama3Config(
    vocab_size=257,
    max_position_embeddings=64,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    intermediate_size=24,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name in a command: path}"""
    folder = tmp_path_factory.mktemp("files")
    lm = LanguageModel(CONFIG, lq.build(CONFIG), lq.init(CONFIG), ByteTokenizer())
    records = {
        "TEXTS": [{"kind": ("a", "b")[i % 2], "label": "c", "text": f"{i}"} for i in range(40)],
        "CHATS": [{"prompt": f"{i}:", "completion": "yes"} for i in range(12)],
        "PAIRS": [{"prompt": f"{i}:", "chosen": "yes", "rejected": "no"} for i in range(12)],
        "PROMPTS": [{"prompt": f"{i}:", "answer": f"{i}"} for i in range(12)],
    }
    for name, rows in records.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "MODEL": lq.save(lm, folder / "model"),
        "JUDGE": lq.save(with_classifier(lm, ["reward"]), folder / "judge"),
        **{name: folder / f"{name}.jsonl" for name in records},
    }


@pytest.fixture
def reached(program, monkeypatch, tmp_path, files):
    """`reached(recipe, *options)` -> what a recipe calls with them, each as (arguments, named ones): `run` of the
    engine, `adapters`, the last `step` and `optimizer`, and the first `batches`."""
    monkeypatch.chdir(tmp_path)
    called = {}

    def watch(module, name, key):
        function = getattr(module, name)

        def watched(*arguments, **named):
            if not (key == "batches" and key in called):
                called[key] = arguments, named
            if key == "run":
                raise BadInput("as far as the first step")
            return function(*arguments, **named)

        monkeypatch.setattr(module, name, watched)

    watch(engine, "run", "run")
    watch(fresh_adapters, "add_adapters", "adapters")
    watch(step, "make_train_step", "step")
    watch(optimizer, "adamw", "optimizer")
    watch(optimizer, "muon", "optimizer")
    watch(data, "training_batches", "batches")
    watch(data, "instruction_batches", "batches")

    def call(recipe, *options):
        called.clear()
        told = program(f"train.{recipe}", *(files.get(option, option) for option in options), "--out=run")[2]
        assert told == "error: as far as the first step\n"
        return SimpleNamespace(**called)

    return call


SIZES = ("--num-hidden-layers=1", "--hidden-size=8", "--num-attention-heads=2", "--context=8", "--sample-every=0")
RECIPES = {
    "pretrain": ("--data", "TEXTS", *SIZES),
    "instruct": ("--data", "CHATS", "--init-from", "MODEL", "--no-pack"),
    "classifier": ("--data", "TEXTS", "--init-from", "MODEL", "--label-field=kind"),
    "reward": ("--data", "PAIRS", "--init-from", "MODEL"),
    "dpo": ("--data", "PAIRS", "--init-from", "MODEL"),
    "grpo": ("--data", "PROMPTS", "--init-from", "MODEL", "--max-new-tokens=5"),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_seed_and_a_part_of_what_is_held_out(reached, files, monkeypatch, recipe):
    """The seed is that of dropout, of the order of the data, and of whatever is drawn afresh."""
    monkeypatch.setattr(step, "evaluate", lambda eval_step, variables, batches: len(list(batches)))
    options = ["--seed=11", "--steps=2"]
    some = recipe in ("pretrain", "instruct", "reward", "dpo")
    if some:
        options += ["--evaluate-batches=1", "--validation-fraction=0.5", "--batch-size=2"]
    given = reached(recipe, *RECIPES[recipe], *options)
    (state, _, batches, _), named = given.run
    np.testing.assert_array_equal(state.key, jax.random.key_data(jax.random.key(11)))
    assert getattr(batches, "seed", None) == 11 or given.batches[1]["seed"] == 11
    assert not some or named["evaluate"](None) == 1
    if recipe == "pretrain":
        jax.tree.map(np.testing.assert_array_equal, state.variables, lq.init(named["model_config"], 11))
    if recipe in ("classifier", "reward"):
        drawn = with_classifier(lq.load(files["MODEL"]), named["model_config"].labels, 11).params["score"]["kernel"]
        np.testing.assert_array_equal(state.variables["params"]["score"]["kernel"], drawn)


def test_options_that_recipes_share(reached):
    options = "--steps=9 --batch-size=4 --accumulate=2 --seed=11 --schedule=wsd --decay-steps=3 --warmup-steps=2"
    options += " --learning-rate=0.1 --minimum-learning-rate=0.03 --initial-learning-rate=0.02 --betas 0.8 0.9"
    options += " --weight-decay=0.05 --clip=0.5 --moments=bfloat16 --dtype=bfloat16 --remat=dots --no-scan-layers"
    options += " --attention=masked --log-every=3 --evaluate-every=4 --patience=2 --sample-every=5 --profile=1:2"
    options += " --checkpoint-every=6 --keep-last=7 --on-full-disk=continue --lora-rank=2 --lora-alpha=3"
    options += " --lora-targets q_proj,v_proj --lora-layers=1 --lora-dropout=0.25 --lora-rslora --lora-whole lm_head"
    given = reached("instruct", "--data", "CHATS", "--init-from", "MODEL", *options.split())

    spec = LoRA(2, 3.0, ("q_proj", "v_proj"), (1,), use_rslora=True, dropout=0.25, whole=("lm_head",))
    assert given.adapters[0][2] == spec and given.adapters[0][4] == 11
    (objective, _), how = given.step
    model = objective.model
    assert (model.dtype, model.remat, model.scan_layers, model.attention) == ("bfloat16", "dots", False, "masked")
    assert how == {"accumulate": 2, "mode": "jit"}
    (rate,), settings = given.optimizer
    assert settings == {"b1": 0.8, "b2": 0.9, "weight_decay": 0.05, "clip": 0.5, "moments": "bfloat16"}
    rates = {"peak": 0.1, "steps": 9, "warmup_steps": 2, "initial": 0.02, "minimum": 0.03}
    expected = warmup_schedule(**rates, decay="wsd", decay_steps=3)
    for update in range(9):
        assert rate(update) == given.run[1]["schedule"](update) == expected(update)
    intervals = {"log_every": 3, "evaluate_every": 4, "sample_every": 5, "checkpoint_every": 6}
    others = {"patience": 2, "keep_last": 7, "on_full_disk": "continue", "profile": "1:2", "evaluate_first": True}
    assert given.run[0][3] == RunOptions(9, **intervals, **others)
    recorded, may_change = (given.run[1][name] for name in ("config", "may_change"))
    assert {"accumulate", "remat", "scan_layers", "attention", "data", "sample_prompt"} <= set(may_change)
    assert recorded["seed"] == 11 and {"seed", "batch_size", "dtype", "betas"}.isdisjoint(may_change)
    assert {"device", "mesh", "out", "options"}.isdisjoint(recorded)  # where it is computed, and written


def test_options_of_other_kinds_of_adapters_and_of_muon(reached):
    base = ("--data", "CHATS", "--init-from", "MODEL", "--steps=2", "--sample-every=0")
    tiny = ("--lora-variant=tinylora", "--lora-numbers=5", "--lora-tied")
    assert reached("instruct", *base, *tiny).adapters[0][2] == LoRA(variant="tinylora", numbers=5, tied=True)
    given = reached("instruct", *base, "--train=all", "--optimizer=muon", "--dtype=bfloat16", "--clip=0")
    assert given.optimizer[1]["dtype"] == "bfloat16" and given.optimizer[1]["clip"] is None


def test_options_of_classifiers(reached):
    options = ("--label-field=kind", "--class-weights", "--steps=2")
    given = reached("classifier", "--data", "TEXTS", "--init-from", "MODEL", *options)
    assert given.step[0][0].class_weights == (1.0, 1.0)


def test_options_of_preferences(reached):
    base = ("--data", "PAIRS", "--init-from", "MODEL", "--steps=2", "--sample-every=0")
    objective = reached("reward", *base, "--pooling=mean", "--center=0.25").step[0][0]
    assert (objective.pooling, objective.center) == ("mean", 0.25)
    objective = reached("dpo", *base, "--beta=0.3", "--loss=robust", "--label-smoothing=0.2", "--normalise").step[0][0]
    assert (objective.beta, objective.loss_type) == (0.3, "robust")
    assert (objective.label_smoothing, objective.normalise) == (0.2, True)


def test_options_of_grpo(reached):
    options = "--steps=4 --seed=11 --prompts-per-step=3 --group-size=2 --max-new-tokens=5 --temperature=0.7 --top-k=6"
    options += " --top-p=0.9 --iterations=2 --scale=none --loss=dapo --clip-low=0.1 --clip-high=0.4 --beta=0.2 --kl=k2"
    options += " --kl-by-ratio --reference=start --entropy-coefficient=0.01 --mask-truncated --dynamic-sampling"
    options += " --sample-every=0 --min-p=0.05 --repetition-penalty=1.1"
    base = ("--data", "PROMPTS", "--init-from", "MODEL", *options.split())
    given = reached("grpo", *base)
    (_, take_step, batches, _), named = given.run
    loop, bounds = take_step.__self__, {"clip_low": 0.1, "clip_high": 0.4}
    loss = vars(LossOptions(loss_type="dapo", **bounds, beta=0.2, kl="k2", kl_by_ratio=True, entropy_coefficient=0.01))
    assert loss.items() <= vars(loop.objective).items()
    assert (loop.objective.temperature, loop.sampler) == (0.7, Sampler(0.7, 6, 0.9, 0.05, 1.1))
    assert (loop.group_size, loop.max_new_tokens, loop.iterations, loop.scale) == (2, 5, 2, "none")
    assert (loop.reference, loop.mask_truncated, loop.dynamic_sampling, loop.seed) == ("start", True, True, 11)
    assert (batches.size, batches.seed, named["updates_per_step"]) == (3, 11, 2)

    judged = "--reward-pooling=mean --judge=length:3 --replay-data PAIRS --replay=0.5 --reward-learning-rate=0.01"
    judged += " --steps-per-iteration=2 --clip=0.5"
    given = reached("grpo", *base, "--reward", "JUDGE", *judged.split())
    loop = given.run[0][1].__self__
    learner = loop.reward_learner
    assert loop.score.pooling == given.step[0][0].pooling == "mean"
    assert (loop.steps_per_iteration, learner.steps_per_iteration, learner.new_pairs) == (2, 2, 3)
    assert (learner.replay.batch_size, learner.replay.seed) == (3, 11)
    (rate,), settings = given.optimizer
    assert rate(0) == 0.01 and settings == {"weight_decay": 0.0, "clip": 0.5}

    longest = loss_options(Options("data", "model", "run", loss="dr_grpo", max_new_tokens=5))["max_length"]
    assert longest == 5

    steps = ("--reward", "JUDGE", "--supervision=process", "--step-separator=;")
    scorer = reached("grpo", *base, *steps).run[0][1].__self__.score
    assert (scorer.process, scorer.separator) == (True, ";")


def test_options_of_prompts(reached, monkeypatch):
    """Which are asked, in which form, and which are held out."""
    monkeypatch.setattr("train.grpo.validated", lambda loop, variables, prompts, rows: {p.text for p in prompts})
    base = ("--data", "PROMPTS", "--init-from", "MODEL", "--max-new-tokens=5", "--steps=2", "--sample-every=0")
    base = (*base, "--prompt-format=Q{prompt}", "--validation-fraction=0.5", "--max-prompt=3")  # without Q10: and Q11:
    held_out = []
    for more in ((), ("--split-seed=3",), ("--validation-prompts=2",)):
        (_, take_step, *_), named = reached("grpo", *base, *more).run
        held_out.append(named["evaluate"](None))
        assert len(take_step.__self__.prompts) == 5
    assert all(len(text) == 3 and text[0] == "Q" for text in held_out[0])
    assert held_out[0] != held_out[1] and len(held_out[0]) == len(held_out[1]) == 5
    assert held_out[2] < held_out[0] and len(held_out[2]) == 2
