"""Conversations to learn from, in the forms that people keep them in. A record's fields tell which form it has:

    instruction, input, output    Alpaca's; `input` may be missing or empty
    messages                      [{"role": "system", "user", "assistant" or "tool", "content": text}, ...]
    conversations                 ShareGPT's: [{"from": "system", "human" or "gpt", "value": text}, ...]
    prompt, completion            two strings, or two lists of messages
    text                          all in one, for training on all of it
    question, answer              GSM8K's: two strings, which are an instruction and its output

Messages may have either spelling in any of these fields; messages.py says what they hold. `tools`, those that the
assistant may call, and `chat_template_kwargs` are for the chat template.
prompt_templates.py writes conversations as text, instruction_batches.py makes tokens and batches of them.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmq_jax.data.bad_rows import usable
from llmq_jax.data.folders import DataPath
from llmq_jax.data.messages import (
    REASONING,
    Message,
    empty_response,
    message_list,
    not_learned,
    refuse_lost,
    template_variables,
    text_of,
)
from llmq_jax.data.records import Record, is_blank, read_records, renamed
from llmq_jax.errors import BadInput

FORMS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "question": ("question", "answer"),
}
"""{form: the fields that it must have}, in the order in which they are looked for."""
LOST = {
    "messages": ("functions", "conversations", "system"),
    "conversations": ("functions", "system"),
    "prompt": ("system",),
    "alpaca": ("system", "history"),
    "question": ("context", "choices"),
}
"""{form: fields that other programs train on and this one does not read}: refused unless they are empty."""


@dataclass(frozen=True)
class Conversation:
    """One row of instruction data, in any of the forms, as messages."""

    where: str
    """The file and the row, for messages."""
    form: str
    """One of FORMS. ShareGPT's conversations, and a prompt and completion that are lists of messages, are "messages"; a
    question and its answer are "alpaca"."""
    messages: tuple[Message, ...]
    """All messages, whatever the form: a prompt is a message of the user, its answer one of the assistant."""
    given: int = 0
    """How many messages at the beginning are the prompt; what the assistant says in them is not learned."""
    input: str = ""
    """Alpaca's input, which belongs to the first message."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the chat template beside the messages: `tools`, and those of `chat_template_kwargs`."""
    unlearned: frozenset[int] = frozenset()
    """The numbers, from 0, of messages of the assistant that are marked as not to be learned (weight 0): they are
    context alone, as those in the prompt."""

    def chat(self) -> list[Message]:
        """The messages as a chat has them, with the input at the end of the instruction."""
        first, *others = self.messages
        if self.input:
            first = {**first, "content": f"{first['content']}\n\n{self.input}"}
        return [first, *others]

    def single_turn(self, template: str) -> tuple[str, str]:
        """(the user's text without the input, the answer), for a template of one turn. BadInput for anything more."""
        if [message["role"] for message in self.messages] != ["user", "assistant"]:
            roles = ", ".join(message["role"] for message in self.messages)
            raise BadInput(
                f"{self.where}: the template {template!r} takes one message of the user and one answer, not {roles}: "
                "use the model's chat template (chat)"
            )
        prompt, answer = self.messages
        others = {**self.variables, **prompt, **answer}
        if lost := [name for name in (*self.variables, "tool_calls", *REASONING) if others.get(name)]:
            raise BadInput(
                f"{self.where}: the template {template!r} has no place for {lost[0]!r}: use the model's chat template "
                "(chat)"
            )
        return text_of(prompt), text_of(answer)


def read_conversations(
    path: DataPath, left_out: list[BadInput] | None = None, fields: Mapping[str, str] | None = None
) -> list[Conversation]:
    """The conversations of a file or folder of records (see `read_records`), all of one form.

    Raises BadInput, which names the row, for a form or role that is unknown, a field that is missing or no text, and
    an empty answer; with a list `left_out` such rows are left out (see `usable`). `fields` are other names in the file:
    {"output": "response"}.
    """
    conversations = list(usable(as_conversation, renamed(read_records(path), fields), left_out))
    require_one_form(conversations)
    return conversations


def require_one_form(conversations: Sequence[Conversation]) -> None:
    """BadInput, which names two rows, for conversations of several forms."""
    first = conversations[0]
    for other in conversations:
        if other.form != first.form:
            raise BadInput(
                f"{other.where} has the fields of the form {other.form!r} and {first.where} those of {first.form!r}: "
                "give those of one form alone"
            )


def as_conversation(record: Record) -> Conversation:
    """A record in any of the forms. BadInput as for `read_conversations`."""
    record, form = with_form(record, FORMS, "conversation")
    where, fields = record
    refuse_lost(fields, LOST.get(form, ()), where)
    if form == "text":
        return Conversation(where, form, ({"role": "assistant", "content": _not_empty(record.text("text"), where)},))
    return replace(_asked(record, form), variables=template_variables(record))


def _asked(record: Record, form: str) -> Conversation:
    where, fields = record
    if fields.get("label") is False:  # the answers of TRL's unpaired preferences are rated
        raise BadInput(f"{where}: label is false, and an answer that is not wanted would be learned; remove such rows")
    if form in ("messages", "conversations"):
        return Conversation(where, "messages", message_list(record, form), unlearned=not_learned(record, form))
    if form == "prompt":
        return _prompt_and_completion(record)
    if form == "question":
        return Conversation(where, "alpaca", _asked_and_answered(record, "question", "answer"), given=1)
    given = record.text("input") if "input" in fields else ""
    return Conversation(where, form, _asked_and_answered(record, "instruction", "output"), given=1, input=given)


def with_form(record: Record, forms: Mapping[str, Sequence[str]], what: str) -> tuple[Record, str]:
    """(the record without its null fields, the first of the forms whose fields it has): in a table of several forms,
    rows have null in the fields of other forms. BadInput, which says that it is no `what`, where it has none."""
    fields = {name: value for name, value in record.fields.items() if value is not None}
    form = next((form for form, needed in forms.items() if all(name in fields for name in needed)), None)
    if form is None:
        nulls = [name for name in record.fields if name not in fields]
        names = (", ".join(fields) or "none") + (f"; null: {', '.join(nulls)}" if nulls else "")
        wanted = "; or ".join(", ".join(needed) for needed in forms.values())
        nearest = _missing_least(fields, forms)
        near = f"{' or '.join(nearest)} too, or " if nearest else ""
        raise BadInput(
            f"{record.where} is no {what} (fields found: {names}): it needs {near}the fields {wanted}; --fields says "
            "what they are called in the file, as in output=response"
        )
    return Record(record.where, fields), form


def _missing_least(fields: Collection[str], forms: Mapping[str, Sequence[str]]) -> list[str]:
    """What the forms of which a record has some fields lack, where that is least: ["output"], or ["chosen and
    rejected"]."""
    begun = (needed for needed in forms.values() if any(name in fields for name in needed))
    missing = [[name for name in needed if name not in fields] for needed in begun]
    least = min(map(len, missing), default=0)
    return list(dict.fromkeys(" and ".join(names) for names in missing if len(names) == least))


def answer(record: Record, name: str) -> Message:
    """The text in a field as a message of the assistant. BadInput: it is empty."""
    return {"role": "assistant", "content": _not_empty(record.text(name), f"{record.where}: field {name!r}")}


def _asked_and_answered(record: Record, asked: str, answered: str) -> tuple[Message, Message]:
    """The texts of two fields as messages of the user and of the assistant."""
    return {"role": "user", "content": record.text(asked)}, answer(record, answered)


def _prompt_and_completion(record: Record) -> Conversation:
    kinds = [isinstance(record.fields[name], str) for name in ("prompt", "completion")]
    if all(kinds):
        return Conversation(record.where, "prompt", _asked_and_answered(record, "prompt", "completion"), given=1)
    if any(kinds):
        raise BadInput(f"{record.where}: prompt and completion must both be strings, or both be lists of messages")
    prompt, completion = message_list(record, "prompt"), message_list(record, "completion")
    unlearned = not_learned(record, "prompt") | not_learned(record, "completion", len(prompt))
    return Conversation(record.where, "messages", (*prompt, *completion), given=len(prompt), unlearned=unlearned)


def _not_empty(text: str, where: str) -> str:
    if is_blank(text):
        raise BadInput(empty_response(where))
    return text
