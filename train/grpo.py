"""Group relative policy optimisation: a model learns by trying, from rewards for its own answers.

    python -m train.grpo --data sums.jsonl --init-from runs/sft --out runs/grpo --reward answer
    python -m train.grpo --data gsm8k.jsonl --init-from model.gguf --out runs/gsm --reward answer,format \
        --prompt-format "{question}" --max-new-tokens 256 --group-size 8
    python -m train.grpo --data prompts.jsonl --init-from runs/sft --out runs/rlhf --reward runs/reward --beta 0.04
    python -m train.grpo --data prompts.jsonl --init-from gpt2 --out runs/mine --reward my_rewards.py:shorter

Records have a prompt, a string or messages; their other fields are for the reward functions. These are: answer (the
final number equals that of the field `answer`), format (<think>...</think><answer>...</answer>, graded), length:N,
FILE.py:FUNCTION, or a reward model of train.reward. The same command again resumes a run that was stopped.
"""

import dataclasses
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from llmq_jax.command_line import Flag, default_is, option_name, run, use_device
from llmq_jax.errors import BadInput
from train.options import TrainingOptions, check_ranges, completed, own_options, refuse_idle, run_options
from train.pretrain import exports
from train.texts import fingerprint
from train.what_trains import WhatTrains, check_what_trains, prepared

LORA_RATE, FULL_RATE = 1e-5, 1e-6
SAMPLES, WIDTH = 4, 300
SHOWN = ("reward", "reward_std")
PANELS = (
    ("reward", ("reward", "validation_reward")),
    ("spread of rewards within a group", ("reward_std",)),
    ("answers, tokens", ("completions/mean_length", "completions/mean_terminated_length")),
    ("shares", ("frac_reward_zero_std", "completions/clipped_ratio")),
    ("entropy, KL to the reference", ("entropy", "kl")),
    ("clipped share of tokens", ("clip_ratio/low_mean", "clip_ratio/high_mean")),
)


@dataclass(frozen=True)
class Questions:
    # What to answer, and where it goes.
    data: str
    """Prompts: .json, .jsonl, .csv, .tsv or .parquet."""
    init_from: str
    """The model to teach, with its tokenizer: a run folder, a checkpoint, a Hugging Face folder, GGUF or a hub id."""
    out: str
    """Run folder: options, metrics, samples, curves and checkpoints."""
    prompt_format: Annotated[str | None, default_is("{prompt}")] = None
    """How a prompt is made of a record's fields: "Question: {question}\\nAnswer:"."""
    template: Annotated[
        Literal["chat", "plain"] | None, default_is("chat for messages, and where the model has a template")
    ] = None
    """How prompts are written: by the model's chat template, or as they are."""
    max_prompt: Annotated[int | None, default_is("what the context leaves beside --max-new-tokens")] = None
    """Prompts of more tokens are left out."""
    validation_data: Annotated[str | None, default_is("a part of --data")] = None
    """Prompts to measure the validation reward on, by the likeliest answer to each."""
    validation_fraction: Annotated[float | None, default_is("0.1")] = None
    """Part of the prompts held out for validation."""
    validation_prompts: Annotated[int | None, default_is("all that are held out")] = None
    """So many of the held-out prompts at most."""
    split_seed: Annotated[int | None, default_is("0")] = None
    """Of the choice of what is held out."""

    # What answers are worth.
    reward: Annotated[str | None, default_is("answer")] = None
    """Reward functions and at most one reward model, with commas between them."""
    reward_weights: Annotated[str | None, default_is("1 for each")] = None
    """What each is multiplied by before they are added: 1,0.5."""
    reward_pooling: Annotated[Literal["last", "mean"] | None, default_is("last")] = None
    """The reward of a reward model: that of the last token, or the mean over the answer."""
    supervision: Literal["outcome", "process"] = "outcome"
    """Reward answers, or each of their steps, by the reward model (DeepSeekMath, 4.1.3)."""
    step_separator: Annotated[str | None, default_is(r"\n")] = None
    """What ends a step, with --supervision process."""


@dataclass(frozen=True)
class Algorithm:
    # The algorithm.
    prompts_per_step: int = 8
    """P, prompts in a step."""
    group_size: int = 8
    """G, answers to each prompt."""
    max_new_tokens: int = 128
    """Tokens of the longest answer."""
    temperature: float = 1.0
    """Of drawing answers."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that have this probability together."""
    iterations: int = 1
    """mu, updates on the same answers."""
    scale: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the standard deviation of the group's rewards, of the step's, or nothing."""
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "sapo", "cispo"] = "grpo"
    """How tokens are averaged and ratios bounded: see docs/grpo.md."""
    clip_low: Annotated[float | None, default_is("0.2")] = None
    """How far the ratio to the old policy may fall below 1."""
    clip_high: Annotated[float | None, default_is("--clip-low; for cispo 5, the greatest ratio")] = None
    """How far it may rise above 1; 0.28 in DAPO."""
    beta: float = 0.0
    """What the distance from the reference costs; 0: there is no reference."""
    kl: Annotated[Literal["k1", "k2", "k3"] | None, default_is("k3")] = None
    """The estimator of this distance."""
    reference: Annotated[Literal["iteration", "start", "old"] | None, default_is("iteration")] = None
    """The policy at the start of each --steps-per-iteration, that of the run's start, or the old policy."""
    steps_per_iteration: Annotated[int | None, default_is("the whole run")] = None
    """M, steps between two references, and two updates of a reward model that learns."""
    entropy_coefficient: float = 0.0
    """What a nat of the policy's entropy earns."""
    mask_truncated: Flag = False
    """Answers that were cut teach nothing."""
    dynamic_sampling: Flag = False
    """Prompts whose answers are all worth the same are replaced by others, up to two times."""

    # A reward model that keeps learning (DeepSeekMath, 4.1.4).
    judge: Annotated[str | None, default_is("none: the reward model stays")] = None
    """Reward functions that rank the answers that the reward model goes on learning from."""
    replay_data: Annotated[str | None, default_is("none")] = None
    """The pairs that the reward model learned from before."""
    replay: Annotated[float | None, default_is("0.1")] = None
    """Their share of what it goes on learning from."""
    reward_learning_rate: Annotated[float | None, default_is(f"{FULL_RATE * 10:g}")] = None
    """Of the reward model."""


@dataclass(frozen=True)
class Options(TrainingOptions, WhatTrains, Algorithm, Questions):  # dataclasses collect the fields from right to left
    steps: int = 200
    """Steps of the algorithm; each draws answers and makes --iterations updates."""
    batch_size: None = dataclasses.field(default=None, init=False)  # prompts_per_step x group_size
    learning_rate: Annotated[float | None, default_is(f"{LORA_RATE:g} for adapters, else {FULL_RATE:g}")] = None
    """The peak, reached after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the gradient's first and second moment."""
    weight_decay: float = 0.0
    """AdamW's decay of kernels and embeddings."""
    log_every: int = 1
    """Steps between two lines of metrics."""
    sample_prompt: None = dataclasses.field(default=None, init=False)  # samples answer the step's own prompts


def main(options: Options) -> None:
    grpo(options)


def grpo(options: Options) -> Any:
    """The whole recipe; returns the engine's RunResult."""
    options = resolved(options)
    check(options)
    use_device(options.device)

    # JAX has its device; what imports it may follow.
    from llmq_jax.data.prompts import PromptBatches
    from llmq_jax.generation import Sampler
    from llmq_jax.language_model import TextFiles, load
    from llmq_jax.models import build
    from llmq_jax.objectives.grpo import GRPO
    from llmq_jax.training import engine, step
    from llmq_jax.training.grpo import Loop
    from llmq_jax.training.optimizer import adamw, warmup_cosine
    from llmq_jax.training.plots import plot_panels
    from llmq_jax.training.state import create_state

    source = load(options.init_from, dtype="float32")  # the masters
    source.require_language_model(options.init_from)
    source.require_tokenizer(options.init_from)
    config = source.config
    options = with_longest_prompt(options, config)
    training, validation = questions(options, source)
    model = build(config, dtype=options.dtype, remat=options.remat, scan_layers=options.scan_layers)
    source = source.replace(model=model)
    learner = prepared(source, options)

    # A step makes several updates, and the schedule is that of steps.
    schedule = warmup_cosine(
        peak=options.learning_rate,
        steps=options.steps,
        warmup_steps=options.warmup_steps,
        initial=options.initial_learning_rate,
        minimum=options.minimum_learning_rate,
    )
    b1, b2 = options.betas
    optimizer = adamw(
        lambda update: schedule(update // options.iterations),
        b1=b1,
        b2=b2,
        weight_decay=options.weight_decay,
        clip=options.clip or None,
    )
    objective = GRPO(
        learner.model,
        loss_type=options.loss,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        beta=options.beta,
        kl=options.kl,
        max_length=options.max_new_tokens if options.loss == "dr_grpo" else None,
        entropy_coefficient=options.entropy_coefficient,
        temperature=options.temperature,
    )
    score = rewards(options, source)
    loop = Loop(
        source,
        objective,
        step.make_train_step(objective, optimizer, accumulate=options.accumulate),
        training,
        score,
        options.group_size,
        options.max_new_tokens,
        Sampler(options.temperature, options.top_k, options.top_p),
        options.scale,
        options.iterations,
        options.steps_per_iteration,
        options.reference or "iteration",
        options.mask_truncated,
        options.dynamic_sampling,
        options.seed,
        reward_learner(options, source, score),
    )
    rows = options.prompts_per_step * options.group_size
    print(
        f"{learner.described}\n{len(training):,} prompts to learn from, {len(validation):,} held out; "
        f"{options.prompts_per_step} prompts x {options.group_size} answers = {rows} rows a step\n"
        f"{model.attention_choice(options.max_prompt + options.max_new_tokens, training=True)}",
        flush=True,
    )

    def evaluate(variables):
        return validated(loop, variables, validation, rows)

    def sample(variables, at_step):
        return table(loop, variables, PromptBatches(len(training), options.prompts_per_step, options.seed)[at_step - 1])

    if not Path(options.out).exists() and options.evaluate_every != 0:
        means = evaluate(learner.variables)
        print(f"before training: {', '.join(f'{name} {value:.4f}' for name, value in means.items())}", flush=True)
    parts = {"training": training, "validation": validation}
    digests = {f"{name}_sha256": fingerprint(numbered(part)) for name, part in parts.items()}
    result = engine.run(
        loop.start(create_state(learner.variables, optimizer, seed=options.seed, trainable=learner.trainable)),
        loop.step,
        PromptBatches(len(training), options.prompts_per_step, options.seed),
        run_options(options),
        folder=options.out,
        config={"recipe": "train.grpo", **own_options(options, "batch_size", "sample_prompt"), **digests},
        model_config=config,
        tokenizer=TextFiles(source.tokenizer, source.generation),
        schedule=schedule,
        evaluate=evaluate,
        sample=sample,
        show=SHOWN,
        next_commands=tuple(next_commands(options, config)),
    )
    if options.log_every:
        print(f"curves: {plot_panels(options.out, PANELS)}", flush=True)
    return result


def resolved(options: Options) -> Options:
    """The options with what they leave open."""
    values: dict[str, Any] = {}
    if options.learning_rate is None:
        values["learning_rate"] = LORA_RATE if options.train == "lora" else FULL_RATE
    if options.reward is None:
        values["reward"] = "answer"
    if options.steps_per_iteration is None:
        values["steps_per_iteration"] = max(options.steps, 1)
    options = dataclasses.replace(options, **values)
    return completed(options)


def check(options: Options) -> None:
    """Refuse what cannot be, or would have no effect, before anything is read or written."""
    shared = {field.name: getattr(options, field.name) for field in dataclasses.fields(TrainingOptions)}
    check_ranges(TrainingOptions(**{**shared, "batch_size": max(options.accumulate, 1)}))
    check_what_trains(options)
    for name in ("prompts_per_step", "group_size", "max_new_tokens", "iterations", "steps_per_iteration"):
        if getattr(options, name) < 1:
            raise BadInput(f"{option_name(name)} is {getattr(options, name)} and must be at least 1")
    if options.group_size == 1:
        raise BadInput("--group-size is 1, and an answer alone has no others to be better than; choose 2 or more")
    rows = options.prompts_per_step * options.group_size
    if rows % options.accumulate:
        raise BadInput(
            f"--accumulate is {options.accumulate} and must divide the {rows} rows of a step (--prompts-per-step times "
            "--group-size)"
        )
    if not 0 < options.temperature < math.inf:
        raise BadInput(f"--temperature is {options.temperature} and must be positive: equal answers teach nothing")
    for name in ("max_prompt", "validation_prompts"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise BadInput(f"{option_name(name)} is {getattr(options, name)} and must be at least 1")
    if options.replay is not None and not 0 <= options.replay < 1:
        raise BadInput(f"--replay is {options.replay} and must be at least 0 and below 1")
    if options.validation_fraction is not None and not 0 < options.validation_fraction < 1:
        raise BadInput(f"--validation-fraction is {options.validation_fraction} and must lie between 0 and 1")
    no_model = not reward_models(options)
    refuse_idle(
        options,
        (
            ("kl", options.beta == 0, "with --beta 0"),
            ("reference", options.beta == 0, "with --beta 0"),
            ("reward_pooling", no_model, "without a reward model in --reward"),
            ("judge", no_model, "without a reward model in --reward"),
            ("step_separator", options.supervision != "process", "without --supervision process"),
            ("replay_data", options.judge is None, "without --judge"),
            ("replay", options.judge is None or options.replay_data is None, "without --judge and --replay-data"),
            ("reward_learning_rate", options.judge is None, "without --judge"),
            ("validation_fraction", options.validation_data, "beside --validation-data"),
            ("split_seed", options.validation_data, "beside --validation-data"),
            ("validation_data", options.evaluate_every == 0, "with --evaluate-every 0"),
            ("validation_prompts", options.evaluate_every == 0, "with --evaluate-every 0"),
            ("keep_last", options.checkpoint_every == 0, "with --checkpoint-every 0"),
        ),
    )
    if options.judge is not None and options.replay_data is None:
        raise BadInput("--judge needs --replay-data, the pairs that the reward model learned from before")
    if options.supervision == "process" and (no_model or len(names(options.reward)) > 1):
        raise BadInput("--supervision process takes one reward model and nothing else: --reward FOLDER")


def names(given: str | None) -> list[str]:
    return [name.strip() for name in (given or "").split(",") if name.strip()]


def reward_models(options: Options) -> list[str]:
    """Those of --reward that are models: whatever exists and is no Python file."""
    found = [name for name in names(options.reward) if Path(name.rpartition(":")[0] or name).suffix != ".py"]
    return [name for name in found if Path(name).exists()]


def with_longest_prompt(options: Options, config: Any) -> Options:
    """The options with the tokens that a prompt may have: what the context leaves beside an answer."""
    context = config.max_position_embeddings
    longest = context - options.max_new_tokens
    if longest < 1:
        raise BadInput(f"--max-new-tokens {options.max_new_tokens} leaves no room in the model's context, {context}")
    if options.max_prompt is not None and options.max_prompt > longest:
        raise BadInput(
            f"--max-prompt {options.max_prompt} and --max-new-tokens {options.max_new_tokens} exceed the model's "
            f"context, {context}; choose fewer"
        )
    return dataclasses.replace(options, max_prompt=options.max_prompt or longest)


def questions(options: Options, source: Any) -> tuple[list, list]:
    """(training, validation) prompts, none of which is in both."""
    import numpy as np

    from llmq_jax.data import check_vocabulary, split_documents
    from llmq_jax.data.prompts import read_prompts

    def read(path):
        found, dropped = read_prompts(
            path,
            source.tokenizer,
            template=options.template,
            prompt_format=options.prompt_format,
            longest=options.max_prompt,
        )
        if dropped:
            print(f"{path}: {dropped:,} prompts of more than {options.max_prompt} tokens are left out")
        for prompt in found:
            check_vocabulary(np.asarray(prompt.tokens), source.config.vocab_size, prompt.where)
        return found

    everything = read(options.data)
    if options.validation_data:
        validation = read(options.validation_data)
    else:
        distinct = list({prompt.text: prompt for prompt in everything}.values())
        fraction = 0.1 if options.validation_fraction is None else options.validation_fraction
        if len(distinct) < 2:
            raise BadInput(f"{options.data} holds one prompt, and some are held out: give more, or --validation-data")
        _, validation = split_documents(distinct, fraction, options.split_seed or 0)
    held_out = {prompt.text for prompt in validation}
    training = [prompt for prompt in everything if prompt.text not in held_out]
    if not training:
        raise BadInput(f"{options.data}: every prompt is in {options.validation_data} too; give others to learn from")
    return training, validation[: options.validation_prompts]


def rewards(options: Options, source: Any) -> Any:
    """What scores a rollout: functions of texts, a reward model, or both."""
    from llmq_jax.language_model import load
    from llmq_jax.rewards import Rewards, find
    from llmq_jax.training.grpo import ModelReward, SummedRewards, TextRewards

    given, models = names(options.reward), reward_models(options)
    weights = [1.0] * len(given)
    if options.reward_weights is not None:
        try:
            weights = [float(weight) for weight in names(options.reward_weights)]
        except ValueError:
            raise BadInput(f"--reward-weights is {options.reward_weights!r} and must be numbers: 1,0.5") from None
    if len(weights) != len(given):
        raise BadInput(f"--reward-weights has {len(weights)} numbers for {len(given)} rewards; give one for each")
    if len(models) > 1:
        raise BadInput(f"--reward names {len(models)} reward models ({', '.join(models)}); give one")
    texts = [(name, find(name), weight) for name, weight in zip(given, weights, strict=True) if name not in models]
    functions = TextRewards(Rewards(*(tuple(column) for column in zip(*texts, strict=True)))) if texts else None
    if not models:
        return functions
    lm = load(models[0], dtype="float32")
    if lm.config.labels is None or len(lm.config.labels) != 1:
        raise BadInput(f"{models[0]} is no reward model: it needs one label, as python -m train.reward gives it")
    if lm.config.vocab_size != source.config.vocab_size:
        theirs, ours = lm.config.vocab_size, source.config.vocab_size
        raise BadInput(
            f"the reward model {models[0]} has a vocabulary of {theirs:,} ids and the policy one of {ours:,}; take one "
            "of the same"
        )
    scorer = ModelReward(
        lm,
        options.reward_pooling or "last",
        process=options.supervision == "process",
        separator="\n" if options.step_separator is None else options.step_separator,
    )
    weight = weights[given.index(models[0])]
    if functions is None and weight == 1.0:
        return scorer
    if functions is None:
        raise BadInput("--reward-weights has no effect with a reward model alone; leave it out")
    return SummedRewards(functions, scorer, weight)


def reward_learner(options: Options, source: Any, score: Any) -> Any:
    """What lets the reward model go on learning; None where it stays."""
    from llmq_jax.data import PreferenceBatches, default_template, read_preferences, tokenize_preferences
    from llmq_jax.data.length_buckets import bucket_width
    from llmq_jax.objectives.reward import RewardModel
    from llmq_jax.rewards import Rewards, find
    from llmq_jax.training import step
    from llmq_jax.training.grpo import ModelReward, RewardLearner, TextRewards
    from llmq_jax.training.optimizer import adamw
    from llmq_jax.training.state import create_state

    if options.judge is None:
        return None
    model = score if isinstance(score, ModelReward) else score.model
    judges = names(options.judge)
    judge = TextRewards(Rewards(tuple(judges), tuple(find(name) for name in judges), (1.0,) * len(judges)))
    share = 0.1 if options.replay is None else options.replay
    longest = source.config.max_position_embeddings
    pairs = read_preferences(options.replay_data).pairs
    template = options.template or default_template([pair.chosen for pair in pairs], source.tokenizer)
    old = tokenize_preferences(pairs, source.tokenizer, template=template, context=longest)
    width = max(bucket_width(longest, longest), max(map(len, old.pairs)))
    count = max(1, round(options.prompts_per_step * share / (1 - share))) if share else 0
    if not count:
        raise BadInput("--replay 0 with --replay-data has no effect; leave both out, or choose a share above 0")
    rate = FULL_RATE * 10 if options.reward_learning_rate is None else options.reward_learning_rate
    optimizer = adamw(lambda update: rate, weight_decay=0.0, clip=options.clip or None)
    objective = RewardModel(model.lm.model, model.pooling)
    return RewardLearner(
        create_state(model.lm.variables, optimizer, seed=options.seed, trainable="params"),
        step.make_train_step(objective, optimizer),
        judge,
        PreferenceBatches(old.pairs, count, width, options.seed),
        options.prompts_per_step,
        options.steps_per_iteration,
        width,
    )


def validated(loop: Any, variables: dict, prompts: Sequence[Any], rows: int) -> dict[str, float]:
    """The mean reward of the likeliest answer to each prompt that is held out, by function too."""
    import numpy as np

    from llmq_jax.generation import Sampler
    from llmq_jax.training.grpo import roll_out

    policy = loop.policy(variables)
    found: dict[str, list] = {}
    for start in range(0, len(prompts), rows):
        part = list(prompts[start : start + rows])
        full = [part[index % len(part)] for index in range(min(rows, len(prompts)))]  # one shape, one program
        answers = roll_out(
            policy,
            full,
            group_size=1,
            max_new_tokens=loop.max_new_tokens,
            sampler=Sampler(temperature=0.0),
            seeds=[0] * len(full),
        ).groups(range(len(part)))
        scores = loop.score(answers)
        means = {"reward": scores.rewards, **{f"rewards/{name}/mean": x for name, x in scores.by_name.items()}}
        means["completions/mean_length"] = answers.answer_lengths
        for name, values in means.items():
            found.setdefault(name, []).append(values)
    return {name: float(np.nanmean(np.concatenate(values))) for name, values in found.items()}


def table(loop: Any, variables: dict, batch: dict) -> str:
    """A few answers to a prompt of the step, drawn anew, with their rewards and advantages."""
    from llmq_jax.data.prompts import row_seeds

    prompt = loop.prompts[batch["prompts"][0]]
    seeds = row_seeds(loop.seed, int(batch["step"]), loop.group_size, stream=100)
    answers = loop.sample(loop.policy(variables), [prompt], seeds)
    scores = loop.score(answers) if loop.latest is None else loop.scored(loop.latest, answers)
    advantages = loop.advantages(scores)
    advantages = (
        advantages if advantages.ndim == 1 else (advantages * answers.answer_mask).sum(1) / answers.answer_lengths
    )
    lines = [shortened(prompt.text)]
    for row in range(min(SAMPLES, len(answers))):
        each = " ".join(f"{name} {values[row]:.3g}" for name, values in scores.by_name.items())
        cut = "" if answers.terminated[row] else ", cut"
        lines.append(
            f"-> reward {scores.rewards[row]:.3f} ({each}), advantage {advantages[row]:+.3f}, "
            f"{answers.answer_lengths[row]} tokens{cut}: {shortened(answers.completions[row])}"
        )
    return "\n".join(lines)


def shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"


def numbered(prompts: Sequence[Any]) -> Any:
    """All prompts as one array, to be told from others by."""
    import numpy as np

    return np.concatenate([np.asarray([len(prompt.tokens), *prompt.tokens], np.int64) for prompt in prompts])


def next_commands(options: Options, config: Any) -> Iterator[str]:
    yield f'llmq generate {shlex.quote(options.out)} --prompt "..."'
    if exports(config):
        yield f"python -m convert.to_hf {shlex.quote(options.out)} {shlex.quote(options.out + '-hf')}"


if __name__ == "__main__":
    run(main)
