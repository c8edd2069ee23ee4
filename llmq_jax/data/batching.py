"""Token lists of unequal length as rectangles: padding, and packing several into a row.

Packing is planned once, from the lengths alone; batches are then built from the plan in any order.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from llmq_jax.errors import BadInput

TokenList = Sequence[int] | np.ndarray


def pad(
    sequences: Sequence[TokenList], length: int | None = None
) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, " B"]]:
    """(tokens, lengths): the sequences as rows of `length` tokens, by default the longest one's, with zeros behind.

    Raises BadInput for a sequence longer than `length`: cutting is the caller's decision.
    """
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    if length is None:
        length = int(lengths.max(initial=0))
    _check_lengths(lengths, length)
    tokens = np.zeros((len(sequences), length), np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    return tokens, lengths


def pack(lengths: TokenList, capacity: int) -> list[list[int]]:
    """Plan rows of at most `capacity` tokens: for each row, the indices of its sequences.

    Best fit decreasing: the longest first, each into the fullest row that still has room, which needs at most about
    11/9 of the fewest rows possible. Deterministic. Every sequence is in exactly one row, whole.
    """
    _check_lengths(np.asarray(lengths), capacity)
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free tokens -> rows with just that many
    free_sizes: list[int] = []  # its keys, sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):  # stable: equal lengths in order
        length = int(lengths[index])
        at = bisect_left(free_sizes, length)
        if at == len(free_sizes):
            row, free = len(rows), capacity
            rows.append([])
        else:
            free = free_sizes[at]
            row = open_rows[free].pop()
            if not open_rows[free]:
                del open_rows[free], free_sizes[at]
        rows[row].append(index)
        left = free - length
        if left not in open_rows:
            open_rows[left] = []
            insort(free_sizes, left)
        open_rows[left].append(row)
    return rows


def packed_rows(
    sequences: Sequence[TokenList], plan: Sequence[Sequence[int]], capacity: int
) -> dict[str, Int32[np.ndarray, "B T"]]:
    """The rows of (a part of) a plan by `pack`: tokens, segment_ids and positions, all int32 `[rows, capacity]`.

    segment_ids number the sequences of a row 1, 2, ...; positions start at 0 in every sequence. Padding is 0 in all.
    BadInput: sequences of a row that are longer than `capacity` together.
    """
    tokens = np.zeros((len(plan), capacity), np.int32)
    segment_ids = np.zeros((len(plan), capacity), np.int32)
    positions = np.zeros((len(plan), capacity), np.int32)
    for row, indices in enumerate(plan):
        start = 0
        for segment, index in enumerate(indices, start=1):
            end = start + len(sequences[index])
            if end > capacity:
                raise BadInput(f"row {row} of the plan is longer than the {capacity} tokens of a row")
            tokens[row, start:end] = sequences[index]
            segment_ids[row, start:end] = segment
            positions[row, start:end] = np.arange(end - start)
            start = end
    return {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}


def multi_token_rows(
    sequences: Sequence[TokenList], depth: int, end_id: int, *, shrink: bool = False, longest: int | None = None
) -> dict[str, np.ndarray]:
    """Documents for multi-token prediction as the original repository batches them, one in a row.

    `tokens`, `targets`, `mask`, `segment_ids` [B, T] are the main model's; `ahead_tokens`, ... [B, depth, T] are those
    of modules 1 to `depth`, which read the document from token k on. In each stream the last target is `end_id`.
    Documents of at most `depth` tokens are left out; others are cut to `longest`.

    shrink: every stream reads n - depth of the document's n tokens, so that all modules have equally many; the end
        token is then its last target even where the text goes on. Otherwise module k reads all its n - k tokens.

    BadInput: `depth` or `longest` below 1.
    """
    if depth < 1:
        raise BadInput(f"depth={depth} must be at least 1: of the modules that look ahead")
    if longest is not None and longest < 1:
        raise BadInput(f"longest={longest} must be at least 1 token")
    rows = [np.asarray(sequence, np.int32)[:longest] for sequence in sequences]
    length = max(map(len, rows), default=0)
    rows = [row for row in rows if len(row) > depth]
    shape = (len(rows), depth + 1, length)
    tokens, targets, mask = (
        np.full(shape, end_id, np.int32),
        np.full(shape, end_id, np.int32),
        np.zeros(shape, np.int32),
    )
    for row, sequence in enumerate(rows):
        for stream in range(depth + 1):
            count = len(sequence) - (depth if shrink else stream)
            tokens[row, stream, :count] = sequence[stream : stream + count]
            targets[row, stream, : count - 1] = sequence[stream + 1 : stream + count]
            mask[row, stream, :count] = 1
    main = {"tokens": tokens[:, 0], "targets": targets[:, 0], "mask": mask[:, 0], "segment_ids": mask[:, 0]}
    ahead = {"tokens": tokens, "targets": targets, "mask": mask, "segment_ids": mask}
    return main | {f"ahead_{name}": array[:, 1:] for name, array in ahead.items()}


def count_tokens(batch: dict[str, Any]) -> int:
    """Tokens that are not padding: the sum of `lengths`, or the tokens with a segment in `segment_ids`. Without either,
    those that count in `mask` and every `..._mask`; without any mask, all."""
    if "lengths" in batch:
        return int(np.sum(batch["lengths"]))
    if "segment_ids" in batch:
        return int(np.count_nonzero(batch["segment_ids"]))
    masks = [array for name, array in batch.items() if name == "mask" or name.endswith("_mask")]
    return sum(int(np.count_nonzero(mask)) for mask in masks) if masks else int(np.size(batch.get("tokens", ())))


def _check_lengths(lengths: np.ndarray, limit: int) -> None:
    if len(lengths) and lengths.max() > limit:
        index = int(np.argmax(lengths > limit))
        raise BadInput(f"sequence {index} has {lengths[index]} tokens and a row holds {limit}: shorten it")
