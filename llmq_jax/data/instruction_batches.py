"""Conversations to batches for instruction tuning: tokens, which of them are learned, rows, batches.

The whole text of a conversation is tokenized at once, and a token is learned if it holds at least one character of
what is to be learned. So a merge across the end of the prompt can neither shift the mask nor change the tokens.

Rows hold one conversation each, padded to one of a few lengths, or several that do not attend to each other (packing).
Either way a batch is a pure function of (conversations, seed, step), and an epoch has every conversation once: a batch
that lacks rows is filled up with empty ones.

Shapes: n tokens in a conversation, B rows of a batch, T tokens of a row.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from llmq_jax.counts import counted
from llmq_jax.data.bad_rows import usable
from llmq_jax.data.batching import pack, packed_rows
from llmq_jax.data.conversations import Conversation
from llmq_jax.data.offsets import overlaps
from llmq_jax.data.prompt_templates import Rendered, TrainOn, check_train_on, render
from llmq_jax.data.splits import shuffled_epochs
from llmq_jax.data.tokenizers import Tokenizer
from llmq_jax.data.windows import Batch, rows_of
from llmq_jax.errors import BadInput

ROW_LENGTHS = 4
"""How many different lengths padded rows may have, hence how many programs are compiled at most."""


@dataclass(frozen=True, eq=False)
class Example:
    """A conversation as tokens."""

    tokens: Int32[np.ndarray, " n"]
    learned: Bool[np.ndarray, " n"]
    """Which of them are learned, as targets. The first token never is one, even if marked: nothing stands before it."""
    where: str
    cut: bool = False
    """Whether its end is missing."""

    def cut_to(self, count: int) -> "Example":
        """Its first `count` tokens, or the whole example where it has no more."""
        if len(self.tokens) <= count:
            return self
        return Example(self.tokens[:count], self.learned[:count], self.where, cut=True)


@dataclass(frozen=True, eq=False)
class Examples:
    """What there is to learn from, and what became of conversations that did not fit."""

    examples: list[Example]
    truncated: int
    """Conversations cut to the context."""
    dropped: int
    """Conversations left out: too long, or without anything to learn once they were cut."""

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def tokens(self) -> int:
        """Tokens in all conversations."""
        return sum(len(example.tokens) for example in self.examples)

    @property
    def learned_tokens(self) -> int:
        """How many of them are targets."""
        return sum(int(example.learned[1:].sum()) for example in self.examples)


def tokenize_conversations(
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    *,
    template: str,
    context: int,
    train_on: TrainOn = "response",
    too_long: str = "truncate",
    left_out: list[BadInput] | None = None,
) -> Examples:
    """Conversations, written by a template (see prompt_templates.py), as examples of at most `context` tokens.

    too_long: what becomes of a longer conversation. "truncate" keeps its beginning, "drop" leaves it out, "error" is
    BadInput, which names it. One that has nothing to learn left is dropped, too.
    left_out: a list for the errors of conversations that the template refuses (see `usable`).
    Raises BadInput where nothing is left at all.
    """
    check_train_on(train_on)
    if too_long not in ("truncate", "drop", "error"):
        raise BadInput(f'too_long must be "truncate", "drop" or "error", not {too_long!r}')
    if context < 2:
        raise BadInput(f"a context of {context} leaves nothing to learn: it needs at least 2 tokens")

    def whole(conversation: Conversation) -> Example:
        if train_on == "all" and conversation.unlearned:
            raise BadInput(
                f"{conversation.where} marks an answer as not to be learned (weight, train or loss), and --train-on "
                "all learns it: leave out --train-on all, or remove the marks"
            )
        return tokenize(render(conversation, template, tokenizer.chat_template), tokenizer, train_on)

    examples: list[Example] = []
    truncated = dropped = 0
    shortest = sys.maxsize
    for example in usable(whole, conversations, left_out):
        length = len(example.tokens)
        shortest = min(shortest, length)
        if length > context:
            if too_long == "error":
                raise BadInput(
                    f"{example.where} has {length} tokens and the context {context}: shorten it, choose a longer "
                    "--context, or let such conversations be truncated or dropped (--too-long)"
                )
            if too_long == "drop":
                dropped += 1
                continue
            example = example.cut_to(context)
        if not example.learned[1:].any():
            dropped += 1
            continue
        truncated += length > context
        examples.append(example)
    if not examples:
        raise BadInput(
            f"of {counted(len(conversations), 'conversation')} none has anything to learn within the context of "
            f"{context} tokens (the shortest has {counted(shortest, 'token')} as the template {template!r} writes it): "
            "shorten the prompts, choose a template that writes less or, if the model takes more, a longer context"
        )
    return Examples(examples, truncated, dropped)


def tokenize(rendered: Rendered, tokenizer: Tokenizer, train_on: TrainOn = "response") -> Example:
    """A whole conversation as tokens. A text that no chat template wrote gets the tokenizer's beginning, if it has one,
    and the end-of-text token, which is learned.

    Raises BadInput for an answer that is not there, and for a tokenizer without the end of text that is needed.
    """
    spans = rendered.chosen(train_on)
    ids, offsets = tokenizer.encode_with_offsets(
        rendered.text, allow_special=rendered.is_chat, add_special_tokens=not rendered.is_chat
    )
    learned = overlaps(offsets, spans)
    if not rendered.is_chat:
        if tokenizer.end_of_text is None:
            raise BadInput(
                f"tokenizer {tokenizer.name} has no end-of-text token to end an answer with; give it one, or a "
                "chat template"
            )
        # Some tokenizers append it themselves.
        if not ids or ids[-1] != tokenizer.end_of_text:
            ids, learned = [*ids, tokenizer.end_of_text], np.append(learned, False)
        learned[-1] = True  # where no chat template writes, the last answer ends the text
    return Example(np.array(ids, np.int32), learned, rendered.where)


@dataclass(frozen=True, eq=False)
class InstructionBatches:
    """`batches[step]` for any step >= 0, in any order; `len(batches)` steps are an epoch, which `for batch in batches`
    goes through. Without a seed there is one epoch, in order. Made by `instruction_batches`.

    A batch is a dict of `tokens`, `targets`, `segment_ids`, `positions` int32 [B, T] and `mask` float32 [B, T], as for
    windows of text. Conversations are numbered 1, 2, ... in their row; none is context or target of another.
    """

    examples: Sequence[Example]
    groups: tuple["_Group", ...]
    """Each holds the rows of one length; all rows of a batch are from one group."""
    batch_size: int
    """Rows of a batch over all processes."""
    rows: range
    """The rows that this process reads."""
    seed: int | None
    _order: Any = field(repr=False)
    """Maps the index over all epochs to the batch in the epoch."""

    def __len__(self) -> int:
        return sum(group.batches(self.batch_size) for group in self.groups)

    def __iter__(self) -> Iterator[Batch]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, step: int) -> Batch:
        plan, length = self._plan(step)
        return conversation_rows(self.examples, plan[self.rows.start : self.rows.stop], length)

    def count_tokens(self, step: int) -> int:
        """Tokens of a batch, without padding, over all processes."""
        plan, _ = self._plan(step)
        return sum(len(self.examples[index].tokens) for row in plan for index in row)

    @cached_property
    def _plan(self) -> Callable[[int], tuple[list[list[int]], int]]:
        """(the examples of each row of a batch, the length of its rows). The batch asked for last is kept, for
        `count_tokens`: grain's shuffle takes up to 5 ms an index where there is little to shuffle, since it walks
        through numbers of 16 bits until one is in range."""
        return lru_cache(maxsize=1)(self._new_plan)

    def _new_plan(self, step: int) -> tuple[list[list[int]], int]:
        if step < 0 or (self.seed is None and step >= len(self)):
            raise IndexError(f"batch {step} of {len(self)}")
        epoch, number = step // len(self), int(self._order[step])
        for group in self.groups:
            if number < group.batches(self.batch_size):
                break
            number -= group.batches(self.batch_size)
        places = range(number * self.batch_size, (number + 1) * self.batch_size)
        return [group.row(epoch, place) if place < len(group.plan) else [] for place in places], group.length


@dataclass(frozen=True, eq=False)
class _Group:
    length: int
    plan: list[list[int]]
    """The examples of each row."""
    order: Any = field(repr=False)
    """Maps the index over all epochs to the row of `plan`."""

    def batches(self, batch_size: int) -> int:
        return -(-len(self.plan) // batch_size)

    def row(self, epoch: int, place: int) -> list[int]:
        return self.plan[int(self.order[epoch * len(self.plan) + place])]


def instruction_batches(
    examples: Sequence[Example],
    *,
    context: int,
    batch_size: int,
    packing: bool = True,
    seed: int | None = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> InstructionBatches:
    """Batches of conversations, each of at most `context` tokens.

    packing: several conversations in rows of `context` tokens; the rows stay the same, their order is drawn anew for
        each epoch. Otherwise one conversation in a row, padded to the smallest length that holds it: that of the
        longest, or a half, a quarter or an eighth of it. A batch has one length; the order of batches is drawn anew
        too.
    batch_size: rows over all processes; process `process_index` of `process_count` gets its share of consecutive rows.
    seed: of all that is shuffled; None leaves everything in order, for evaluation.

    BadInput: no conversation, or one that is longer than `context`; numbers out of range; rows that the processes
    cannot share equally.
    """
    if context < 1 or batch_size < 1:
        raise BadInput(f"context ({context}) and batch size ({batch_size}) must be at least 1")
    if not examples:
        raise BadInput("there is no conversation to make batches of")
    if seed is not None and seed < 0:
        raise BadInput(f"the seed must not be negative, got {seed}")
    lengths = [len(example.tokens) for example in examples]
    for example, length in zip(examples, lengths, strict=True):
        if length > context:
            raise BadInput(f"{example.where} has {length} tokens and a row {context}: truncate or drop it")
    if packing:
        plans = {context: pack(lengths, context)}
    else:
        plans = {-(-max(lengths) // 2**halvings): [] for halvings in reversed(range(ROW_LENGTHS))}
        for index, length in enumerate(lengths):
            plans[next(row_length for row_length in plans if length <= row_length)].append([index])
    groups = tuple(
        _Group(length, plan, _shuffled(len(plan), seed, number + 1))
        for number, (length, plan) in enumerate(plans.items())
        if plan
    )
    count = sum(group.batches(batch_size) for group in groups)
    rows = rows_of(process_index, process_count, batch_size)
    return InstructionBatches(examples, groups, batch_size, rows, seed, _shuffled(count, seed, 0))


def conversation_rows(examples: Sequence[Example], plan: Sequence[Sequence[int]], length: int) -> Batch:
    """A batch of rows of `length` tokens; `plan` has the examples of each row, none for an empty one."""
    chosen = [examples[index] for indices in plan for index in indices]
    numbers = iter(range(len(chosen)))
    plan = [[next(numbers) for _ in indices] for indices in plan]
    batch = packed_rows([example.tokens for example in chosen], plan, length)
    learned = packed_rows([example.learned for example in chosen], plan, length)["tokens"]
    segments = batch["segment_ids"]
    # The last token of a conversation has no target: another conversation follows it, or nothing.
    follows = np.zeros(segments.shape, bool)
    follows[:, :-1] = segments[:, 1:] == segments[:, :-1]  # what follows padding is 0, and 0 in the mask
    targets, mask = (np.where(follows, np.roll(rows, -1, axis=1), 0) for rows in (batch["tokens"], learned))
    return {**batch, "targets": targets.astype(np.int32), "mask": mask.astype(np.float32)}


def _shuffled(count: int, seed: int | None, stream: int) -> Any:
    """Maps the index over all epochs to the index in the epoch: `shuffled_epochs` or, without a seed, one epoch in
    order."""
    return range(count) if seed is None else shuffled_epochs(count, [seed, stream])
