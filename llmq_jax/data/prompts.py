"""Prompts to answer, with the other fields of their records, for rewards that look at more than the answer.

A record has `prompt`, a string or a list of messages; or any fields at all, and a format says how a prompt is made of
them: "Question: {question}\nAnswer:". Its other fields are columns that reward functions are given. Without a format
`tools` and `chat_template_kwargs` go to the chat template too.
"""

import functools
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmq_jax.data.bad_rows import usable
from llmq_jax.data.conversations import LOST, Conversation
from llmq_jax.data.folders import DataPath
from llmq_jax.data.messages import message_list, refuse_answered, refuse_lost, template_variables, text_of
from llmq_jax.data.prompt_templates import prompt_text
from llmq_jax.data.records import Record, checked_text, no_field, read_records, renamed
from llmq_jax.data.splits import seeded_order
from llmq_jax.data.tokenizers import Tokenizer
from llmq_jax.errors import BadInput

TEMPLATES = ("chat", "plain")
WIDE = re.compile(r"\d{7}")
"""In what a format says of a field, a width for which memory may not be enough."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt to answer."""

    where: str
    """The file and the row, for messages."""
    text: str
    """The prompt as the model reads it."""
    tokens: list[int]
    columns: dict[str, Any]
    """The record's fields, without the prompt."""


def read_prompts(
    path: DataPath,
    tokenizer: Tokenizer,
    *,
    template: str | None = None,
    prompt_format: str | None = None,
    longest: int | None = None,
    left_out: list[BadInput] | None = None,
    fields: Mapping[str, str] | None = None,
) -> tuple[list[Prompt], int]:
    """(the prompts of a file or folder of records, see `read_records`; how many were left out for more than `longest`
    tokens).

    template: "chat", the model's chat template, for which a string is what the user says; "plain", a string as it is;
    None: chat for messages, and wherever the model has a chat template.

    Raises BadInput, which names the row, for a prompt that is missing, empty or of another kind, a `system` beside it,
    which the model would not read, other fields than most rows have, and where no prompt is short enough. With a list
    `left_out` such rows are left out (see `usable`). `fields` are other names in the file: {"answer": "solution"}.
    """
    if template is not None and template not in TEMPLATES:
        raise BadInput(f"unknown template {template!r} for prompts: choose from {', '.join(TEMPLATES)}")
    records = renamed(read_records(path), fields)
    if prompt_format is not None:
        _check_format(prompt_format, records[0])
    prompts = list(usable(lambda record: _prompt(record, tokenizer, template, prompt_format), records, left_out))
    counts = Counter(frozenset(prompt.columns) for prompt in prompts)
    usual = max(prompts, key=lambda prompt: counts[frozenset(prompt.columns)])

    def alike(prompt: Prompt) -> Prompt:
        if prompt.columns.keys() != usual.columns.keys():
            raise BadInput(
                f"{prompt.where} has the fields {', '.join(prompt.columns) or 'none'} beside the prompt, and "
                f"{usual.where} {', '.join(usual.columns) or 'none'}: give all the same"
            )
        return prompt

    prompts = list(usable(alike, prompts, left_out))
    kept = [prompt for prompt in prompts if longest is None or len(prompt.tokens) <= longest]
    if not kept:
        shortest = min(len(prompt.tokens) for prompt in prompts)
        raise BadInput(
            f"{path}: every prompt is longer than {longest} tokens, the shortest has {shortest}: choose a greater "
            "--max-prompt, or fewer --max-new-tokens where they leave no more"
        )
    return kept, len(prompts) - len(kept)


def columns_of(prompts: Sequence[Prompt], samples: int = 1) -> dict[str, list[Any]]:
    """{field: its value for each row}, each prompt's `samples` times."""
    names = prompts[0].columns
    return {name: [prompt.columns[name] for prompt in prompts for _ in range(samples)] for name in names}


def _prompt(record: Record, tokenizer: Tokenizer, template: str | None, prompt_format: str | None) -> Prompt:
    where, fields = record
    if prompt_format is not None:
        value: Any = _formatted(prompt_format, record)
    elif "prompt" in fields:
        refuse_lost(fields, LOST["prompt"], where)
        value = fields["prompt"]
    else:
        raise BadInput(
            f"{no_field(where, 'prompt', fields)}: have one, or say how it is made of others (--prompt-format)"
        )
    columns = {name: value for name, value in fields.items() if name != "prompt"}
    for name in ("prompts", "completions"):
        if name in columns:
            raise BadInput(f"{where} has a field {name!r}, which reward functions are given already: rename the field")
    is_text = isinstance(value, str)
    if not is_text and not isinstance(value, list):
        raise BadInput(f"{where}: the prompt must be a string or a list of messages, not {value!r:.40}")
    messages = ({"role": "user", "content": checked_text(value, where)},) if is_text else message_list(record, "prompt")
    refuse_answered(messages, f"{where}: the prompt")
    if not any(text_of(message).strip() for message in messages):
        raise BadInput(f"{where}: the prompt is empty, so there is nothing to answer: remove the row, or fill it in")
    chat = tokenizer.chat_template
    if template == "plain" and not is_text:
        raise BadInput(f"{where}: the template 'plain' is for prompts that are strings: use the chat template")
    if template == "plain" or (template is None and is_text and chat is None):
        return Prompt(where, value, tokenizer.encode_prompt(value), columns)
    if chat is None:
        raise BadInput(
            f"{where}: the model has no chat template: use strings and the template 'plain', or give one "
            "(--chat-template FILE)"
        )
    variables = template_variables(record) if prompt_format is None else {}
    conversation = Conversation(where, "messages", messages, given=len(messages), variables=variables)
    text = prompt_text(conversation, chat)
    return Prompt(where, text, tokenizer.encode(text, allow_special=True), columns)


def _formatted(prompt_format: str, record: Record) -> str:
    for name in _names(prompt_format):
        if name not in record.fields:
            raise BadInput(no_field(record.where, name, record.fields, "--prompt-format"))
        if not isinstance(record.fields[name], str | int | float):
            raise BadInput(
                f"{record.where}: field {name!r} must be a string or a number to stand in a prompt, not "
                f"{record.fields[name]!r:.40}"
            )
    try:
        return prompt_format.format_map(record.fields)
    except MemoryError:  # a width may come from a field of the record
        raise BadInput(f"{record.where}: the prompt of the format {prompt_format!r:.60} fits no memory") from None
    except (ValueError, TypeError, LookupError) as error:
        raise BadInput(f"{record.where}: the prompt format {prompt_format!r:.60} cannot be filled: {error}") from None


def _names(prompt_format: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(prompt_format) if name is not None]


def _check_format(prompt_format: str, record: Record) -> None:
    try:
        names = _names(prompt_format)
    except ValueError as error:
        raise BadInput(f"the prompt format {prompt_format!r:.60} is broken ({error}): write {{{{ for a brace") from None
    if not names:
        known = ", ".join(record.fields)
        raise BadInput(f"the prompt format names no field, so all prompts would be the same: use {{name}} of {known}")
    for _, name, width, _ in string.Formatter().parse(prompt_format):
        if name is not None and WIDE.search(width or ""):
            raise BadInput(
                f"the prompt format pads {{{name}}} by {width!r:.20}: no prompt is a million characters long"
            )
    for name in names:
        if not name.isidentifier() and (name not in record.fields or "." in name or "[" in name):
            raise BadInput(f"the prompt format holds {{{name}}}, which is no name of a field: write {{{{ for a brace")


@dataclass(frozen=True, eq=False)
class PromptBatches:
    """`batches[step]` has the indices of a step's prompts: a pure function of (count, size, seed, step). Each epoch has
    every prompt once, in an order of its own."""

    count: int
    size: int
    """Prompts in a step."""
    seed: int = 0

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        first = step * self.size
        places = [self._place(index) for index in range(first, first + self.size)]
        return {"step": np.asarray(step, np.int32), "prompts": np.asarray(places, np.int32)}

    def _place(self, index: int) -> int:
        epoch, place = divmod(index, self.count)
        return int(_order(self.count, self.seed, epoch)[place])


@functools.lru_cache(maxsize=2)  # a step may end one epoch and begin the next
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return seeded_order(count, [seed, epoch])


def step_seeds(seed: int, step: int, rows: int, stream: int = 0) -> list[int]:
    """A seed of its own for each row of a step."""
    seeds: list[int] = np.random.SeedSequence([seed, step, stream]).generate_state(rows).tolist()
    return seeds
