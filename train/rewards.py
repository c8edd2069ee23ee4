"""The rewards of answers, from the options of train.grpo: reward functions, a reward model, and how it goes on
learning."""

import math
import os
from pathlib import Path
from typing import Any

from llmq_jax.counts import counted
from llmq_jax.errors import BadInput
from train.devices import row_parts
from train.sources import tell_left_out

REWARD_RATE = 1e-5


def names(given: str | None) -> list[str]:
    """What an option lists between commas; a ~ at the beginning of a path is the home directory."""
    return [os.path.expanduser(name.strip()) for name in (given or "").split(",") if name.strip()]


def in_file(name: str) -> bool:
    """Whether a reward is a function of a Python file: FILE.py:FUNCTION."""
    return Path(name.rpartition(":")[0] or name).suffix == ".py"


def reward_models(options: Any) -> list[str]:
    """The names in --reward that are reward models: existing paths that are neither Python files nor built-in
    rewards."""
    from llmq_jax.rewards import is_built_in

    found = [name for name in names(options.reward) if not in_file(name)]
    return [name for name in found if not is_built_in(name) and Path(name).exists()]


def reward_functions(options: Any) -> tuple[Any, Any]:
    """(the reward functions of --reward, those of --judge), None where there are none. Needs no model."""
    given, models = names(options.reward), reward_models(options)
    if len(models) > 1:
        raise BadInput(f"--reward names {len(models)} reward models ({', '.join(models)}); give one")
    weights = dict(zip(given, reward_weights(options), strict=True))
    texts = [name for name in given if name not in models]
    if not texts and options.reward_weights is not None:
        raise BadInput("--reward-weights has no effect with a reward model alone; leave it out")
    judges = names(options.judge)
    return (
        text_rewards(texts, [weights[name] for name in texts], "--reward"),
        text_rewards(judges, [1.0] * len(judges), "--judge"),
    )


def reward_weights(options: Any) -> list[float]:
    given = names(options.reward)
    if len(set(given)) < len(given):
        raise BadInput(f"--reward {options.reward} names a reward twice; give each once")
    if options.reward_weights is None:
        return [1.0] * len(given)
    try:
        weights = [float(weight) for weight in names(options.reward_weights)]
    except ValueError:
        weights = [math.nan]
    if not all(map(math.isfinite, weights)):
        raise BadInput(f"--reward-weights is {options.reward_weights!r} and must be numbers: 1,0.5")
    if not any(weights):
        raise BadInput(f"--reward-weights {options.reward_weights} leaves no reward; give one that is not 0")
    if len(weights) != len(given):
        numbers, rewards = counted(len(weights), "number"), counted(len(given), "reward")
        raise BadInput(f"--reward-weights has {numbers} for {rewards}; give one for each")
    return weights


def text_rewards(given: list[str], weights: list[float], option: str) -> Any:
    """The reward functions of these names; None without any. One from a file is shown by its function's name, if that
    is unique."""
    from llmq_jax.rewards import Rewards, find
    from llmq_jax.training.rollout_scores import TextRewards

    if not given:
        return None
    for name in given:
        if "/" in name and not in_file(name):
            raise BadInput(f"{option} {name}: there is no such folder, for a reward model, and no such function")
    functions = tuple(find(name) for name in given)
    short = [name.rpartition(":")[2] if ".py:" in name else name for name in given]
    called = given if len(set(short)) < len(short) else short
    return TextRewards(Rewards(tuple(called), functions, tuple(weights)))


def scorer_of(options: Any, source: Any, functions: Any, longest: int) -> Any:
    """The scorer of rollouts, whose rows have up to `longest` tokens: reward functions, a reward model, or both."""
    from llmq_jax.data import chat_ending
    from llmq_jax.model_files import load
    from llmq_jax.training.rollout_scores import ModelReward, SummedRewards

    models = reward_models(options)
    if not models:
        return functions
    (folder,) = models
    lm = load(folder, dtype="float32")
    # In float32, for which there is no fused kernel.
    attention = "auto" if options.attention == "fused" else options.attention
    how = {"remat": options.remat, "scan_layers": options.scan_layers, "attention": attention}
    lm = lm.replace(model=lm.model.clone(**how))
    if lm.config.labels is None or len(lm.config.labels) != 1:
        raise BadInput(f"{folder} is no reward model: it needs one label, as python -m train.reward gives it")
    lm.require_tokenizer(folder)
    source.require_same_vocabulary(lm, f"the reward model {folder}")
    is_chat = options.template != "plain"
    ending = chat_ending(source.tokenizer, source.generation.eos_token_id) if is_chat else []
    if longest + len(ending[1:]) > lm.config.max_position_embeddings:
        raise BadInput(
            f"the reward model {folder} reads {lm.config.max_position_embeddings:,} tokens, and the longest prompt "
            f"with --max-new-tokens {options.max_new_tokens} has {longest + len(ending[1:]):,}; choose a smaller "
            "--max-prompt, or fewer new tokens"
        )
    scorer = ModelReward(
        lm,
        options.reward_pooling or "last",
        process=options.supervision == "process",
        separator="\n" if options.step_separator is None else options.step_separator,
        ending=ending,
    )
    if functions is None:
        return scorer
    if scorer.name in functions.rewards.names:
        raise BadInput(f"--reward names a function {scorer.name!r}, as the reward model is called; rename it")
    return SummedRewards(functions, scorer, reward_weights(options)[names(options.reward).index(folder)])


def reward_digests(options: Any, replay_data: Any, score: Any) -> dict[str, Any]:
    """SHA-256 of what rewards depend on besides the options, which must be unchanged when a run resumes: Python files,
    a reward model's weights, and the old pairs that it goes on learning from (`replay_data`, or None)."""
    from llmq_jax.training.manifest import file_digest
    from llmq_jax.training.rollout_scores import reward_model_of
    from llmq_jax.weight_digest import weight_digest

    given = (*names(options.reward), *names(options.judge))
    files = sorted({name.rpartition(":")[0] or name for name in given if in_file(name)})
    digests: dict[str, Any] = {"reward_sha256": {name: file_digest(name) for name in files}} if files else {}
    if reward_models(options):
        digests["reward_model_sha256"] = weight_digest(reward_model_of(score).lm.variables)
    if replay_data is not None:
        digests["replay_sha256"] = data_digest(replay_data)
    return digests


def data_digest(path: Any) -> Any:
    """SHA-256 of a file of records; for a folder {file: SHA-256}."""
    from llmq_jax.data.folders import FolderFiles
    from llmq_jax.training.manifest import file_digest

    if not isinstance(path, FolderFiles):
        return file_digest(path)
    return {str(file.relative_to(path.folder)): file_digest(file) for file in path.files}


def replayed(options: Any) -> int:
    """How many old pairs are learned beside the new ones of a step: the share --replay of all, rounded up so that a
    mesh's devices divide them evenly."""
    share = 0.1 if options.replay is None else options.replay
    count = max(1, round(options.prompts_per_step * share / (1 - share)))
    return count + -(options.prompts_per_step + count) % row_parts(options)


def reward_learner(options: Any, replay_data: Any, source: Any, score: Any, judge: Any, longest: int) -> Any:
    """The `RewardLearner` by which the reward model goes on learning; None where it stays as it is."""
    if judge is None:
        return None
    import jax
    import jax.numpy as jnp

    from llmq_jax.adapters import merge
    from llmq_jax.data import (
        PreferenceBatches,
        default_template,
        read_preferences,
        tokenize_preferences,
        without_padding,
    )
    from llmq_jax.data.length_buckets import bucket_width
    from llmq_jax.objectives.reward import RewardModel
    from llmq_jax.training import step
    from llmq_jax.training.optimizer import adamw
    from llmq_jax.training.reward_learner import RewardLearner
    from llmq_jax.training.rollout_scores import reward_model_of
    from llmq_jax.training.state import create_state

    model = reward_model_of(score)
    context = model.lm.config.max_position_embeddings
    left_out = options.left_out()
    pairs = read_preferences(replay_data, left_out).pairs
    template = options.template or default_template([pair.chosen for pair in pairs], source.tokenizer)
    old = tokenize_preferences(pairs, source.tokenizer, template=template, context=context, left_out=left_out).pairs
    tell_left_out(left_out)
    pad_token = model.lm.generation.pad_token_id
    old = old if pad_token is None else [without_padding(pair, pad_token) for pair in old]
    count = replayed(options)
    width = bucket_width(max(longest + len(model.ending[1:]), *map(len, old)), context)
    rate = REWARD_RATE if options.reward_learning_rate is None else options.reward_learning_rate
    optimizer = adamw(lambda update: rate, weight_decay=0.0, clip=options.clip or None)
    objective = RewardModel(model.lm.model, model.pooling)
    # All its weights learn, with adapters merged into them. Updates donate the arrays that they are given, and
    # validation needs the model as it was: hence the copy.
    variables = jax.tree.map(jnp.copy, merge(model.lm).variables)
    return RewardLearner(
        state=create_state(variables, optimizer, seed=options.seed, trainable="params"),
        update=step.make_train_step(objective, optimizer),
        judge=judge,
        replay=PreferenceBatches(old, count, width, options.seed),
        new_pairs=options.prompts_per_step,
        steps_per_iteration=options.steps_per_iteration,
        width=width,
        rows=model.rows,
    )
