"""A stream of tokens as batches of windows, for training (shuffled, endless) and evaluation (everything, once).

A training batch is a pure function of (tokens, seed, step): the only position to save is the step, and a run resumes
anywhere, on any number of processes. Shuffling is grain's seeded permutation with random access.

Shapes: N tokens in the stream, B rows of a batch, T = context.
"""

import contextlib
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Integer

from llmq_jax.counts import counted
from llmq_jax.data.splits import shuffled_epochs
from llmq_jax.errors import BadInput
from llmq_jax.field_types import whole

Batch = dict[str, np.ndarray]
"""tokens [B, T] int32 (inputs), targets [B, T] int32 (the next tokens), mask [B, T] float32 (1 where a target counts);
with separate documents also segment_ids [B, T] int32 (documents numbered 1, 2, ... in a row, 0 is padding) and
positions [B, T] int32 (from 0 in every document)."""


@dataclass(frozen=True, eq=False)
class TrainingBatches:
    """`batches[step]` is the batch of any step >= 0, in any order. Made by `training_batches`."""

    tokens: np.ndarray
    context: int
    seed: int
    end_of_text: int | None
    windows: int
    """Windows in an epoch."""
    batch_size: int
    """Rows of a batch over all processes."""
    rows: range
    """The rows that this process reads."""
    _shuffled: Any = field(repr=False)
    """Maps the index over all epochs to the window in the epoch: `shuffled_epochs`."""

    def __getitem__(self, step: int) -> Batch:
        if step < 0:
            raise IndexError(f"step {step} is negative")
        indices = [step * self.batch_size + row for row in self.rows]
        starts = [self._shuffled[index] * self.context + self._offset(index // self.windows) for index in indices]
        window = self.tokens[np.array(starts)[:, None] + np.arange(self.context + 1)].astype(np.int32)
        inputs, targets = np.ascontiguousarray(window[:, :-1]), np.ascontiguousarray(window[:, 1:])
        return _with_documents(inputs, targets, np.ones(inputs.shape, np.float32), self.end_of_text)

    def _offset(self, epoch: int) -> int:
        """Where an epoch's first window begins: drawn for each epoch, so that windows are cut differently each time."""
        slack = len(self.tokens) - 1 - self.windows * self.context
        # SeedSequence, unlike numpy's generators, promises the same words in every version.
        return int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0]) % (slack + 1)


def training_batches(
    tokens: Integer[np.ndarray, " N"] | Sequence[int],
    *,
    context: int,
    batch_size: int,
    seed: int = 0,
    end_of_text: int | None = None,
    separate_documents: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainingBatches:
    """Endless shuffled batches of windows of `context` tokens and their targets.

    An epoch is a permutation of consecutive windows that share no target; a batch may run across its end. The first
    window's offset is drawn anew for each epoch.

    batch_size: rows over all processes; process `process_index` of `process_count` gets its share of consecutive rows.
    separate_documents: documents, which end with `end_of_text`, do not see each other: adds `segment_ids` and
        `positions`, and masks out the first token of a document as target of the document before it.
    Raises BadInput when the text is shorter than one window (context + 1 tokens).
    """
    tokens = as_stream(tokens)
    _check_sizes(context, batch_size, end_of_text, separate_documents)
    if len(tokens) < context + 1:
        raise BadInput(
            f"the training text has {counted(len(tokens), 'token')} and one window needs {context + 1} (context + 1): "
            "use a longer text or a shorter context"
        )
    if whole(seed, "seed") < 0:
        raise BadInput(f"the seed must not be negative, got {seed}")
    # This leaves room for `context` different offsets; a text of less than two contexts is one window.
    windows = max(1, (len(tokens) - context) // context)
    if windows >= 2**32:
        raise BadInput(f"{windows} windows are more than grain can shuffle (2**32): use a longer context")
    return TrainingBatches(
        tokens=tokens,
        context=context,
        seed=seed,
        end_of_text=end_of_text if separate_documents else None,
        windows=windows,
        batch_size=batch_size,
        rows=rows_of(process_index, process_count, batch_size),
        _shuffled=shuffled_epochs(windows, seed),
    )


@dataclass(frozen=True, eq=False)
class EvaluationBatches:
    """A finite sequence of batches of one shape. Made by `evaluation_batches`."""

    tokens: np.ndarray
    context: int
    end_of_text: int | None
    batch_size: int
    rows: range

    def __len__(self) -> int:
        targets = len(self.tokens) - 1
        windows = -(-targets // self.context)
        return -(-windows // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        starts = (index * self.batch_size + np.array(self.rows)) * self.context
        places = starts[:, None] + np.arange(self.context)
        last = len(self.tokens) - 1
        mask = places < last  # the last token has no target
        inputs = np.where(mask, self.tokens[np.minimum(places, last)], 0).astype(np.int32)
        targets = np.where(mask, self.tokens[np.minimum(places + 1, last)], 0).astype(np.int32)
        return _with_documents(inputs, targets, mask.astype(np.float32), self.end_of_text)

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))


def evaluation_batches(
    tokens: Integer[np.ndarray, " N"] | Sequence[int],
    *,
    context: int,
    batch_size: int,
    end_of_text: int | None = None,
    separate_documents: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> EvaluationBatches:
    """The whole text in consecutive windows of `context` tokens: each of its N - 1 targets counts exactly once.

    The last window and the last batch are filled up with token 0 under mask 0 (and segment 0), so that all shapes are
    equal. Other arguments as for `training_batches`; with separate documents their first tokens do not count. Raises
    BadInput for fewer than 2 tokens, which hold no target.
    """
    tokens = as_stream(tokens)
    _check_sizes(context, batch_size, end_of_text, separate_documents)
    if len(tokens) < 2:
        raise BadInput(
            f"the evaluation text has {counted(len(tokens), 'token')} and needs at least 2: use a longer text"
        )
    return EvaluationBatches(
        tokens=tokens,
        context=context,
        end_of_text=end_of_text if separate_documents else None,
        batch_size=batch_size,
        rows=rows_of(process_index, process_count, batch_size),
    )


def as_stream(tokens: Any) -> np.ndarray:
    """Tokens as one array. BadInput: a text, several documents, or anything else that is no ids in a row."""
    with contextlib.suppress(ValueError):  # of documents that have different lengths
        stream: np.ndarray = np.asanyarray(tokens)
        if stream.ndim == 1 and (np.issubdtype(stream.dtype, np.integer) or not len(stream)):
            return stream
    shown = " ".join(reprlib.repr(tokens).split())  # not all of a corpus
    raise BadInput(f"tokens={shown:.40} must be ids in one list or array, as encode_documents gives them")


def check_vocabulary(
    tokens: Integer[np.ndarray, "..."] | Sequence[int], vocab_size: int, where: str = "the data"
) -> None:
    """Raises BadInput, which names the first wrong id and its position, unless all ids lie in 0..vocab_size-1."""
    tokens = np.asarray(tokens)
    if tokens.size == 0 or (tokens.max() < vocab_size and tokens.min() >= 0):
        return
    flat = tokens.reshape(-1)
    place = int(np.argmax((flat >= vocab_size) | (flat < 0)))
    raise BadInput(
        f"{where}: token id {flat[place]} at position {place} lies outside the vocabulary of {vocab_size} tokens: "
        "use the model's own tokenizer"
    )


def _with_documents(inputs: np.ndarray, targets: np.ndarray, mask: np.ndarray, end_of_text: int | None) -> Batch:
    """A batch; with the fields that keep documents apart, if `end_of_text`, the id that ends them, is given."""
    batch = {"tokens": inputs, "targets": targets, "mask": mask}
    if end_of_text is None:
        return batch
    ends = inputs == end_of_text
    begins = np.zeros_like(ends)
    begins[:, 1:] = ends[:, :-1]
    places = np.arange(inputs.shape[1], dtype=np.int32)
    latest_begin = np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    # Padding is where the mask was 0 before documents were looked at.
    batch["segment_ids"] = np.where(mask > 0, 1 + begins.cumsum(axis=1), 0).astype(np.int32)
    batch["positions"] = (places - latest_begin).astype(np.int32)
    # After the end of a document comes the first token of the next, which this document cannot know.
    batch["mask"] = np.where(ends, 0, mask).astype(np.float32)
    return batch


def rows_of(process_index: int, process_count: int, batch_size: int) -> range:
    """The rows of a batch that one of several processes reads. BadInput: they cannot be divided evenly."""
    if batch_size % process_count:
        raise BadInput(
            f"a batch of {counted(batch_size, 'row')} cannot be divided among {process_count} processes; give a "
            f"multiple of {process_count}"
        )
    share = batch_size // process_count
    return range(process_index * share, (process_index + 1) * share)


def _check_sizes(context: int, batch_size: int, end_of_text: int | None, separate_documents: bool) -> None:
    if whole(context, "context") < 1 or whole(batch_size, "batch_size") < 1:
        raise BadInput(f"context ({context}) and batch size ({batch_size}) must be at least 1")
    if separate_documents and end_of_text is None:
        raise BadInput("separating documents needs the end-of-text token, which this tokenizer does not have")
