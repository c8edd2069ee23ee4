"""Texts of unequal length in batches of few shapes: rows of similar length share a batch, widths are rounded up.

Padding is computed for nothing, and every new width is compiled anew. Rows of similar length in one batch, at widths
32, 64, 96, 128, 192, 256, 384, ..., keep both costs small.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np

from llmq_jax.data.batching import pad
from llmq_jax.data.splits import seeded_order
from llmq_jax.data.windows import rows_of
from llmq_jax.errors import BadInput

SHORTEST = 32
# How many batches are sorted by length together: more need less padding, but mix lengths within a batch less.
POOL = 32

Batch = dict[str, np.ndarray]


def power_of_two(number: int) -> int:
    """The least power of two that is not below the number, which is at least 1."""
    return 1 << (number - 1).bit_length()


def bucket_width(length: int, longest: int) -> int:
    """The width that a row of this length is padded to: the next of 32, 64, 96, 128, 192, 256, 384, ... (powers of two
    and, above 64, one and a half times these), at most `longest`."""
    power = max(SHORTEST, power_of_two(max(length, 1)))
    between = power * 3 // 4
    return min(between if between >= length and between > 2 * SHORTEST else power, longest)


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """The indices of rows in batches, the shortest rows first: for passes whose order does not matter."""
    order = np.argsort(np.asarray(lengths), kind="stable").tolist()
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def padded_rows(rows: Sequence[Sequence[int]], indices: Sequence[int], batch_size: int, longest: int) -> Batch:
    """`tokens` [batch_size, width], `lengths` and `mask` [batch_size] of the rows at these indices. Missing rows are
    filled up with rows of length 0 and mask 0."""
    chosen = [rows[index] for index in indices]
    width = bucket_width(max(map(len, chosen)), longest)
    tokens, lengths = pad([*chosen, *[()] * (batch_size - len(chosen))], width)
    return {"tokens": tokens, "lengths": lengths, "mask": (np.arange(batch_size) < len(chosen)).astype(np.float32)}


def shuffled_by_length(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The indices of rows in the batches of an epoch: all rows are shuffled, then sorted by length within stretches of
    POOL batches; then all batches are shuffled."""
    order = seeded_order(len(lengths), [seed, epoch, 0]).tolist()
    size = POOL * batch_size
    batches = []
    for start in range(0, len(order), size):
        stretch = order[start : start + size]
        sorted_places = by_length([lengths[index] for index in stretch], batch_size)
        batches += [[stretch[place] for place in places] for places in sorted_places]
    return [batches[place] for place in seeded_order(len(batches), [seed, epoch, 1])]


class BatchesByLength(ABC):
    """`batches[i]` is training batch i, from 0: a pure function of (rows, batch_size, seed, i). Each epoch has every
    row once, in an order of its own. Each of several processes gets its share of the rows, at the width of the whole
    batch."""

    batch_size: int
    """Rows over all processes."""
    seed: int
    process_index: int
    process_count: int

    @property
    @abstractmethod
    def _rows(self) -> Sequence[Any]:
        """What batches are made of: those of similar `len` share one."""

    @abstractmethod
    def _batch(self, indices: Sequence[int]) -> Batch:
        """The rows at these indices, filled up to `batch_size`."""

    def _tokens(self, row: Any) -> int:
        """Tokens of one of `_rows`."""
        return len(row)

    @cached_property
    def _epoch(self) -> Callable[[int], list[list[int]]]:
        """The indices of the rows in each batch of an epoch; those of the epoch asked for last are kept."""
        lengths = [len(row) for row in self._rows]
        return lru_cache(maxsize=1)(partial(shuffled_by_length, lengths, self.batch_size, self.seed))

    def _indices(self, index: int) -> list[int]:
        epoch, place = divmod(index, self.per_epoch)
        return self._epoch(epoch)[place]

    def rows_within(self, count: int) -> list[int]:
        """The numbers of the rows that the first `count` batches hold, in order: from an epoch on, all."""
        return sorted({row for index in range(min(count, self.per_epoch)) for row in self._indices(index)})

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return -(-len(self._rows) // self.batch_size)

    def count_tokens(self, index: int) -> int:
        """Tokens of batch `index`, without padding, over all processes."""
        return sum(self._tokens(self._rows[row]) for row in self._indices(index))

    def __getitem__(self, index: int) -> Batch:
        batch = self._batch(self._indices(index))
        share = rows_of(self.process_index, self.process_count, self.batch_size)
        return {name: array[share.start : share.stop] for name, array in batch.items()}


@dataclass(frozen=True, eq=False)
class LabelledBatches(BatchesByLength):
    """Training batches of labelled texts: `tokens` [B, T], `lengths`, `labels` and `mask` [B]."""

    rows: Sequence[Sequence[int]]
    """Token ids of each text."""
    labels: Sequence[int]
    """The number of each text's class."""
    batch_size: int
    longest: int
    """The greatest width."""
    seed: int = 0
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        if not self.rows:
            raise BadInput("there is no text to train on; give more data")
        if self.batch_size < 1:
            raise BadInput(f"batch_size is {self.batch_size} and must be at least 1")
        rows_of(self.process_index, self.process_count, self.batch_size)

    @property
    def _rows(self) -> Sequence[Sequence[int]]:
        return self.rows

    def _batch(self, indices: Sequence[int]) -> Batch:
        return labelled_batch(self.rows, self.labels, indices, self.batch_size, self.longest)


@dataclass(frozen=True, eq=False)
class LabelledEvaluation:
    """All rows once, in batches of the same fields as those of `LabelledBatches`."""

    rows: Sequence[Sequence[int]]
    labels: Sequence[int]
    batch_size: int
    longest: int

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for indices in by_length([len(row) for row in self.rows], self.batch_size):
            yield labelled_batch(self.rows, self.labels, indices, self.batch_size, self.longest)


def labelled_batch(
    rows: Sequence[Sequence[int]], labels: Sequence[int], indices: Sequence[int], batch_size: int, longest: int
) -> Batch:
    """`padded_rows` with the `labels` [batch_size] of their classes, 0 where there is no row."""
    numbers = np.zeros(batch_size, np.int32)
    numbers[: len(indices)] = [labels[index] for index in indices]
    return {**padded_rows(rows, indices, batch_size, longest), "labels": numbers}
