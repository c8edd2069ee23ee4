"""What a rollout's answers are worth: by functions of texts (`rewards`), by a reward model, or both.

Shapes: as in `training.rollouts`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from llmq_jax.data.prompts import columns_of
from llmq_jax.data.text_stream import TextStream
from llmq_jax.errors import BadInput
from llmq_jax.layers.axes import everywhere
from llmq_jax.models.decoder import Decoder
from llmq_jax.objectives.reward import model_rewards, token_scores
from llmq_jax.rewards import Rewards
from llmq_jax.training.parts import as_read
from llmq_jax.training.rollouts import Rollout


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

    def __call__(self, rollout: Rollout, variables: dict[str, Any] | None = None) -> Scores:
        columns = columns_of(rollout.prompts, rollout.group_size)
        return Scores(*self.rewards(rollout.texts(), rollout.completions, columns))


@dataclass(frozen=True)
class SummedRewards:
    """Functions of texts and a reward model, which has a weight of its own."""

    texts: TextRewards
    model: "ModelReward"
    weight: float

    def __call__(self, rollout: Rollout, variables: dict[str, Any] | None = None) -> Scores:
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

    def __call__(self, rollout: Rollout, variables: dict[str, Any] | None = None) -> Scores:
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
        # An end token that the reward model does not read ends the last step all the same, by what came before it.
        places = np.minimum(places, np.minimum(lengths, tokens.shape[1])[:, None] - 1)
        ends = step_ends(rollout, self.lm.tokenizer, self.separator)
        by_token = np.take_along_axis(np.asarray(by_token), places, axis=1)
        return Scores(rewards, {self.name: rewards}, by_token * ends, ends)

    def lengths(self, rollout: Rollout) -> np.ndarray:
        """int32 [B]: tokens that the reward model reads. An end token that is its padding too is none: see
        `data.without_padding`."""
        pad_token = self.lm.generation.pad_token_id
        last = rollout.tokens[np.arange(len(rollout)), rollout.lengths - 1]
        trimmed = (last == pad_token) & (rollout.answer_lengths > 1) if pad_token is not None else 0
        return (rollout.lengths - trimmed).astype(np.int32)


@partial(jax.jit, static_argnames=("model", "pooling"))
def _model_rewards(
    model: Decoder, variables: dict[str, Any], tokens: Array, lengths: Array, response_mask: Array, *, pooling: str
) -> Any:
    variables = as_read(variables)
    rewards, _ = model_rewards(model, variables, tokens, lengths, response_mask, pooling)
    return everywhere((rewards, token_scores(model, variables, tokens, lengths)[0]))


def step_ends(rollout: Rollout, tokenizer: Any, separator: str) -> np.ndarray:
    """float32 [B, C]: 1 on the token that completes a separator, and on the last token of the answer."""
    ends = np.zeros(rollout.logprobs.shape, np.float32)
    for row, (start, length) in enumerate(zip(rollout.prompt_lengths, rollout.lengths, strict=True)):
        stream, open_end = TextStream(tokenizer, skip_special_tokens=True), ""
        for place, token in enumerate(rollout.tokens[row, start:length].tolist()):
            open_end += stream.push(token)
            if separator in open_end:
                ends[row, place] = 1.0
                open_end = open_end.rpartition(separator)[2]
        ends[row, length - start - 1] = 1.0
    return ends
