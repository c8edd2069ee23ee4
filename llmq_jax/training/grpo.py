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

The lines are in `Loop.step`, one call of which is one step of line 4: a run is I·M calls. What a later step needs of an
earlier one (the reference, the reward model, the pairs that it will learn from) is in the state, so that a run resumes
anywhere. All computation is compiled, once for each of the few lengths to which rows are padded.

Shapes: P prompts in a step, G answers each, B = P·G rows, T tokens of a row, C tokens of an answer.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from llmq_jax.data.prompts import Prompt, step_seeds
from llmq_jax.data.splits import seeded_order
from llmq_jax.errors import BadInput
from llmq_jax.generation import Sampler
from llmq_jax.host_copies import to_host
from llmq_jax.layers.axes import replicated
from llmq_jax.models.decoder import Decoder
from llmq_jax.objectives.advantages import group_advantages, process_advantages
from llmq_jax.objectives.grpo import GRPO
from llmq_jax.objectives.logprobs import completion_logprobs
from llmq_jax.objectives.means import EXTREMES, combined
from llmq_jax.training.parts import as_read, whole
from llmq_jax.training.reward_learner import REWARD_MODEL, RewardLearner
from llmq_jax.training.rollout_scores import Scores
from llmq_jax.training.rollouts import OF_ROWS, Rollout, roll_out
from llmq_jax.training.sharding import own_rows
from llmq_jax.training.state import TrainState

REFERENCE = "reference"
"""The entry of `TrainState.carried` with the reference's variables."""
ROUNDS = 3
"""Rounds of sampling in a step with `dynamic_sampling`, of which ROUNDS - 1 replace prompts."""
REPLACEMENTS = 1
"""The last word of the entropy of prompts that replace others. Without it, the order in step s and round 0 is that of
epoch s: zeros at the end do not count."""


@dataclass
class SamplingCost:
    """What it took to get a step's answers."""

    seconds: float
    tokens: int = 0
    """Tokens of all rows that were sampled, prompts and replaced rows included."""
    silent: float = 0.0
    """The fraction of the first round's groups whose advantages are all 0."""


@dataclass(eq=False)
class Loop:
    """See the top of the file; the engine calls `step`."""

    lm: Any
    """The model that answers: config, tokenizer and end tokens. Its variables are taken from the state."""
    objective: GRPO
    """It holds the model that learns."""
    update: Callable[[TrainState, dict[str, Any]], tuple[TrainState, dict[str, Any]]]
    """A training step of the objective."""
    prompts: Sequence[Prompt]
    score: Callable[..., Scores]
    """Functions of texts, a `ModelReward`, or both: see `training.rollout_scores`."""
    group_size: int
    max_new_tokens: int
    sampler: Sampler
    scale: str = "group"
    """What advantages are divided by: the standard deviation of the "group", of the "batch", or nothing ("none")."""
    iterations: int = 1
    """mu, the number of updates on the same answers."""
    steps_per_iteration: int = 1
    """M, the number of steps from one new reference, or update of the reward model, to the next."""
    reference: Literal["iteration", "start", "old"] = "iteration"
    """The reference is the policy at the start of each iteration, that of the run's start, or the old policy."""
    mask_truncated: bool = False
    """Whether answers that were cut are left out of the loss (DAPO, overlong filtering)."""
    dynamic_sampling: bool = False
    """Whether groups without any advantage are replaced by groups of other prompts (DAPO)."""
    seed: int = 0
    reward_learner: RewardLearner | None = None
    """Trains the reward model further (line 12)."""
    say: Callable[[str], None] = print
    has_warned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise BadInput(f"group_size={self.group_size}: an answer alone has no others to be better than; choose 2")

    def step(self, state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        """One step of Algorithm 1, on the prompts that `batch` (of PromptBatches) names: (state, metrics)."""
        number = int(batch["step"])
        begin = time.monotonic()
        first_of_iteration = number % self.steps_per_iteration == 0
        if self.keeps_reference and self.reference == "iteration" and first_of_iteration:
            state = with_reference(state)  # line 3
        rollout, scores, cost = self.answered(state, batch)  # lines 5 to 8
        advantages = self.advantages(scores)  # line 9
        rows = self.rows(state, rollout, advantages)
        scored = time.monotonic()
        updates = []
        for _ in range(self.iterations):  # lines 10 and 11
            state, metrics = self.update(state, own_rows(rows))
            updates.append(metrics)
        metrics = over_updates(to_host(updates))
        learned = time.monotonic()
        if self.reward_learner is not None:  # line 12
            last = (number + 1) % self.steps_per_iteration == 0
            state, figures = self.reward_learner.step(state, rollout, number % self.steps_per_iteration, last)
            metrics |= {**figures, "reward_model_seconds": np.float32(time.monotonic() - learned)}
        self.warn_once(scores, rows["completion_mask"])
        metrics |= self.answer_metrics(cost, rollout, scores)
        seconds = {"rollout": cost.seconds, "scoring": scored - begin - cost.seconds, "update": learned - scored}
        return state, metrics | {f"{part}_seconds": np.float32(taken) for part, taken in seconds.items()}

    @property
    def keeps_reference(self) -> bool:
        """Whether the state carries a reference."""
        return self.objective.beta > 0 and self.reference != "old"

    def start(self, state: TrainState) -> TrainState:
        """A fresh state with the reference and the reward model that the steps need in it."""
        if self.keeps_reference:
            state = with_reference(state)
        return state if self.reward_learner is None else self.reward_learner.start(state)

    def policy(self, variables: dict[str, Any]) -> Any:
        """The model that answers, with the variables of a state."""
        return self.lm.replace(variables=whole(variables))

    def answered(self, state: TrainState, batch: dict[str, Any]) -> tuple[Rollout, Scores, SamplingCost]:
        """(answers of the current policy, their rewards, what sampling them took)."""
        step, prompts = int(batch["step"]), [int(index) for index in batch["prompts"]]
        begin = time.monotonic()
        policy = self.policy(state.variables)
        cost = SamplingCost(time.monotonic() - begin)

        def ask(prompts: list[int], attempt: int) -> tuple[Rollout, Scores]:
            begin = time.monotonic()
            seeds = step_seeds(self.seed, step, len(prompts) * self.group_size, attempt)
            rollout = self.sample(policy, [self.prompts[index] for index in prompts], seeds)
            cost.seconds += time.monotonic() - begin
            cost.tokens += int(rollout.lengths.sum())
            return rollout, self.scored(state, rollout)

        rollout, scores = ask(prompts, 0)
        teaches = self.teaches(scores)
        cost.silent = float(1 - teaches.mean())
        if self.dynamic_sampling and not teaches.all():
            rollout, scores = self.with_replacements(ask, step, prompts, (rollout, scores))
        return rollout, scores, cost

    def with_replacements(
        self,
        ask: Callable[[list[int], int], tuple[Rollout, Scores]],
        step: int,
        prompts: list[int],
        first: tuple[Rollout, Scores],
    ) -> tuple[Rollout, Scores]:
        """As many groups as there are prompts, all of which teach: those of the first round, (answers, rewards), that
        do, and others to other prompts. If too few are found in all rounds, groups that teach nothing fill the batch
        up to its shape."""
        (rollout, scores), count = first, len(prompts)
        kept, missing, asked = [], count, set(prompts)
        for attempt in range(ROUNDS):
            if attempt:
                prompts = self.other_prompts(step, attempt - 1, count, asked)
                asked |= set(prompts)
                rollout, scores = ask(prompts, attempt)
            teaches = self.teaches(scores)
            useful, silent = np.flatnonzero(teaches)[:missing].tolist(), np.flatnonzero(~teaches).tolist()
            if useful:
                kept.append(_part(rollout, scores, useful))
                missing -= len(useful)
            if not missing:
                break
        if missing:  # so that some of the last round teach nothing
            kept.append(_part(rollout, scores, [silent[index % len(silent)] for index in range(missing)]))
        return _joined(kept)

    def other_prompts(self, step: int, attempt: int, count: int, asked: set[int]) -> list[int]:
        """Indices of prompts that this step has not asked yet, followed, if these are too few, by some that it has."""
        order = seeded_order(len(self.prompts), [self.seed, step, attempt, REPLACEMENTS]).tolist()
        order = [index for index in order if index not in asked] + [index for index in order if index in asked]
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
        spreads: np.ndarray = np.where(np.ptp(groups, axis=1) == 0, 0.0, groups.std(axis=1, ddof=1))
        return spreads

    def teaches(self, scores: Scores) -> np.ndarray:
        """bool [P]: whether any answer of a group has an advantage."""
        of_groups = (self.advantages(scores) != 0).reshape(len(scores.rewards) // self.group_size, -1)
        teaches: np.ndarray = of_groups.any(axis=1)
        return teaches

    def advantages(self, scores: Scores) -> np.ndarray:
        """[B], from the answers' rewards; or [B, C], if steps of answers are rewarded."""
        if scores.steps is None:
            return np.asarray(group_advantages(jnp.asarray(scores.rewards), self.group_size, scale=self.scale))
        steps, ends = jnp.asarray(scores.steps), jnp.asarray(scores.step_ends)
        return np.asarray(process_advantages(steps, ends, self.group_size, scale=self.scale))

    def rows(self, state: TrainState, rollout: Rollout, advantages: np.ndarray) -> dict[str, np.ndarray]:
        """The batch that the objective takes (see `GRPO`)."""
        mask = rollout.answer_mask
        if self.mask_truncated:
            mask = mask * rollout.terminated[:, None]
        old_logprobs = self.old_logprobs(state, rollout)
        rows = {
            "tokens": rollout.tokens,
            "lengths": rollout.lengths,
            "prompt_lengths": rollout.prompt_lengths,
            "completion_mask": mask,
            "old_logprobs": old_logprobs,
            "advantages": advantages,
        }
        if self.objective.group_size > 1:
            rows["prompts"] = rollout.prompt_rows()
        if self.objective.beta > 0:
            rows["reference_logprobs"] = (
                old_logprobs if self.reference == "old" else self.reference_logprobs(state, rollout)
            )
        return rows

    def old_logprobs(self, state: TrainState, rollout: Rollout) -> np.ndarray:
        """[B, C]: log-probabilities of the answers' tokens under the policy that drew them, as they were drawn. Where
        several updates are bounded, and 16 bits or TF32 round otherwise in drawing than in learning, they are those of
        learning: else the ratio would leave narrow bounds before the policy moves."""
        if self.iterations == 1:
            return rollout.logprobs
        variables = as_read(state.variables)
        rounds_alike = self.objective.model.computes_in_float32(variables)
        return rollout.logprobs if rounds_alike else self.logprobs(variables, rollout)

    def reference_logprobs(self, state: TrainState, rollout: Rollout) -> np.ndarray:
        """[B, C]: log-probabilities of the answers' tokens under the reference."""
        return self.logprobs(reference_variables(state), rollout)

    def logprobs(self, variables: dict[str, Any], rollout: Rollout) -> np.ndarray:
        """[B, C]: log-probabilities of the answers' tokens, computed as the policy learns."""
        objective = self.objective
        logprobs = _completion_logprobs(
            objective.model,
            variables,
            rollout.tokens,
            rollout.lengths,
            rollout.prompt_lengths,
            rollout.prompt_rows() if objective.group_size > 1 else None,
            count=rollout.logprobs.shape[1],
            temperature=objective.temperature,
            group_size=objective.group_size,
        )
        on_host: np.ndarray = to_host(logprobs)
        return on_host

    def warn_once(self, scores: Scores, mask: np.ndarray) -> None:
        """Report the first step that teaches nothing, and why; the metric `frac_reward_zero_std` shows later ones."""
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
        if why is not None and not self.has_warned:
            self.say(why)
            self.has_warned = True

    def answer_metrics(self, cost: SamplingCost, rollout: Rollout, scores: Scores) -> dict[str, Any]:
        """The metrics of a step's answers, by TRL's names."""
        lengths, terminated = rollout.answer_lengths, rollout.terminated
        ended = lengths[terminated] if terminated.any() else np.zeros(1)
        figures = {
            "tokens": cost.tokens,
            "reward": scores.rewards.mean(),
            "reward_std": self.spreads(scores.rewards).mean(),
            "frac_reward_zero_std": cost.silent,
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


def over_updates(updates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The metrics of several updates as one: their means; of EXTREMES, the extreme."""
    metrics = updates[0]
    for other in updates[1:]:
        metrics = {name: combined(name, value, other[name]) for name, value in metrics.items()}
    return {name: value if name in EXTREMES else np.float32(value / len(updates)) for name, value in metrics.items()}


def with_reference(state: TrainState) -> TrainState:
    """The state with its current policy as reference: only what changes in training is copied."""
    copy = {name: jax.tree.map(jnp.copy, state.variables[name]) for name in state.changing}
    return state.replace(carried={**(state.carried or {}), REFERENCE: copy})


def reference_variables(state: TrainState) -> dict[str, Any]:
    """The variables of the reference; those that do not change in training are shared with the policy."""
    return as_read({**state.variables, **state.carried[REFERENCE]})


@partial(jax.jit, static_argnames=("model", "count", "temperature", "group_size"))
def _completion_logprobs(
    model: Decoder,
    variables: dict[str, Any],
    tokens: Array,
    lengths: Array,
    prompt_lengths: Array,
    prompts: Array | None,
    *,
    count: int,
    **options: Any,
) -> Any:
    options |= {"prompts": prompts, "entropies": False}
    return replicated(completion_logprobs(model, variables, tokens, lengths, prompt_lengths, count, **options)[0])


def _part(rollout: Rollout, scores: Scores, groups: list[int]) -> tuple[Rollout, Scores]:
    return rollout.groups(groups), scores.rows(rollout.rows_of(groups))


def _joined(parts: Sequence[tuple[Rollout, Scores]]) -> tuple[Rollout, Scores]:
    """The groups of several rollouts as one."""
    rollouts, scores = zip(*parts, strict=True)
    width = max(rollout.tokens.shape[1] for rollout in rollouts)

    def together(arrays: Sequence[Any]) -> Any:
        return None if arrays[0] is None else np.concatenate(arrays)

    rollout = Rollout(
        prompts=[prompt for rollout in rollouts for prompt in rollout.prompts],
        group_size=rollouts[0].group_size,
        tokens=np.concatenate([np.pad(x.tokens, ((0, 0), (0, width - x.tokens.shape[1]))) for x in rollouts]),
        completions=[text for rollout in rollouts for text in rollout.completions],
        **{name: together([getattr(rollout, name) for rollout in rollouts]) for name in OF_ROWS},
    )
    by_name = {name: together([each.by_name[name] for each in scores]) for name in scores[0].by_name}
    rewards, steps, ends = (together([getattr(x, name) for x in scores]) for name in ("rewards", "steps", "step_ends"))
    return rollout, Scores(rewards, by_name, steps, ends)
