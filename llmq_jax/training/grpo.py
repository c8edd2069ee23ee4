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
from llmq_jax.data.prompts import Prompt, PromptBatches, columns_of, row_seeds
from llmq_jax.data.text_stream import TextStream
from llmq_jax.errors import BadInput
from llmq_jax.generation import Sampler, generate
from llmq_jax.objectives.grpo import GRPO, group_advantages, process_advantages
from llmq_jax.objectives.logprobs import completion_logprobs
from llmq_jax.objectives.reward import model_rewards, token_scores
from llmq_jax.rewards import Rewards
from llmq_jax.training.parts import as_read, whole
from llmq_jax.training.state import TrainState

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

    def groups(self, chosen: Sequence[int]) -> "Rollout":
        """These groups alone."""
        rows = np.concatenate([np.arange(g * self.group_size, (g + 1) * self.group_size) for g in chosen])
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


def joined(rollouts: Sequence[Rollout]) -> Rollout:
    """The groups of several rollouts as one."""
    width = max(rollout.tokens.shape[1] for rollout in rollouts)
    arrays = {
        name: np.concatenate([getattr(rollout, name) for rollout in rollouts])
        for name in ("lengths", "prompt_lengths", "logprobs", "answer_mask", "terminated")
    }
    tokens = [np.pad(rollout.tokens, ((0, 0), (0, width - rollout.tokens.shape[1]))) for rollout in rollouts]
    return Rollout(
        [prompt for rollout in rollouts for prompt in rollout.prompts],
        rollouts[0].group_size,
        tokens=np.concatenate(tokens),
        completions=[text for rollout in rollouts for text in rollout.completions],
        **arrays,
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
        stream, text, found = TextStream(tokenizer, skip_special_tokens=True), "", 0
        for place, token in enumerate(rollout.tokens[row, start:length].tolist()):
            text += stream.push(token)
            if text.count(separator) > found:
                found, ends[row, place] = text.count(separator), 1.0
        ends[row, length - start - 1] = 1.0
    return ends


# ---------------------------------------------------------------------------------------------------------------------
# The loop


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
        rollout, scores, seconds = self.answered(state, batch)  # lines 5 to 8
        advantages = self.advantages(scores)  # line 9
        rows = self.rows(state, rollout, advantages)
        scored = time.monotonic()
        updates = []
        for _ in range(self.iterations):  # lines 10 and 11
            state, metrics = self.update(state, rows)
            updates.append(metrics)
        if self.reward_learner is not None:  # line 12
            last = (number + 1) % self.steps_per_iteration == 0
            state = self.reward_learner.step(state, rollout, number % self.steps_per_iteration, last)
        metrics = {name: np.mean([jax.device_get(each[name]) for each in updates], axis=0) for name in updates[0]}
        metrics |= self.figures(rollout, scores)
        metrics |= {"rollout_seconds": np.float32(seconds)}
        metrics |= {"scoring_seconds": np.float32(scored - begin - seconds)}
        metrics |= {"update_seconds": np.float32(time.monotonic() - scored)}
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

    def answered(self, state: TrainState, batch: dict) -> tuple[Rollout, Scores, float]:
        """(answers of the policy as it is, what they are worth, seconds that answering took)."""
        number, count = int(batch["step"]), len(batch["prompts"])
        policy, seconds = self.policy(state.variables), 0.0
        kept: list[Rollout] = []
        needed, places = count, batch["prompts"]
        for attempt in range(ROUNDS if self.dynamic_sampling else 1):
            begin = time.monotonic()
            seeds = row_seeds(self.seed, number, count * self.group_size, attempt)
            rollout = self.sample(policy, [self.prompts[place] for place in places], seeds)
            seconds += time.monotonic() - begin
            scores = self.scored(state, rollout)
            spread = np.flatnonzero(self.spreads(scores.rewards) > 0).tolist()
            if attempt == 0 and len(spread) == count:
                return rollout, scores, seconds
            if spread:
                kept.append(rollout.groups(spread[:needed]))
                needed -= len(spread[:needed])
            if not needed:
                break
            others = PromptBatches(len(self.prompts), count, row_seeds(self.seed, number, 1, attempt + ROUNDS)[0])
            places = others[0]["prompts"]
        if not self.dynamic_sampling:
            return rollout, scores, seconds
        if needed:  # No others were found: those without spread teach nothing, and keep the shape.
            spare = [group for group in range(count) if group not in spread]
            kept.append(rollout.groups((spare or list(range(count)))[:needed]))
        rollout = joined(kept)
        return rollout, self.scored(state, rollout), seconds

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

    def figures(self, rollout: Rollout, scores: Scores) -> dict[str, Any]:
        """What is told of a step's answers, by TRL's names."""
        spreads = self.spreads(scores.rewards)
        lengths, terminated = rollout.answer_lengths, rollout.terminated
        silent = not np.any(spreads > 0)
        if silent and not self.silent_before and scores.steps is None:
            self.say(
                f"the answers of every group have the same reward ({scores.rewards[0]:.4g} in the first): such a step "
                "teaches nothing; look at the samples, or grade the reward"
            )
        self.silent_before = silent
        ended = lengths[terminated] if terminated.any() else np.zeros(1)
        figures = {
            "tokens": int(rollout.lengths.sum()),
            "reward": scores.rewards.mean(),
            "reward_std": spreads.mean(),
            "frac_reward_zero_std": (spreads == 0).mean(),
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


def with_reference(state: TrainState) -> TrainState:
    """The state whose reference is its policy as it is: a copy of what trains, and of nothing else."""
    copy = {name: jax.tree.map(jnp.copy, state.variables[name]) for name in state.trainable}
    return state.replace(carried={**(state.carried or {}), REFERENCE: copy})


def reference_variables(state: TrainState) -> dict:
    """The variables of the reference; what does not train it has in common with the policy."""
    return as_read({**state.variables, **state.carried[REFERENCE]})


@partial(jax.jit, static_argnames=("model", "count", "temperature"))
def _completion_logprobs(model, variables, tokens, lengths, prompt_lengths, *, count, temperature):
    return completion_logprobs(model, variables, tokens, lengths, prompt_lengths, count, temperature=temperature)[0]


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
                if batch["mask"].sum():
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
