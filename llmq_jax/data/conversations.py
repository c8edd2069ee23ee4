"""Conversations to learn from, in the forms that people keep them in. A record's fields tell which form it has:

    instruction, input, output    Alpaca's; `input` may be missing or empty
    messages                      [{"role": "system", "user" or "assistant", "content": text}, ...]
    conversations                 ShareGPT's: [{"from": "system", "human" or "gpt", "value": text}, ...]
    prompt, completion            two strings, or two lists of messages
    text                          all in one, for training on all of it
    question, answer              GSM8K's: two strings, which are an instruction and its output

Messages may have either spelling, wherever they stand.
How they become text is in prompt_templates.py, how tokens and batches in instruction_batches.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmq_jax.data.folders import DataPath
from llmq_jax.data.records import Record, checked_text, no_field, read_records
from llmq_jax.errors import BadInput

Message = dict[str, str]
"""{"role": ..., "content": ...}"""

ROLES = ("system", "user", "assistant")
SPEAKERS = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
"""{what ShareGPT calls who says something: the role}"""
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
    "messages": ("tools", "functions", "conversations", "chat_template_kwargs"),
    "conversations": ("tools", "functions", "system", "chat_template_kwargs"),
    "prompt": ("tools", "chat_template_kwargs"),
    "alpaca": ("system", "history"),
    "question": ("tools", "context", "choices"),
}
LOST_OF_MESSAGES = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
"""What other programs would train on, and is not read: refused where it is not empty."""


@dataclass(frozen=True)
class Conversation:
    """One row of instruction data, in any of the forms, as messages."""

    where: str
    """The file and the row, for messages."""
    form: str
    """One of FORMS. ShareGPT's conversations and two lists are "messages", a question and its answer are "alpaca"."""
    messages: tuple[Message, ...]
    """All messages, whatever the form: a prompt is the user's, what answers it the assistant's."""
    given: int = 0
    """So many messages at the beginning are the prompt, and what the assistant says in them is not learned."""
    input: str = ""
    """Alpaca's, which belongs to the first message."""

    def chat(self) -> list[Message]:
        """The messages as a chat has them, the input in the instruction."""
        first, *others = self.messages
        if self.input:
            first = {**first, "content": f"{first['content']}\n\n{self.input}"}
        return [first, *others]

    def single_turn(self, template: str) -> tuple[str, str]:
        """(the user's text without the input, the answer), for a template that has room for no more."""
        if [message["role"] for message in self.messages] != ["user", "assistant"]:
            roles = ", ".join(message["role"] for message in self.messages)
            raise BadInput(
                f"{self.where}: the template {template!r} takes one message of the user and one answer, not {roles}: "
                "use the model's chat template (chat)"
            )
        prompt, answer = self.messages
        return prompt["content"], answer["content"]


def read_conversations(path: DataPath) -> list[Conversation]:
    """The conversations of a file or folder of records (see `read_records`), all of one form.

    Raises BadInput, which names the row, for a form or role that is unknown, a field that is missing or no text, and
    an empty answer.
    """
    conversations = [as_conversation(record) for record in read_records(path)]
    first = conversations[0]
    for other in conversations:
        if other.form != first.form:
            raise BadInput(
                f"{other.where} has the fields of the form {other.form!r} and {first.where} those of {first.form!r}: "
                "give those of one form alone"
            )
    return conversations


def as_conversation(record: Record) -> Conversation:
    """A record in any of the forms. BadInput as for `read_conversations`."""
    nulls = [name for name, value in record.fields.items() if value is None]
    record = without_nulls(record)
    where, fields = record
    form = next((form for form, needed in FORMS.items() if all(name in fields for name in needed)), None)
    if form is None:
        names = (", ".join(fields) or "none") + (f"; null: {', '.join(nulls)}" if nulls else "")
        forms = "; or ".join(", ".join(needed) for needed in FORMS.values())
        raise BadInput(f"{where} is no conversation (fields found: {names}): it needs the fields {forms}")
    refuse_lost(fields, LOST.get(form, ()), where)
    if form in ("messages", "conversations"):
        return Conversation(where, "messages", message_list(record, form))
    if form == "prompt":
        return _prompt_and_completion(record)
    if form == "question":
        return Conversation(where, "alpaca", _asked_and_answered(record, "question", "answer"), given=1)
    if form == "alpaca":
        given = record.text("input") if "input" in fields else ""
        messages = _asked_and_answered(record, "instruction", "output")
        return Conversation(where, form, messages, given=1, input=given)
    return Conversation(where, form, ({"role": "assistant", "content": _not_empty(record.text("text"), where)},))


def refuse_lost(fields: Mapping[str, Any], names: Sequence[str], where: str) -> None:
    for name in names:
        if fields.get(name) and fields[name] != "[]":  # a list in JSON, as TRL reads `tools`
            raise BadInput(f"{where} has {name!r}, which is not read: write it into the text, or remove it")


def without_nulls(record: Record) -> Record:
    """A table of several forms has nothing (null) in the fields of the others."""
    return Record(record.where, {name: value for name, value in record.fields.items() if value is not None})


def answer(record: Record, name: str) -> Message:
    """The text in a field as what the assistant says. BadInput: it is empty."""
    return {"role": "assistant", "content": _not_empty(record.text(name), f"{record.where}: field {name!r}")}


def _asked_and_answered(record: Record, asked: str, answered: str) -> tuple[Message, Message]:
    """Two texts as what the user and what the assistant says."""
    return {"role": "user", "content": record.text(asked)}, answer(record, answered)


def _prompt_and_completion(record: Record) -> Conversation:
    kinds = [isinstance(record.fields[name], str) for name in ("prompt", "completion")]
    if all(kinds):
        return Conversation(record.where, "prompt", _asked_and_answered(record, "prompt", "completion"), given=1)
    if any(kinds):
        raise BadInput(f"{record.where}: prompt and completion must both be strings, or both be lists of messages")
    prompt, completion = message_list(record, "prompt"), message_list(record, "completion")
    return Conversation(record.where, "messages", (*prompt, *completion), given=len(prompt))


def message_list(record: Record, name: str) -> tuple[Message, ...]:
    """The messages in a field. BadInput, which numbers them from 0, for what is none."""
    value = record.fields[name]
    where = f"{record.where}: field {name!r}"
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        keys = '"from": ..., "value"' if name == "conversations" else '"role": ..., "content"'
        raise BadInput(f"{where} must be a list of {{{keys}: ...}}, not {_shown(value)}")
    given = name == "prompt"
    return tuple(_message(message, f"{record.where}: {name}[{index}]", given) for index, message in enumerate(value))


def _message(message: Any, where: str, given: bool) -> Message:
    if not isinstance(message, Mapping):
        raise BadInput(f'{where} must be {{"role": ..., "content": ...}}, not {_shown(message)}')
    is_shared = "role" not in message and ("from" in message or "value" in message)
    who, what = ("from", "value") if is_shared else ("role", "content")
    for key in (who, what):
        if key not in message:
            raise BadInput(no_field(where, key, message))
    role, content = message[who], checked_text(message[what], f"{where}: {what}")
    refuse_lost(message, LOST_OF_MESSAGES, where)
    if message.get("weight") == 0:
        raise BadInput(f"{where} has the weight 0, which is not supported: choose what is learned by --train-on")
    if is_shared:
        if not isinstance(role, str) or role not in SPEAKERS:
            raise BadInput(f"{where} is from {role!r}: choose from {', '.join(SPEAKERS)}")
        role = SPEAKERS[role]
    if role not in ROLES:
        raise BadInput(f"{where} has the role {role!r}: choose from {', '.join(ROLES)}")
    if role == "assistant" and given and not content.strip():
        raise BadInput(f"{where}: the assistant says nothing: remove the message, or fill it in")
    return {"role": role, "content": _not_empty(content, where) if role == "assistant" else content}


def _not_empty(text: str, where: str) -> str:
    if not text or text.isspace():
        raise BadInput(f"{where}: the response is empty, so there is nothing to learn: remove the row, or fill it in")
    return text


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
