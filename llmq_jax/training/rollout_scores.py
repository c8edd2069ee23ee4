"""The rewards of a rollout's answers: by reward functions of texts (`rewards`), by a reward model, or both.

Shapes: as in `training.rollouts`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from llmq_jax.data.length_buckets import bucket_width
from llmq_jax.data.prompts import columns_of
from llmq_jax.data.text_stream import TextStream
from llmq_jax.errors import BadInput
from llmq_jax.layers.axes import replicated
from llmq_jax.models.decoder import Decoder
from llmq_jax.objectives.reward import model_rewards, token_scores
from llmq_jax.rewards import Rewards
from llmq_jax.training import processes
from llmq_jax.training.parts import as_read
from llmq_jax.training.rollouts import Rollout


@dataclass(frozen=True)
class Scores:
    """The rewards of a rollout's answers."""

    rewards: np.ndarray
    """float32 [B]"""
    by_name: Mapping[str, np.ndarray]
    """float32 [B] of each reward function, nan where it gave no reward."""
    steps: np.ndarray | None = None
    """float32 [B, C], for process supervision: the reward of each step of an answer, where the step ends."""
    step_ends: np.ndarray | None = None
    """float32 [B, C]: 1 there."""

    def rows(self, chosen: np.ndarray) -> "Scores":
        """The scores of the chosen answers."""
        steps, ends = (None if x is None else x[chosen] for x in (self.steps, self.step_ends))
        return Scores(self.rewards[chosen], {name: x[chosen] for name, x in self.by_name.items()}, steps, ends)


@dataclass(frozen=True)
class TextRewards:
    """Rewards by reward functions of texts."""

    rewards: Rewards

    def __call__(self, rollout: Rollout, variables: dict[str, Any] | None = None, alone: bool = True) -> Scores:
        """One process calls the functions for all: they may be random, or ask a server, and do so once."""

        def ask() -> tuple[list[float], dict[str, list[float]]]:
            columns = columns_of(rollout.prompts, rollout.group_size)
            total, by_name = self.rewards(rollout.prompt_texts(), rollout.completions, columns, alone=alone)
            return total.tolist(), {name: values.tolist() for name, values in by_name.items()}

        total, by_name = processes.of_first(ask)
        return Scores(np.asarray(total, np.float32), {name: np.asarray(v, np.float32) for name, v in by_name.items()})


def reward_model_of(score: "SummedRewards | ModelReward") -> "ModelReward":
    """The reward model within a scorer that has one."""
    return score if isinstance(score, ModelReward) else score.model


@dataclass(frozen=True)
class SummedRewards:
    """The rewards of functions of texts plus those of a reward model, multiplied by its weight."""

    texts: TextRewards
    model: "ModelReward"
    weight: float

    def __call__(self, rollout: Rollout, variables: dict[str, Any] | None = None) -> Scores:
        texts, model = self.texts(rollout, alone=False), self.model(rollout, variables)
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
    ending: Sequence[int] = ()
    """How a chat template ends an answer, see `data.chat_ending`: the end token, which a policy samples, and what
    followed it in the texts that the reward model learned from."""

    def __call__(self, rollout: Rollout, variables: dict[str, Any] | None = None) -> Scores:
        """`variables` take the place of the model's own: those of a reward model that goes on learning."""
        variables = self.lm.variables if variables is None else variables
        tokens, lengths = self.rows(rollout)
        mask = rollout.response_mask(lengths, tokens.shape[1])
        rewards, by_token = _model_rewards(self.lm.model, variables, tokens, lengths, mask, pooling=self.pooling)
        rewards = np.asarray(rewards)
        if not np.isfinite(rewards).all():
            raise BadInput(f"the reward model gave {rewards[~np.isfinite(rewards)][0]}; train it anew")
        if not self.process:
            return Scores(rewards, {self.name: rewards})
        read = np.minimum(lengths, tokens.shape[1])[:, None]
        places = np.minimum(rollout.prompt_lengths[:, None] + np.arange(rollout.logprobs.shape[1]), read - 1)
        # The last step ends with the answer, whose reward is at the last token that the model reads: before an end
        # token that is padding to it, or after what follows an end token.
        np.put_along_axis(places, rollout.answer_lengths[:, None] - 1, read - 1, axis=1)
        ends = step_ends(rollout, self.lm.tokenizer, self.separator)
        by_token = np.take_along_axis(np.asarray(by_token), places, axis=1)
        return Scores(rewards, {self.name: rewards}, by_token * ends, ends)

    def rows(self, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
        """(int32 [B, T'], int32 [B]): the tokens that the reward model reads of each row, as it learned to, and how
        many. An answer that ends with the chat template's end token also gets the tokens that follow it there. A last
        token that is the model's padding too is not read: see `data.without_padding`."""
        each = np.arange(len(rollout))
        after = self.ending[1:]
        ended = rollout.terminated & (rollout.tokens[each, rollout.lengths - 1] == self.ending[0] if after else False)
        lengths = rollout.lengths + len(after) * ended
        # It may read fewer tokens than the policy, and rows are padded.
        context = self.lm.config.max_position_embeddings
        width = min(max(rollout.tokens.shape[1], bucket_width(int(lengths.max()), context)), context)
        tokens = np.zeros((len(rollout), max(width, lengths.max())), np.int32)
        tokens[:, : rollout.tokens.shape[1]] = rollout.tokens[:, : tokens.shape[1]]
        for row in np.flatnonzero(ended):
            tokens[row, rollout.lengths[row] : lengths[row]] = after
        pad_token = self.lm.generation.pad_token_id
        last = tokens[each, lengths - 1]
        trimmed = (last == pad_token) & (rollout.answer_lengths > 1) if pad_token is not None else 0
        return tokens[:, :width], (lengths - trimmed).astype(np.int32)


@partial(jax.jit, static_argnames=("model", "pooling"))
def _model_rewards(
    model: Decoder, variables: dict[str, Any], tokens: Array, lengths: Array, response_mask: Array, *, pooling: str
) -> Any:
    variables = as_read(variables)
    rewards, _ = model_rewards(model, variables, tokens, lengths, response_mask, pooling)
    return replicated((rewards, token_scores(model, variables, tokens, lengths)[0]))


def step_ends(rollout: Rollout, tokenizer: Any, separator: str) -> np.ndarray:
    """float32 [B, C]: 1 on the token that completes a separator, and on the last token of the answer."""
    ends = np.zeros(rollout.logprobs.shape, np.float32)
    for row, (start, length) in enumerate(zip(rollout.prompt_lengths, rollout.lengths, strict=True)):
        stream, open_end, ended = TextStream(tokenizer, skip_special_tokens=True), "", 0
        for place, token in enumerate(rollout.tokens[row, start:length].tolist()):
            open_end += stream.push(token)
            found = (open_end + stream.held()).count(separator)
            if found > ended:
                ends[row, place] = 1.0
            ended = found
            if separator in open_end:  # from here on it cannot be taken back
                ended -= open_end.count(separator)
                open_end = open_end.rpartition(separator)[2]
        ends[row, length - start - 1] = 1.0
    return ends
