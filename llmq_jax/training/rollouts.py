"""Rollouts: answers sampled from a policy, as rows of tokens.

Shapes: P prompts, G answers each, B = P·G rows, T tokens of a row, C tokens of an answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmq_jax.data.batching import pad
from llmq_jax.data.length_buckets import bucket_width
from llmq_jax.data.prompts import Prompt
from llmq_jax.generation import Sampler, generate

OF_ROWS = ("lengths", "prompt_lengths", "logprobs", "answer_mask", "terminated")
"""The arrays of a `Rollout` beside its tokens, of one width in all rollouts of a run."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """Answers sampled from a policy: `group_size` neighbouring rows answer the same prompt."""

    prompts: list[Prompt]
    group_size: int
    tokens: np.ndarray
    """int32 [B, T]: prompt and answer, padded on the right."""
    lengths: np.ndarray
    """int32 [B]"""
    prompt_lengths: np.ndarray
    """int32 [B]"""
    logprobs: np.ndarray
    """float32 [B, C]: log-probabilities of the answers' tokens, at the temperature of sampling."""
    answer_mask: np.ndarray
    """float32 [B, C]: 1 on the answers' tokens, the end token included."""
    terminated: np.ndarray
    """bool [B]: whether the answer ended with an end token, and was not cut at the longest length."""
    completions: list[str]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def answer_lengths(self) -> np.ndarray:
        lengths: np.ndarray = self.lengths - self.prompt_lengths
        return lengths

    def prompt_texts(self) -> list[str]:
        """The prompt of each row."""
        return [prompt.text for prompt in self.prompts for _ in range(self.group_size)]

    def response_mask(self, lengths: np.ndarray, width: int) -> np.ndarray:
        """float32 [B, width]: 1 on the answers' tokens, if rows have these `lengths`."""
        places = np.arange(width)
        inside = (places >= self.prompt_lengths[:, None]) & (places < lengths[:, None])
        return inside.astype(np.float32)

    def prompt_rows(self) -> np.ndarray:
        """int32 [B, W]: the beginning of each row, which holds its prompt; W is one of a few widths."""
        return self.tokens[:, : bucket_width(int(self.prompt_lengths.max()), self.tokens.shape[1])]

    def rows_of(self, groups: Sequence[int]) -> np.ndarray:
        """The rows of these groups."""
        return np.concatenate([np.arange(g * self.group_size, (g + 1) * self.group_size) for g in groups])

    def groups(self, chosen: Sequence[int]) -> "Rollout":
        """These groups alone."""
        rows = self.rows_of(chosen)
        arrays = {name: getattr(self, name)[rows] for name in ("tokens", *OF_ROWS)}
        completions = [self.completions[row] for row in rows]
        return Rollout([self.prompts[g] for g in chosen], self.group_size, completions=completions, **arrays)


def roll_out(
    lm: Any, prompts: Sequence[Prompt], *, group_size: int, max_new_tokens: int, sampler: Sampler, seeds: Sequence[int]
) -> Rollout:
    """`group_size` answers of a model to each prompt, of at most `max_new_tokens` tokens; row r has `seeds[r]`."""
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
    # Padded to one of a few widths, because all programs that read the rows are compiled for each width.
    tokens, lengths = pad(rows, bucket_width(max(map(len, rows)), lm.config.max_position_embeddings))
    ends = set(lm.generation.eos_token_id)
    assert drawn.text is not None
    return Rollout(
        prompts=list(prompts),
        group_size=group_size,
        tokens=tokens,
        lengths=lengths,
        prompt_lengths=np.array([len(prompt) for prompt in asked], np.int32),
        logprobs=drawn.logprobs,
        answer_mask=(np.arange(max_new_tokens) < drawn.lengths[:, None]).astype(np.float32),
        terminated=np.array([answer[-1] in ends for answer in answers]),
        completions=drawn.text,
    )
