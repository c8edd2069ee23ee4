"""Preference pairs in batches: chosen and rejected side by side, pairs of similar length together.

Shapes: B pairs in a batch, 2 sides (chosen, rejected), T tokens of a row, N pairs in all.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from llmq_jax.data.batching import pad
from llmq_jax.data.length_buckets import Batch, BatchesByLength, bucket_width, by_length
from llmq_jax.data.preferences import PreferenceExample
from llmq_jax.data.splits import seeded_order
from llmq_jax.data.windows import rows_of
from llmq_jax.errors import BadInput

Columns = Mapping[str, np.ndarray]
"""{name: array [N, ...]}: further values of each pair, such as its log-probabilities under a reference model."""
OWN_FIELDS = ("tokens", "lengths", "response_mask", "mask", "margins")


@dataclass(frozen=True, eq=False)
class PreferenceBatches(BatchesByLength):
    """Training batches of pairs, which are their rows. `preference_batch` lists the fields."""

    pairs: Sequence[PreferenceExample]
    batch_size: int
    longest: int
    """The greatest width."""
    seed: int = 0
    columns: Columns = field(default_factory=dict)
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        _check(self.pairs, self.batch_size, self.columns)
        rows_of(self.process_index, self.process_count, self.batch_size)

    @property
    def _rows(self) -> Sequence[PreferenceExample]:
        return self.pairs

    @cached_property
    def _columns(self) -> Columns:
        return _with_margins(self.pairs, self.columns)

    def _tokens(self, row: PreferenceExample) -> int:
        return sum(len(side.tokens) for side in row.sides)

    def _batch(self, indices: Sequence[int]) -> Batch:
        return preference_batch(self.pairs, indices, self.batch_size, self.longest, self._columns)


@dataclass(frozen=True, eq=False)
class PreferenceEvaluation:
    """All pairs once, in batches of the same fields as those of `PreferenceBatches`, the shortest pairs first. With
    `batches`, only as many pairs as fill so many batches, drawn from all, the same in every run."""

    pairs: Sequence[PreferenceExample]
    batch_size: int
    longest: int
    batches: int | None = None
    """The greatest number of batches; None: as many as hold all pairs."""
    columns: Columns = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.pairs, self.batch_size, self.columns)
        if self.batches is not None and self.batches < 1:
            raise BadInput(f"batches is {self.batches} and must be at least 1, or None for all")

    @cached_property
    def _plan(self) -> list[list[int]]:
        lengths = [len(self.pairs[index]) for index in self.indices]
        return [[self.indices[place] for place in places] for places in by_length(lengths, self.batch_size)]

    @cached_property
    def indices(self) -> list[int]:
        """Which pairs are evaluated, in order."""
        count = len(self.pairs) if self.batches is None else self.batches * self.batch_size
        return sorted(seeded_order(len(self.pairs), 0)[:count].tolist())

    @cached_property
    def _columns(self) -> Columns:
        return _with_margins(self.pairs, self.columns)

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[Batch]:
        for indices in self._plan:
            yield preference_batch(self.pairs, indices, self.batch_size, self.longest, self._columns)


def preference_batch(
    pairs: Sequence[PreferenceExample], indices: Sequence[int], batch_size: int, longest: int, columns: Columns
) -> Batch:
    """The pairs at these indices; missing ones are filled up with empty pairs of mask 0.

    `tokens` int32 [B, 2, T] are the prompt with the chosen and with the rejected answer, `lengths` int32 [B, 2] tokens
    of each and then padding. `response_mask` float32 [B, 2, T] is 1 where a token belongs to the response (at the token
    itself, not at the one before it, which predicts it), `mask` float32 [B] where a pair counts. `columns` are taken at
    the same indices; the classes above add `margins` float32 [B] if any of all pairs has one, 0 where a pair has none.
    """
    chosen = [pairs[index] for index in indices]
    width = bucket_width(max(map(len, chosen)), longest)
    sides = [side for pair in chosen for side in pair.sides]
    empty = [()] * (2 * (batch_size - len(chosen)))
    tokens, lengths = pad([*(side.tokens for side in sides), *empty], width)
    response_mask, _ = pad([*(side.learned for side in sides), *empty], width)
    batch = {
        "tokens": tokens.reshape(batch_size, 2, width),
        "lengths": lengths.reshape(batch_size, 2),
        "response_mask": response_mask.reshape(batch_size, 2, width).astype(np.float32),
        "mask": (np.arange(batch_size) < len(chosen)).astype(np.float32),
    }
    for name, column in columns.items():
        batch[name] = np.zeros((batch_size, *column.shape[1:]), column.dtype)
        batch[name][: len(chosen)] = column[list(indices)]
    return batch


def _with_margins(pairs: Sequence[PreferenceExample], columns: Columns) -> Columns:
    if all(pair.margin is None for pair in pairs):
        return columns
    return {**columns, "margins": np.array([pair.margin or 0.0 for pair in pairs], np.float32)}


def _check(pairs: Sequence[PreferenceExample], batch_size: int, columns: Columns) -> None:
    if not pairs:
        raise BadInput("there is no preference pair to make batches of; give more data")
    if batch_size < 1:
        raise BadInput(f"batch_size is {batch_size} and must be at least 1")
    for name, column in columns.items():
        if name in OWN_FIELDS:
            raise BadInput(f"a column may not be called {name!r}, which every batch has: give it another name")
        if len(column) != len(pairs):
            raise BadInput(f"column {name!r} has {len(column)} rows for {len(pairs)} pairs: give one for each")
