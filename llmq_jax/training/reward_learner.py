"""A reward model that keeps learning while a policy learns from it (DeepSeekMath, arXiv:2402.03300, section 4.1.4)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmq_jax.host_copies import to_host
from llmq_jax.training.failures import NonFiniteLoss, all_finite
from llmq_jax.training.rollout_scores import Scores
from llmq_jax.training.rollouts import Rollout
from llmq_jax.training.state import TrainState, bound_alike

REWARD_MODEL, PAIRS = "reward_model", "pairs"
"""Names of what a training state carries."""
METRICS = ("loss", "accuracy", "grad_norm")
"""Metrics of the reward model's updates, shown as reward_model/loss and so on."""


@dataclass(eq=False)
class RewardLearner:
    """Line 12 of DeepSeekMath's Algorithm 1 (see training/grpo.py): the reward model goes on learning, from the
    policy's own answers, which a judge ranks, and from a share of the pairs that it had learned before (section 4.1.4:
    10% of historical data)."""

    state: TrainState
    """Training state of the reward model, as the run begins."""
    update: Callable[[TrainState, dict[str, Any]], tuple[TrainState, dict[str, Any]]]
    """A training step of `objectives.reward.RewardModel`."""
    judge: Callable[[Rollout], Scores]
    """Scores answers: the best and the worst of each group become a pair."""
    replay: Any
    """`replay[i]`, i >= 0: a batch of old pairs."""
    new_pairs: int
    """P, pairs that a step's answers can make."""
    steps_per_iteration: int
    width: int
    """T, tokens in a row of a pair: nothing that the reward model reads is longer."""
    rows: Callable[[Rollout], tuple[np.ndarray, np.ndarray]]
    """(tokens, lengths) that the reward model reads: `ModelReward.rows`."""

    def start(self, state: TrainState) -> TrainState:
        shape = (self.steps_per_iteration, self.new_pairs)
        pairs = {
            "tokens": jnp.zeros((*shape, 2, self.width), jnp.int32),
            "lengths": jnp.zeros((*shape, 2), jnp.int32),
            "response_mask": jnp.zeros((*shape, 2, self.width), jnp.float32),
            "mask": jnp.zeros(shape, jnp.float32),
        }
        carried = {**(state.carried or {}), REWARD_MODEL: self.state, PAIRS: pairs}
        started: TrainState = bound_alike(state.replace(carried=carried))
        return started

    def step(
        self, state: TrainState, rollout: Rollout, place: int, last: bool
    ) -> tuple[TrainState, dict[str, np.float32]]:
        """Keep the pairs of a step, the iteration's `place`-th; with the `last` one the reward model learns: (state,
        the means of METRICS over its updates, if it made any). NonFiniteLoss where it breaks down."""
        new = self.pairs(rollout)
        pairs = {name: array.at[place].set(new[name]) for name, array in state.carried[PAIRS].items()}
        learner, updates = state.carried[REWARD_MODEL], []
        if last:
            for number in range(self.steps_per_iteration):
                old = self.widened(self.replay[int(learner.step)])
                batch = {name: np.concatenate([array[number], old[name]]) for name, array in pairs.items()}
                if "margins" in old:  # the judge gives none
                    batch["margins"] = np.concatenate([np.zeros(self.new_pairs, np.float32), old["margins"]])
                learner, metrics = self.update(learner, batch)
                updates.append({name: metrics[name] for name in METRICS})
            if not all_finite(learner.variables):
                raise NonFiniteLoss(
                    f"the reward model, which goes on learning, has weights that are not finite after its update "
                    f"{int(learner.step)}; lower --reward-learning-rate"
                )
        means = jax.tree.map(lambda *values: np.float32(np.mean(values)), *to_host(updates)) if updates else {}
        figures = {f"{REWARD_MODEL}/{name}": value for name, value in means.items()}
        return state.replace(carried={**state.carried, REWARD_MODEL: learner, PAIRS: pairs}), figures

    def pairs(self, rollout: Rollout) -> dict[str, np.ndarray]:
        """The best and the worst answer of each group as a pair, with mask 0 where the judge sees no difference."""
        judged = self.judge(rollout).rewards.reshape(-1, rollout.group_size)
        best, worst = judged.argmax(axis=1), judged.argmin(axis=1)
        first = np.arange(len(judged)) * rollout.group_size
        rows = np.stack([first + best, first + worst], axis=1)  # [P, 2]
        tokens, lengths = self.rows(rollout)
        rolled = self.widened({"tokens": tokens, "response_mask": rollout.response_mask(lengths, tokens.shape[1])})
        different = np.take_along_axis(judged, best[:, None], 1) > np.take_along_axis(judged, worst[:, None], 1)
        return {
            "tokens": rolled["tokens"][rows],
            "lengths": lengths[rows],
            "response_mask": rolled["response_mask"][rows],
            "mask": different[:, 0].astype(np.float32),
        }

    def widened(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch with rows padded or cut to `width` tokens."""

        def wide(array: np.ndarray) -> np.ndarray:
            missing = max(self.width - array.shape[-1], 0)
            return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)])[..., : self.width]

        return {name: wide(x) if name in ("tokens", "response_mask") else x for name, x in batch.items()}
