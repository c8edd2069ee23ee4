"""The loop of group relative policy optimisation: DeepSeekMath (Shao et al. 2024, arXiv:2402.03300), Algorithm 1.

     1  policy <- initial policy
     2  for iteration = 1, ..., I
     3      reference <- policy
     4      for step = 1, ..., M
     5          sample a batch of questions
     6          old policy <- policy
     7          sample G answers of the old policy to each question
     8          compute the rewards of the answers
     9          compute the advantages, relative to the group
    10          for GRPO iteration = 1, ..., mu
    11              update the policy by maximising the GRPO objective
    12      update the reward model by continuous training with a replay mechanism

The lines stand in `Loop.step`, one call of which is a step of the loop above: I·M calls are a run. What a later step
needs of an earlier one (the reference, the reward model, the pairs that it will learn from) is in the state, so that a
run resumes anywhere. Everything that computes is compiled, once for each of a few lengths that rows are padded to.

Shapes: P prompts in a step, G answers each, B = P·G rows, T tokens of a row, C tokens of an answer.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llmq_jax.data.batching import pad
from llmq_jax.data.length_buckets import bucket_width
from llmq_jax.data.prompts import Prompt, columns_of, row_seeds
from llmq_jax.data.splits import seeded_order
from llmq_jax.data.text_stream import TextStream
from llmq_jax.errors import BadInput
from llmq_jax.generation import Sampler, generate
from llmq_jax.objectives.grpo import GRPO, group_advantages, process_advantages
from llmq_jax.objectives.logprobs import completion_logprobs
from llmq_jax.objectives.reward import model_rewards, token_scores
from llmq_jax.rewards import Rewards
from llmq_jax.training.parts import as_read, whole
from llmq_jax.training.state import TrainState
from llmq_jax.training.step import EXTREMES, ROUTER, combined

REFERENCE, REWARD_MODEL, PAIRS = "reference", "reward_model", "pairs"
"""What a state carries."""
ROUNDS = 3
"""So often at most are other questions asked in place of those without spread."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """Answers that a policy gave: `group_size` neighbouring rows answer the same prompt."""

    prompts: list[Prompt]
    group_size: int
    tokens: np.ndarray
    """int32 [B, T]: prompt and answer, padded on the right."""
    lengths: np.ndarray
    """int32 [B]"""
    prompt_lengths: np.ndarray
    """int32 [B]"""
    logprobs: np.ndarray
    """float32 [B, C]: of the answers' tokens, at the temperature that they were drawn at."""
    answer_mask: np.ndarray
    """float32 [B, C]: 1 on the answers' tokens, the end token included."""
    terminated: np.ndarray
    """bool [B]: whether an answer came to an end, and was not cut."""
    completions: list[str]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def answer_lengths(self) -> np.ndarray:
        return self.lengths - self.prompt_lengths

    def texts(self) -> list[str]:
        """The prompt of each row."""
        return [prompt.text for prompt in self.prompts for _ in range(self.group_size)]

    def response_mask(self, lengths: np.ndarray | None = None) -> np.ndarray:
        """float32 [B, T]: 1 on the answers' tokens, or on those of them before other `lengths`."""
        places = np.arange(self.tokens.shape[1])
        lengths = self.lengths if lengths is None else lengths
        inside = (places >= self.prompt_lengths[:, None]) & (places < lengths[:, None])
        return inside.astype(np.float32)

    def rows_of(self, groups: Sequence[int]) -> np.ndarray:
        """The rows of these groups."""
        return np.concatenate([np.arange(g * self.group_size, (g + 1) * self.group_size) for g in groups])

    def groups(self, chosen: Sequence[int]) -> "Rollout":
        """These groups alone."""
        rows = self.rows_of(chosen)
        arrays = {
            name: getattr(self, name)[rows]
            for name in ("tokens", "lengths", "prompt_lengths", "logprobs", "answer_mask", "terminated")
        }
        completions = [self.completions[row] for row in rows]
        return Rollout([self.prompts[g] for g in chosen], self.group_size, completions=completions, **arrays)


def roll_out(
    lm: Any, prompts: Sequence[Prompt], *, group_size: int, max_new_tokens: int, sampler: Sampler, seeds: Sequence[int]
) -> Rollout:
    """`group_size` answers of a model to each prompt, of at most `max_new_tokens` tokens; row r draws by seed r."""
    drawn = generate(
        lm,
        [prompt.tokens for prompt in prompts],
        samples=group_size,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        seed=list(seeds),
    )
    answers = [row[:length].tolist() for row, length in zip(drawn.tokens, drawn.lengths, strict=True)]
    asked = [prompt.tokens for prompt in prompts for _ in range(group_size)]
    rows = [[*prompt, *answer] for prompt, answer in zip(asked, answers, strict=True)]
    # One of a few widths: for each, all that reads the rows is compiled.
    tokens, lengths = pad(rows, bucket_width(max(map(len, rows)), lm.config.max_position_embeddings))
    ends = set(lm.generation.eos_token_id)
    return Rollout(
        list(prompts),
        group_size,
        tokens,
        lengths,
        np.array([len(prompt) for prompt in asked], np.int32),
        drawn.logprobs,
        (np.arange(max_new_tokens) < drawn.lengths[:, None]).astype(np.float32),
        np.array([answer[-1] in ends for answer in answers]),
        drawn.text,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Rewards


@dataclass(frozen=True)
class Scores:
    """What a rollout's answers are worth."""

    rewards: np.ndarray
    """float32 [B]"""
    by_name: Mapping[str, np.ndarray]
    """float32 [B] of each reward function, nan where it had none to give."""
    steps: np.ndarray | None = None
    """float32 [B, C], for process supervision: the reward of each step of an answer, where the step ends."""
    step_ends: np.ndarray | None = None
    """float32 [B, C]: 1 there."""

    def rows(self, chosen: np.ndarray) -> "Scores":
        """Those of some answers."""
        steps, ends = (None if x is None else x[chosen] for x in (self.steps, self.step_ends))
        return Scores(self.rewards[chosen], {name: x[chosen] for name, x in self.by_name.items()}, steps, ends)


@dataclass(frozen=True)
class TextRewards:
    """Rewards by functions of texts."""

    rewards: Rewards

    def __call__(self, rollout: Rollout, variables: dict | None = None) -> Scores:
        columns = columns_of(rollout.prompts, rollout.group_size)
        return Scores(*self.rewards(rollout.texts(), rollout.completions, columns))


@dataclass(frozen=True)
class SummedRewards:
    """Functions of texts and a reward model, which has a weight of its own."""

    texts: TextRewards
    model: "ModelReward"
    weight: float

    def __call__(self, rollout: Rollout, variables: dict | None = None) -> Scores:
        texts, model = self.texts(rollout), self.model(rollout, variables)
        return Scores(texts.rewards + self.weight * model.rewards, {**texts.by_name, **model.by_name})


@dataclass(frozen=True, eq=False)
class ModelReward:
    """Rewards by a model with a scalar head."""

    lm: Any
    pooling: str = "last"
    """The reward of an answer: that of its last token, or the mean over its tokens."""
    name: str = "model"
    process: bool = False
    """Reward each step of an answer where it ends, in place of the answer (DeepSeekMath, 4.1.3)."""
    separator: str = "\n"
    """What ends a step; the last one ends with the answer."""

    def __call__(self, rollout: Rollout, variables: dict | None = None) -> Scores:
        """`variables`: others than the model's, of a reward model that learns."""
        variables = self.lm.variables if variables is None else variables
        lengths = self.lengths(rollout)
        # It may read fewer tokens than the policy, and rows are padded.
        tokens = rollout.tokens[:, : self.lm.config.max_position_embeddings]
        mask = rollout.response_mask(lengths)[:, : tokens.shape[1]]
        rewards, by_token = _model_rewards(self.lm.model, variables, tokens, lengths, mask, pooling=self.pooling)
        rewards = np.asarray(rewards)
        if not np.isfinite(rewards).all():
            raise BadInput(f"the reward model gave {rewards[~np.isfinite(rewards)][0]}; train it anew")
        if not self.process:
            return Scores(rewards, {self.name: rewards})
        places = rollout.prompt_lengths[:, None] + np.arange(rollout.logprobs.shape[1])
        ends = step_ends(rollout, lengths, self.lm.tokenizer, self.separator)
        by_token = np.take_along_axis(np.asarray(by_token), np.minimum(places, tokens.shape[1] - 1), axis=1)
        return Scores(rewards, {self.name: rewards}, by_token * ends, ends)

    def lengths(self, rollout: Rollout) -> np.ndarray:
        """int32 [B]: tokens that the reward model reads. An end token that is its padding too is none: see
        `data.without_padding`."""
        pad_token = self.lm.generation.pad_token_id
        last = rollout.tokens[np.arange(len(rollout)), rollout.lengths - 1]
        trimmed = (last == pad_token) & (rollout.answer_lengths > 1) if pad_token is not None else 0
        return (rollout.lengths - trimmed).astype(np.int32)


@partial(jax.jit, static_argnames=("model", "pooling"))
def _model_rewards(model, variables, tokens, lengths, response_mask, *, pooling):
    variables = as_read(variables)
    rewards, _ = model_rewards(model, variables, tokens, lengths, response_mask, pooling)
    return rewards, token_scores(model, variables, tokens, lengths)[0]


def step_ends(rollout: Rollout, lengths: np.ndarray, tokenizer: Any, separator: str) -> np.ndarray:
    """float32 [B, C]: 1 on the token that completes a separator, and on the last token of the row, of `lengths` [B]."""
    ends = np.zeros(rollout.logprobs.shape, np.float32)
    for row, (start, length) in enumerate(zip(rollout.prompt_lengths, lengths, strict=True)):
        stream, open_end = TextStream(tokenizer, skip_special_tokens=True), ""
        for place, token in enumerate(rollout.tokens[row, start:length].tolist()):
            open_end += stream.push(token)
            if separator in open_end:
                ends[row, place] = 1.0
                open_end = open_end.rpartition(separator)[2]
        ends[row, length - start - 1] = 1.0
    return ends


def _part(rollout: Rollout, scores: Scores, groups: list[int]) -> tuple[Rollout, Scores]:
    return rollout.groups(groups), scores.rows(rollout.rows_of(groups))


def _joined(parts: Sequence[tuple[Rollout, Scores]]) -> tuple[Rollout, Scores]:
    """The groups of several rollouts as one."""
    rollouts, scores = zip(*parts, strict=True)
    width = max(rollout.tokens.shape[1] for rollout in rollouts)

    def together(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
        return None if arrays[0] is None else np.concatenate(arrays)

    names = ("lengths", "prompt_lengths", "logprobs", "answer_mask", "terminated")
    rollout = Rollout(
        [prompt for rollout in rollouts for prompt in rollout.prompts],
        rollouts[0].group_size,
        np.concatenate([np.pad(x.tokens, ((0, 0), (0, width - x.tokens.shape[1]))) for x in rollouts]),
        completions=[text for rollout in rollouts for text in rollout.completions],
        **{name: together([getattr(rollout, name) for rollout in rollouts]) for name in names},
    )
    by_name = {name: together([each.by_name[name] for each in scores]) for name in scores[0].by_name}
    rewards, steps, ends = (together([getattr(x, name) for x in scores]) for name in ("rewards", "steps", "step_ends"))
    return rollout, Scores(rewards, by_name, steps, ends)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


@dataclass(frozen=True)
class Asked:
    """What it took to get a step's answers."""

    seconds: float
    tokens: int
    """Of all rows that were drawn, those that were replaced too."""
    silent: float
    """The part of the first groups whose answers were all worth the same."""


@dataclass(eq=False)
class Loop:
    """See the top of the file; `step` is what an engine calls."""

    lm: Any
    """The model that answers: config, tokenizer and end tokens. Its variables are those of the state."""
    objective: GRPO
    """With the model that learns."""
    update: Callable[[TrainState, dict], tuple[TrainState, dict]]
    """A training step of the objective."""
    prompts: Sequence[Prompt]
    score: Callable[..., Scores]
    """Functions of texts, or a `ModelReward`."""
    group_size: int
    max_new_tokens: int
    sampler: Sampler
    scale: str = "group"
    """What advantages are divided by: the standard deviation of the group, of the batch, or nothing ("none")."""
    iterations: int = 1
    """mu, updates on the same answers."""
    steps_per_iteration: int = 1
    """M, steps between two new references, and two updates of the reward model."""
    reference: Literal["iteration", "start", "old"] = "iteration"
    """The reference is the policy at the start of each iteration, that of the run's start, or the old policy."""
    mask_truncated: bool = False
    """Answers that were cut teach nothing (DAPO, overlong filtering)."""
    dynamic_sampling: bool = False
    """Groups whose answers are all worth the same are replaced by others (DAPO)."""
    seed: int = 0
    reward_learner: "RewardLearner | None" = None
    """Lets the reward model learn on."""
    say: Callable[[str], None] = print
    silent_before: bool = field(default=False, init=False)

    def __post_init__(self):
        if self.group_size < 2:
            raise BadInput(f"group_size={self.group_size}: an answer alone has no others to be better than; choose 2")

    def step(self, state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        """One step of Algorithm 1, on the prompts that `batch` (of PromptBatches) names: (state, metrics)."""
        number = int(batch["step"])
        begin = time.monotonic()
        first_of_iteration = number % self.steps_per_iteration == 0
        if self.keeps_reference and self.reference == "iteration" and first_of_iteration:
            state = with_reference(state)  # line 3
        rollout, scores, asked = self.answered(state, batch)  # lines 5 to 8
        advantages = self.advantages(scores)  # line 9
        rows = self.rows(state, rollout, advantages)
        scored = time.monotonic()
        updates = []
        for _ in range(self.iterations):  # lines 10 and 11
            state, metrics = self.update(state, rows)
            updates.append(metrics)
        metrics = over_updates(jax.device_get(updates))
        learned = time.monotonic()
        if self.reward_learner is not None:  # line 12
            last = (number + 1) % self.steps_per_iteration == 0
            state = self.reward_learner.step(state, rollout, number % self.steps_per_iteration, last)
            metrics |= {"reward_model_seconds": np.float32(time.monotonic() - learned)}
        metrics |= self.figures(asked, rollout, scores, rows["completion_mask"])
        metrics |= {"rollout_seconds": np.float32(asked.seconds)}
        metrics |= {"scoring_seconds": np.float32(scored - begin - asked.seconds)}
        metrics |= {"update_seconds": np.float32(learned - scored)}
        return state, metrics

    @property
    def keeps_reference(self) -> bool:
        """Whether the state carries one."""
        return self.objective.beta > 0 and self.reference != "old"

    def start(self, state: TrainState) -> TrainState:
        """A fresh state with what the steps carry along."""
        if self.keeps_reference:
            state = with_reference(state)
        return state if self.reward_learner is None else self.reward_learner.start(state)

    def policy(self, variables: dict) -> Any:
        """The model that answers, with the variables of a state."""
        return self.lm.replace(variables=whole(variables))

    def answered(self, state: TrainState, batch: dict) -> tuple[Rollout, Scores, "Asked"]:
        """(answers of the policy as it is, what they are worth, what asking took)."""
        number, count = int(batch["step"]), len(batch["prompts"])
        begin = time.monotonic()
        policy = self.policy(state.variables)
        seconds, drawn, places, seen = time.monotonic() - begin, 0, list(batch["prompts"]), set()
        kept: list[tuple[Rollout, Scores]] = []
        needed, spare = count, None
        for attempt in range(ROUNDS if self.dynamic_sampling else 1):
            begin = time.monotonic()
            seeds = row_seeds(self.seed, number, count * self.group_size, attempt)
            rollout = self.sample(policy, [self.prompts[place] for place in places], seeds)
            seconds, drawn = seconds + time.monotonic() - begin, drawn + int(rollout.lengths.sum())
            scores = self.scored(state, rollout)
            teaches = self.teaches(scores)
            if attempt == 0:
                silent = float(1 - teaches.mean())
            if not self.dynamic_sampling or (attempt == 0 and teaches.all()):
                return rollout, scores, Asked(seconds, drawn, silent)
            useful = np.flatnonzero(teaches).tolist()[:needed]
            kept += [_part(rollout, scores, useful)] if useful else []
            needed -= len(useful)
            idle = np.flatnonzero(~teaches).tolist()
            spare = (rollout, scores, idle) if idle else spare
            seen |= set(places)
            if not needed:
                break
            places = self.other_prompts(number, attempt, count, seen)
        if needed:  # No others were found: those that teach nothing keep the shape.
            rollout, scores, idle = spare
            kept.append(_part(rollout, scores, [idle[index % len(idle)] for index in range(needed)]))
        return *_joined(kept), Asked(seconds, drawn, silent)

    def other_prompts(self, step: int, attempt: int, count: int, seen: set[int]) -> list[int]:
        """Prompts that this step has not asked yet and, where too few are left, some that it has."""
        order = seeded_order(len(self.prompts), [self.seed, step, attempt]).tolist()
        order = [place for place in order if place not in seen] + [place for place in order if place in seen]
        return [order[index % len(order)] for index in range(count)]

    def sample(self, policy: Any, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Rollout:
        return roll_out(
            policy,
            prompts,
            group_size=self.group_size,
            max_new_tokens=self.max_new_tokens,
            sampler=self.sampler,
            seeds=seeds,
        )

    def scored(self, state: TrainState, rollout: Rollout) -> Scores:
        if self.reward_learner is None:
            return self.score(rollout)
        return self.score(rollout, state.carried[REWARD_MODEL].variables)

    def spreads(self, rewards: np.ndarray) -> np.ndarray:
        """The standard deviation of each group's rewards; 0 where all are equal."""
        groups = rewards.reshape(-1, self.group_size)
        return np.where(np.ptp(groups, axis=1) == 0, 0.0, groups.std(axis=1, ddof=1))

    def teaches(self, scores: Scores) -> np.ndarray:
        """bool [P]: whether any answer of a group has an advantage."""
        return (self.advantages(scores) != 0).reshape(len(scores.rewards) // self.group_size, -1).any(axis=1)

    def advantages(self, scores: Scores) -> np.ndarray:
        """[B] by the answers' rewards or, where there are rewards of steps, [B, C]."""
        if scores.steps is None:
            return np.asarray(group_advantages(jnp.asarray(scores.rewards), self.group_size, scale=self.scale))
        steps, ends = jnp.asarray(scores.steps), jnp.asarray(scores.step_ends)
        return np.asarray(process_advantages(steps, ends, self.group_size, scale=self.scale))

    def rows(self, state: TrainState, rollout: Rollout, advantages: np.ndarray) -> dict[str, np.ndarray]:
        """A batch of the objective."""
        mask = rollout.answer_mask
        if self.mask_truncated:
            mask = mask * rollout.terminated[:, None]
        rows = {
            "tokens": rollout.tokens,
            "lengths": rollout.lengths,
            "prompt_lengths": rollout.prompt_lengths,
            "completion_mask": mask,
            "old_logprobs": rollout.logprobs,
            "advantages": advantages,
        }
        if self.objective.beta > 0:
            rows["reference_logprobs"] = (
                rollout.logprobs if self.reference == "old" else self.reference_logprobs(state, rollout)
            )
        return rows

    def reference_logprobs(self, state: TrainState, rollout: Rollout) -> np.ndarray:
        """[B, C] of the answers under the reference."""
        arrays = rollout.tokens, rollout.lengths, rollout.prompt_lengths
        variables = reference_variables(state)
        count, temperature = rollout.logprobs.shape[1], self.objective.temperature
        return np.asarray(
            _completion_logprobs(self.objective.model, variables, *arrays, count=count, temperature=temperature)
        )

    def tell(self, scores: Scores, mask: np.ndarray) -> None:
        """Say once, until it changes, that a step teaches nothing, and why."""
        why = None
        if not self.teaches(scores).any():
            why = (
                f"the answers of every group have the same reward ({scores.rewards[0]:.4g} in the first): such a step "
                "teaches nothing; look at the samples, or grade the reward"
            )
        elif not mask.any():
            why = (
                "every answer was cut and is masked: such a step teaches nothing; allow more new tokens, or do without "
                "the mask"
            )
        if why is not None and not self.silent_before:
            self.say(why)
        self.silent_before = why is not None

    def figures(self, asked: Asked, rollout: Rollout, scores: Scores, mask: np.ndarray) -> dict[str, Any]:
        """What is told of a step's answers, by TRL's names."""
        lengths, terminated = rollout.answer_lengths, rollout.terminated
        self.tell(scores, mask)
        ended = lengths[terminated] if terminated.any() else np.zeros(1)
        figures = {
            "tokens": asked.tokens,
            "reward": scores.rewards.mean(),
            "reward_std": self.spreads(scores.rewards).mean(),
            "frac_reward_zero_std": asked.silent,
            "completions/mean_length": lengths.mean(),
            "completions/min_length": lengths.min(),
            "completions/max_length": lengths.max(),
            "completions/clipped_ratio": 1 - terminated.mean(),
            "completions/mean_terminated_length": ended.mean(),
            "completions/min_terminated_length": ended.min(),
            "completions/max_terminated_length": ended.max(),
        }
        for name, values in scores.by_name.items():
            told = values[~np.isnan(values)]
            if len(told):
                figures[f"rewards/{name}/mean"] = told.mean()
                figures[f"rewards/{name}/std"] = told.std(ddof=1) if len(told) > 1 else 0.0
        return {name: value if name == "tokens" else np.float32(value) for name, value in figures.items()}


def over_updates(updates: Sequence[dict]) -> dict[str, Any]:
    """The metrics of several updates as one: means, and of extremes the extreme."""
    metrics = updates[0]
    for other in updates[1:]:
        metrics = {name: combined(name, value, other[name]) for name, value in metrics.items()}
    return {name: value if name in EXTREMES else np.float32(value / len(updates)) for name, value in metrics.items()}


def with_reference(state: TrainState) -> TrainState:
    """The state whose reference is its policy as it is: a copy of what changes in training, and of nothing else."""
    changes = [name for name in (*state.trainable, ROUTER) if name in state.variables]
    copy = {name: jax.tree.map(jnp.copy, state.variables[name]) for name in changes}
    return state.replace(carried={**(state.carried or {}), REFERENCE: copy})


def reference_variables(state: TrainState) -> dict:
    """The variables of the reference; what does not change it has in common with the policy."""
    return as_read({**state.variables, **state.carried[REFERENCE]})


@partial(jax.jit, static_argnames=("model", "count", "temperature"))
def _completion_logprobs(model, variables, tokens, lengths, prompt_lengths, *, count, temperature):
    rows = tokens, lengths, prompt_lengths
    return completion_logprobs(model, variables, *rows, count, temperature=temperature, entropies=False)[0]


# ---------------------------------------------------------------------------------------------------------------------
# A reward model that keeps learning


@dataclass(eq=False)
class RewardLearner:
    """Line 12: the reward model goes on learning, from the policy's own answers, which a judge ranks, and from a share
    of the pairs that it had learned before (DeepSeekMath, 4.1.4: 10% of historical data)."""

    state: TrainState
    """Of the reward model, as the run begins."""
    update: Callable[[TrainState, dict], tuple[TrainState, dict]]
    """A training step of `objectives.reward.RewardModel`."""
    judge: Callable[[Rollout], Scores]
    """Tells better answers from worse ones: of each group, its best and its worst become a pair."""
    replay: Any
    """`replay[i]`, i >= 0: a batch of old pairs."""
    new_pairs: int
    """P, pairs that a step's answers can make."""
    steps_per_iteration: int
    width: int
    """T of a pair's rows: no prompt with an answer is longer."""
    lengths: Callable[[Rollout], np.ndarray] = lambda rollout: rollout.lengths
    """int32 [B]: tokens that the reward model reads, see `ModelReward.lengths`."""

    def start(self, state: TrainState) -> TrainState:
        shape = (self.steps_per_iteration, self.new_pairs)
        pairs = {
            "tokens": jnp.zeros((*shape, 2, self.width), jnp.int32),
            "lengths": jnp.zeros((*shape, 2), jnp.int32),
            "response_mask": jnp.zeros((*shape, 2, self.width), jnp.float32),
            "mask": jnp.zeros(shape, jnp.float32),
        }
        return state.replace(carried={**(state.carried or {}), REWARD_MODEL: self.state, PAIRS: pairs})

    def step(self, state: TrainState, rollout: Rollout, place: int, last: bool) -> TrainState:
        """Keep the pairs of a step, the iteration's `place`-th; with the `last` one the reward model learns."""
        new = self.pairs(rollout)
        pairs = {name: array.at[place].set(new[name]) for name, array in state.carried[PAIRS].items()}
        learner = state.carried[REWARD_MODEL]
        if last:
            for number in range(self.steps_per_iteration):
                old = self.widened(self.replay[int(learner.step)])
                batch = {name: np.concatenate([array[number], old[name]]) for name, array in pairs.items()}
                if "margins" in old:  # the judge has none to tell
                    batch["margins"] = np.concatenate([np.zeros(self.new_pairs, np.float32), old["margins"]])
                learner, _ = self.update(learner, batch)
        return state.replace(carried={**state.carried, REWARD_MODEL: learner, PAIRS: pairs})

    def pairs(self, rollout: Rollout) -> dict[str, np.ndarray]:
        """The best and the worst answer of each group; under mask 0 where the judge sees no difference."""
        judged = self.judge(rollout).rewards.reshape(-1, rollout.group_size)
        best, worst = judged.argmax(axis=1), judged.argmin(axis=1)
        first = np.arange(len(judged)) * rollout.group_size
        rows = np.stack([first + best, first + worst], axis=1)  # [P, 2]
        lengths = self.lengths(rollout)
        rolled = self.widened({"tokens": rollout.tokens, "response_mask": rollout.response_mask(lengths)})
        different = np.take_along_axis(judged, best[:, None], 1) > np.take_along_axis(judged, worst[:, None], 1)
        return {
            "tokens": rolled["tokens"][rows],
            "lengths": lengths[rows],
            "response_mask": rolled["response_mask"][rows],
            "mask": different[:, 0].astype(np.float32),
        }

    def widened(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """With rows of `width` tokens."""

        def wide(array: np.ndarray) -> np.ndarray:
            missing = max(self.width - array.shape[-1], 0)
            return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)])[..., : self.width]

        return {name: wide(x) if name in ("tokens", "response_mask") else x for name, x in batch.items()}
