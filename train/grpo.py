r"""Group relative policy optimisation: a model learns by trying, from rewards for its own answers.

    python -m train.grpo --data sums.jsonl --init-from runs/sft --out runs/grpo --reward answer
    python -m train.grpo --data gsm8k_train.jsonl --init-from model.gguf --out runs/gsm --reward answer,format \
        --prompt-format "{question}" --max-new-tokens 256 --group-size 8
    python -m train.grpo --data prompts.jsonl --init-from runs/sft --out runs/rlhf --reward runs/reward --beta 0.04
    python -m train.grpo --data prompts.jsonl --init-from gpt2 --out runs/mine --reward my_rewards.py:shorter

Records have a prompt, a string or messages; reward functions read their other fields. Rewards are: answer (the final
number equals that of the field `answer`), exact (the final answer is that field, letter by letter), format
(<think>...</think><answer>...</answer>, graded), think (<think>...</think> and an answer), length:N (falls beyond N
characters), FILE.py:FUNCTION, or a reward model of train.reward. The same command again resumes a run that was stopped.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from llmq_jax.command_line import run
from llmq_jax.counts import counted
from llmq_jax.errors import BadInput
from llmq_jax.options import Flag, default_is, named_as_options, no_option, refuse_idle, with_breaks
from train.chat_templates import chat_template_digest, check_chat_template, with_chat_template
from train.devices import on_devices, row_parts
from train.exports import next_commands
from train.options import (
    MAY_CHANGE,
    VALIDATION_FRACTION,
    check_ranges,
    completed,
    filled,
    optimizer_of,
    own_options,
    run_options,
    train_step_of,
)
from train.prompts import numbered, prompts_of
from train.rewards import REWARD_RATE, names, reward_digests, reward_functions, reward_learner, reward_models, scorer_of
from train.sources import RecordOptions, one_split, sources_of
from train.texts import digests_of
from train.what_trains import FineTuningOptions, TuningOptions, check_what_trains, learner_of, load_to_train

LORA_RATE, FULL_RATE = 1e-5, 1e-6
SAMPLES, WIDTH = 4, 300
FILTERS = ("top_k", "top_p", "min_p", "repetition_penalty")
OF_LOSS = ("clip_low", "clip_high", "beta", "kl", "kl_by_ratio", "entropy_coefficient")
OF_VALIDATION = ("validation_data", "validation_prompts", "validation_fraction", "split_seed")


@dataclass(frozen=True)
class DataAndModelOptions:
    data: str
    """Prompts: a file or folder of .json, .jsonl, .csv, .tsv or .parquet. In a folder, file names may tell the splits
    (train.jsonl, validation.jsonl)."""
    init_from: str
    """The model to start from, with its tokenizer: a run folder, a checkpoint, a Hugging Face folder, a GGUF file or a
    hub id."""
    out: str
    """Run folder: options, metrics, samples, reward curves and checkpoints."""
    prompt_format: Annotated[str | None, default_is("{prompt}")] = None
    """How a prompt is made from a record's fields: "Question: {question}\\nAnswer:"."""
    template: Annotated[
        Literal["chat", "plain"] | None, default_is("chat for messages, and where the model has a template")
    ] = None
    """How prompts become text: by the model's chat template (chat), or as they are (plain)."""
    chat_template: Annotated[str | None, default_is("the model's own")] = None
    """A file with a Jinja chat template to use instead of the model's own; the run's tokenizer keeps it."""
    chat_template_kwargs: Annotated[str | None, default_is("none")] = None
    """Variables for the chat template, as JSON: {"enable_thinking": false} for Qwen 3; the run's tokenizer keeps
    them."""
    max_prompt: Annotated[int | None, default_is("what the context leaves beside --max-new-tokens")] = None
    """Greatest number of tokens in a prompt; longer prompts are left out."""
    validation_data: Annotated[str | None, default_is("the validation files of --data, or a part of it")] = None
    """Prompts to measure the validation reward on, by a greedy answer to each."""
    validation_fraction: Annotated[float | None, default_is(f"{VALIDATION_FRACTION}")] = None
    """Part of the prompts held out for validation. With --evaluate-every 0 nothing is held out."""
    validation_prompts: Annotated[int | None, default_is("all that are held out")] = None
    """Greatest number of held-out prompts that validation uses."""
    split_seed: Annotated[int | None, default_is("0")] = None
    """Seed for choosing what is held out."""


@dataclass(frozen=True)
class RewardOptions:
    reward: Annotated[str | None, default_is("answer")] = None
    """Reward functions (see above) and at most one reward model, separated by commas."""
    reward_weights: Annotated[str | None, default_is("1 for each")] = None
    """Factors by which the rewards of --reward are multiplied before they are added, separated by commas: 1,0.5."""
    reward_pooling: Annotated[Literal["last", "mean"] | None, default_is("last")] = None
    """The reward that a reward model gives an answer: that of its last token (last), or the mean over its tokens
    (mean)."""
    supervision: Literal["outcome", "process"] = "outcome"
    """Reward whole answers (outcome), or each step of an answer by the reward model (process; DeepSeekMath, 4.1.3)."""
    step_separator: Annotated[str | None, default_is(r"\n")] = None
    """Text that ends a step of an answer, with --supervision process."""


@dataclass(frozen=True)
class AlgorithmOptions:
    prompts_per_step: int = 8
    """P, prompts in a step."""
    group_size: int = 8
    """G, answers to each prompt."""
    max_new_tokens: int = 128
    """Greatest number of tokens in an answer; longer answers are cut."""
    temperature: float = 1.0
    """Temperature at which answers are sampled."""
    top_k: int = 0
    """Sample from this many likeliest tokens only; 0: from all."""
    top_p: float = 1.0
    """Sample from the fewest likeliest tokens whose probabilities add up to this; 1: from all."""
    min_p: Annotated[float | None, default_is("0")] = None
    """Leave out tokens that are less likely than this times the likeliest one; 0: none."""
    repetition_penalty: Annotated[float | None, default_is("1")] = None
    """Make tokens that the prompt or the answer holds less likely to be sampled (above 1) or likelier (below 1); 1:
    neither."""
    iterations: int = 1
    """mu, optimizer updates on the answers of a step (the inner loop; --steps-per-iteration is the outer)."""
    scale: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by: the standard deviation of the group's rewards, of the step's, or nothing."""
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "sapo", "cispo"] = "grpo"
    """How tokens are averaged and ratios bounded: see docs/grpo.md."""
    clip_low: Annotated[float | None, default_is("0.2")] = None
    """How far a token's probability ratio to the old policy may fall below 1."""
    clip_high: Annotated[float | None, default_is("--clip-low; for --loss cispo 5, the greatest ratio")] = None
    """How far a token's probability ratio to the old policy may rise above 1; 0.28 in DAPO."""
    beta: float = 0.0
    """Weight of the KL divergence from the reference in the loss; 0: there is no reference."""
    kl: Annotated[Literal["k1", "k2", "k3"] | None, default_is("k3")] = None
    """KL estimator of the --beta term: k1, k2 or k3 (Schulman 2020)."""
    kl_by_ratio: Flag = False
    """Multiply each token's KL divergence by its ratio to the old policy, as TRL does unless told otherwise."""
    reference: Annotated[Literal["iteration", "start", "old"] | None, default_is("iteration")] = None
    """Reference of the --beta term: the policy at the start of each iteration (iteration; see --steps-per-iteration),
    at the start of the run (start), or the one that sampled the answers (old)."""
    steps_per_iteration: Annotated[int | None, default_is("the whole run")] = None
    """M, steps in an iteration of the outer loop (the inner is --iterations): at the end of each the reference is
    renewed, and the reward model learns if there is a --judge."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus: how much a nat of the policy's entropy lowers the loss."""
    mask_truncated: Flag = False
    """Leave answers that were cut at --max-new-tokens out of the loss."""
    dynamic_sampling: Flag = False
    """Replace prompts whose answers all have the same reward by other prompts, up to two times in a step."""


@dataclass(frozen=True)
class JudgeOptions:
    # A reward model that keeps learning (DeepSeekMath, 4.1.4).
    judge: Annotated[str | None, default_is("none: the reward model stays")] = None
    """Reward functions that rank the policy's answers; the reward model goes on learning from these rankings."""
    replay_data: Annotated[str | None, default_is("none")] = None
    """The preference pairs that the reward model was trained on, in the form that train.reward reads; --fields is for
    the prompts alone."""
    replay: Annotated[float | None, default_is("0.1")] = None
    """Share of old pairs, from --replay-data, among those that the reward model learns from with --judge."""
    reward_learning_rate: Annotated[float | None, default_is(f"{REWARD_RATE:g}")] = None
    """Learning rate of the reward model with --judge."""


@dataclass(frozen=True)
class Options(
    FineTuningOptions,
    TuningOptions,
    JudgeOptions,
    AlgorithmOptions,
    RewardOptions,
    RecordOptions,
    DataAndModelOptions,
):
    # Dataclasses collect the fields of their bases from right to left.
    steps: int = 200
    """Steps of GRPO; each samples answers and makes --iterations optimizer updates."""
    batch_size: None = no_option("in GRPO, whose rows are --prompts-per-step times --group-size")
    learning_rate: Annotated[float | None, default_is(f"{LORA_RATE:g} for adapters, else {FULL_RATE:g}")] = None
    """The peak learning rate, reached after the warm-up."""
    log_every: int = 1
    """Steps between two lines of metrics; 0: never."""
    evaluate_every: Annotated[int | None, default_is("ten times in the run")] = None
    """Steps between two measurements of the validation reward; 0: never."""
    checkpoint_every: Annotated[int | None, default_is("ten times in the run")] = None
    """Steps between two checkpoints, besides those saved at a new highest validation reward; 0: no checkpoints at
    all."""
    keep_last: Annotated[int | None, default_is("3")] = None
    """How many of the newest checkpoints to keep, besides the one with the highest validation reward."""
    sample_prompt: None = no_option("in GRPO, whose samples answer the step's own prompts")
    lora_dropout: None = no_option("in GRPO, whose policy learns as it answers, without dropout")

    @property
    def loss_of_parts(self) -> bool:
        return self.loss == "bnpo" or self.entropy_coefficient != 0


@on_devices
def main(options: Options) -> Any:
    """The whole recipe; returns the engine's RunResult."""
    check(options)
    options = resolved(options)

    # JAX has its device now: modules that import JAX may follow.
    import jax

    from llmq_jax.data.prompts import PromptBatches
    from llmq_jax.generation import Sampler
    from llmq_jax.model_files import TextFiles, save
    from llmq_jax.objectives.grpo import GRPO
    from llmq_jax.training import engine
    from llmq_jax.training.grpo import Loop
    from llmq_jax.training.reward_learner import REWARD_MODEL
    from llmq_jax.training.rollout_scores import reward_model_of

    if options.judge is not None and jax.process_count() > 1:
        raise BadInput("--judge is for one process: a reward model that learns is saved by one; leave it out")
    sources = sources_of(options, hold_out=options.evaluate_every != 0)
    replay_data = one_split(options.replay_data, "train")
    functions, judge = reward_functions(options)
    source = load_to_train(options)
    source.require_language_model(options.init_from)
    source = with_chat_template(options, source)
    source = source.replace(generation=source.generation.with_end(source.tokenizer.end_of_text))
    config = source.config
    options = with_longest_prompt(options, config)
    training, validation = prompts_of(options, sources, source)
    for each in (functions, judge):
        for part in (training, validation):
            if each is not None and part:
                each.rewards.check_columns(part[0].columns)
    batches = PromptBatches(len(training), options.prompts_per_step, options.seed)
    rows = options.prompts_per_step * options.group_size
    source, learner = learner_of(source, options, rows, drops=False)

    schedule, optimizer = optimizer_of(options, options.iterations)
    longest_prompt = max(len(prompt.tokens) for prompt in (*training, *validation))
    objective = GRPO(
        learner.model,
        **loss_options(options),
        temperature=options.temperature,
        group_size=shared_by(options, learner.model, longest_prompt),
    )
    longest = longest_prompt + options.max_new_tokens
    score = scorer_of(options, source, functions, longest)
    loop = Loop(
        lm=source,
        objective=objective,
        update=train_step_of(options, objective, optimizer),
        prompts=training,
        score=score,
        group_size=options.group_size,
        max_new_tokens=options.max_new_tokens,
        sampler=Sampler(options.temperature, **filters(options)),
        scale=options.scale,
        iterations=options.iterations,
        steps_per_iteration=options.steps_per_iteration,
        reference=options.reference or "iteration",
        mask_truncated=options.mask_truncated,
        dynamic_sampling=options.dynamic_sampling,
        seed=options.seed,
        reward_learner=reward_learner(options, replay_data, source, score, judge, longest),
    )
    print(
        f"{learner.described}\n{counted(len(training), 'prompt')} to learn from, {len(validation):,} held out; "
        f"{counted(options.prompts_per_step, 'prompt')} x {counted(options.group_size, 'answer')} = "
        f"{counted(rows, 'row')} a step\n"
        f"{source.model.attention_choice()}",
        flush=True,
    )

    def evaluate(variables):
        return validated(loop, variables, validation, rows)

    def sample(variables, at_step):
        return table(loop, variables, batches[at_step - 1])

    def conclude(result):
        learned = Path(options.out) / REWARD_MODEL
        if loop.reward_learner is None or learned.exists():
            return ""
        save(reward_model_of(score).lm.replace(variables=result.state.carried[REWARD_MODEL].variables), learned)
        return f"the reward model, which went on learning: {learned}"

    converses = options.template != "plain" and source.tokenizer.chat_template is not None
    digests = digests_of({"training": training, "validation": validation}, numbered)
    digests |= reward_digests(options, replay_data, score) | chat_template_digest(options, source.tokenizer)
    return engine.run(
        loop.start(learner.state(optimizer, options.seed)),
        loop.step,
        batches,
        run_options(options),
        folder=options.out,
        config={"recipe": "train.grpo", **own_options(options, "batch_size", "sample_prompt"), **digests},
        may_change=[name for name in MAY_CHANGE if name != "accumulate" or not options.loss_of_parts],
        model_config=config,
        tokenizer=TextFiles(source.tokenizer, source.generation),
        schedule=schedule,
        updates_per_step=options.iterations,
        evaluate=evaluate,
        judged_by=("reward", "highest"),
        sample=sample,
        show=("reward", "reward_std"),
        conclude=conclude,
        next_commands=next_commands(options.out, config, converses, prompt='"..."'),
    )


def shared_by(options: Options, model: Any, longest_prompt: int) -> int:
    """How many answers share one computation of their prompt in an update: those of a group or, where that is
    impossible or does not pay, 1."""
    from llmq_jax.objectives.grpo import can_share_prompts

    rows = options.prompts_per_step * options.group_size // (options.accumulate * row_parts(options))
    # With a shared prompt, answers attend to the whole cache under a mask; for long answers it costs less to compute
    # each row alone, block by block. The fused kernel computes rows alone and holds no scores; over a cache they are
    # [B, N, C, S] in every layer, more than is saved unless answers are short.
    window = getattr(model.config, "sliding_window", None) or math.inf
    fused = any(choice.name == "fused" for choice in model.attention_choices().values())
    worth_it = options.max_new_tokens <= min(longest_prompt // 2 if fused else 2 * longest_prompt, window)
    return options.group_size if worth_it and can_share_prompts(model) and rows % options.group_size == 0 else 1


def resolved(options: Options) -> Options:
    """The options with their defaults filled in."""
    texts = {name: getattr(options, name) for name in ("prompt_format", "step_separator")}
    texts = {name: with_breaks(text) for name, text in texts.items() if text is not None}
    options = filled(
        dataclasses.replace(options, **texts),
        learning_rate=LORA_RATE if options.train == "lora" else FULL_RATE,
        reward="answer",
        steps_per_iteration=options.steps,
    )
    return completed(options)


def check(options: Options) -> None:
    """BadInput for options that cannot be, or have no effect, before anything is written or a model is loaded."""
    from llmq_jax.generation import Sampler
    from llmq_jax.objectives.grpo import LossOptions

    options.field_names()  # read with the prompts, once the model is loaded
    counts = ("prompts_per_step", "group_size", "max_new_tokens", "iterations", "steps_per_iteration")
    check_ranges(
        options,
        *((name, lambda count: count >= 1, "be at least 1") for name in (*counts, "max_prompt", "validation_prompts")),
        ("temperature", lambda value: 0 < value < math.inf, "be positive: equal answers teach nothing"),
        ("reward_learning_rate", lambda rate: 0 < rate < math.inf, "be positive"),
        ("replay", lambda share: 0 < share < 1, "lie between 0 and 1"),
    )
    check_what_trains(options)
    check_chat_template(options)
    if options.group_size == 1:
        raise BadInput("--group-size is 1, and an answer alone has no others to be better than; choose 2 or more")
    rows = options.prompts_per_step * options.group_size
    if rows % options.accumulate:
        raise BadInput(
            f"--accumulate is {options.accumulate} and must divide the {rows} rows of a step (--prompts-per-step times "
            "--group-size)"
        )
    with named_as_options(*OF_LOSS, *FILTERS, loss_type="loss"):
        LossOptions(**loss_options(options))
        Sampler(**filters(options))
    if options.reward is not None and not names(options.reward):
        raise BadInput("--reward names no reward; leave it out for answer")
    if options.step_separator == "":
        raise BadInput("--step-separator is empty and must be what ends a step")
    no_model = not reward_models(options)
    one_update = options.iterations == 1
    at_one = "with --iterations 1, whose only update begins at the ratio 1"
    moves_once = options.judge is None and (options.beta == 0 or options.reference in ("start", "old"))
    refuse_idle(
        options,
        (
            ("clip_low", one_update, at_one),
            ("clip_high", one_update, at_one),
            ("reference", options.beta == 0, "with --beta 0"),
            ("steps_per_iteration", moves_once, "without a reference that moves (--beta) or --judge"),
            ("reward_pooling", no_model, "without a reward model in --reward"),
            ("reward_pooling", options.supervision == "process", "with --supervision process"),
            ("judge", no_model, "without a reward model in --reward"),
            ("step_separator", options.supervision != "process", "without --supervision process"),
            ("replay_data", options.judge is None, "without --judge"),
            ("replay", options.judge is None or options.replay_data is None, "without --judge and --replay-data"),
            ("reward_learning_rate", options.judge is None, "without --judge"),
            ("split_seed", options.validation_data, "beside --validation-data"),
            *((name, options.evaluate_every == 0, "with --evaluate-every 0") for name in OF_VALIDATION),
        ),
    )
    still = options.reference == "old" or (options.steps_per_iteration == 1 and options.reference != "start")
    if options.beta and one_update and still:
        raise BadInput(
            "--beta has no effect where the reference is the policy that learns, in the first update of every step: "
            "give more --iterations, or another --reference"
        )
    if (options.steps_per_iteration or 0) > options.steps:
        raise BadInput(
            f"--steps-per-iteration {options.steps_per_iteration} has no effect: the run has only "
            f"{counted(options.steps, 'step')}; leave it out, or give fewer"
        )
    if options.judge is not None and options.replay_data is None:
        raise BadInput("--judge needs --replay-data, the pairs that the reward model learned from before")
    if options.judge is not None and not (options.steps_per_iteration or options.steps) < options.steps:
        raise BadInput(
            f"--judge has no effect unless the reward model learns before the last of the {options.steps} steps; give "
            "--steps-per-iteration, a smaller number"
        )
    if options.supervision == "process" and (no_model or len(names(options.reward)) > 1):
        raise BadInput("--supervision process takes one reward model and nothing else: --reward FOLDER")


def loss_options(options: Options) -> dict[str, Any]:
    """Those of the objective's fields that the options of the loss give."""
    return {
        "loss_type": options.loss,
        "max_length": options.max_new_tokens if options.loss == "dr_grpo" else None,
        **{name: getattr(options, name) for name in OF_LOSS},
    }


def filters(options: Options) -> dict[str, Any]:
    """Those of the sampler's fields that the options give, beside the temperature, which the loss has too."""
    return {name: value for name in FILTERS if (value := getattr(options, name)) is not None}


def with_longest_prompt(options: Options, config: Any) -> Options:
    """The options with --max-prompt, by default what the model's context leaves beside an answer."""
    context = config.max_position_embeddings
    longest = context - options.max_new_tokens
    if longest < 1:
        raise BadInput(
            f"--max-new-tokens {options.max_new_tokens} leaves no room in the model's context, {context}; ask for fewer"
        )
    if options.max_prompt is not None and options.max_prompt > longest:
        raise BadInput(
            f"--max-prompt {options.max_prompt} and --max-new-tokens {options.max_new_tokens} exceed the model's "
            f"context, {context}; choose fewer"
        )
    return filled(options, max_prompt=longest)


def validated(loop: Any, variables: dict, prompts: Sequence[Any], rows: int) -> dict[str, float]:
    """The mean reward of greedy answers to held-out prompts, in total and by reward function. A reward model that
    learns is used as it was at first, so that the whole run is measured alike."""
    import numpy as np

    from llmq_jax.generation import Sampler
    from llmq_jax.training.rollouts import roll_out

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
    told = {name: np.concatenate(values) for name, values in found.items()}
    return {name: float(np.nanmean(values)) for name, values in told.items() if not np.isnan(values).all()}


def table(loop: Any, variables: dict, batch: dict) -> str:
    """A few freshly sampled answers to a prompt of the step, with their advantages and rewards (by a reward model as it
    was at first)."""
    import numpy as np

    from llmq_jax.data.prompts import step_seeds
    from llmq_jax.training.metrics import one_line

    prompt = loop.prompts[batch["prompts"][0]]
    seeds = step_seeds(loop.seed, int(batch["step"]), loop.group_size, stream=100)
    answers = loop.sample(loop.policy(variables), [prompt], seeds)
    scores = loop.score(answers)
    advantages = loop.advantages(scores)
    if advantages.ndim == 2:  # of steps of answers
        advantages = (advantages * answers.answer_mask).sum(1) / answers.answer_lengths
    lines = [one_line(prompt.text, WIDTH)]
    for row in range(min(SAMPLES, len(answers))):
        told = {name: values[row] for name, values in scores.by_name.items()}  # NaN: the function gave None
        each = " ".join(f"{name} none" if np.isnan(value) else f"{name} {value:.3g}" for name, value in told.items())
        cut = "" if answers.terminated[row] else ", cut"
        lines.append(
            f"-> reward {scores.rewards[row]:.3f} ({each}), advantage {advantages[row]:+.3f}, "
            f"{answers.answer_lengths[row]} tokens{cut}: {one_line(answers.completions[row], WIDTH)}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
