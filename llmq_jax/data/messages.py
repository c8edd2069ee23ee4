"""Messages of a conversation, as chat templates read them: who says what, and which tools are called.

    {"role": "user", "content": text}
    {"role": "user", "content": [{"type": "text", "text": text}, ...]}
    {"role": "assistant", "content": text, "reasoning_content": text}              or `reasoning`, or `thinking`
    {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": ..., "arguments": {...}}}]}
    {"role": "assistant", "content": text, "weight": 0}         not learned; so are `"train": false` and `"loss": false`
    {"role": "tool", "name": ..., "tool_call_id": ..., "content": text}

ShareGPT spells a message {"from": ..., "value": text}. A key that is null is absent, as in transformers. What tools and
calls hold goes to the template as it is: some templates want the arguments as an object, others as a string in JSON.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmq_jax.data.records import Record, checked_text, no_field
from llmq_jax.errors import BadInput
from llmq_jax.json_text import parse_json

Message = dict[str, Any]
"""{"role": ..., "content": text or parts} and any of KEYS. A message that calls tools may have no content."""

ROLES = ("system", "developer", "user", "assistant", "tool")
CALL = "function_call"
"""The speaker of a tool call in ShareGPT's conversations; the value is the call in JSON."""
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    CALL: "assistant",
    "observation": "tool",
    "tool": "tool",
}
"""{ShareGPT's name of a speaker: the role}"""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of the assistant's reasoning before its answer; the first one that a message has counts."""
KEYS = ("tool_calls", "tool_call_id", "name", *REASONING)
"""Keys that a message may have for the template beside role and content."""
MARKS = ("weight", "train", "loss")
"""Keys by which data (OpenAI's and Mistral's, axolotl's, LLaMA-Factory's) leave an answer out of the loss."""


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, or its parts' texts joined; "" where it only calls tools."""
    content = message.get("content")
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())


def reasoning_of(message: Mapping[str, Any]) -> str | None:
    """The reasoning of a message, None where it has none."""
    return next((message[name] for name in REASONING if message.get(name) is not None), None)


def called(message: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(name, all strings in the arguments) of each tool call of a message."""
    functions = [call.get("function") or call for call in message.get("tool_calls") or ()]
    return [(str(function.get("name")), list(_texts(function.get("arguments")))) for function in functions]


def _texts(value: Any) -> Iterator[str]:
    """All strings in a nested value; a string that is a JSON object or list is searched in turn."""
    if isinstance(value, str):
        try:
            read = parse_json(value)
        except ValueError:
            read = None
        if isinstance(read, dict | list):
            yield from _texts(read)
        else:
            yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def text_parts(content: Any, where: str) -> list[dict[str, str]]:
    """The parts of a content that is a list. BadInput for a part that is no text, named by its number from 0."""
    parts = []
    for index, part in enumerate(content):
        place = f"{where}[{index}]"
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = repr(part.get("type")) if isinstance(part, Mapping) else type(part).__name__
            raise BadInput(f'{place} is a part of the type {kind}: only {{"type": "text", "text": ...}} is read')
        parts.append({"type": "text", "text": checked_text(part.get("text"), f"{place}: text")})
    if not parts:
        raise BadInput(f"{where} is a list without a part: write a text in its place, or remove the message")
    return parts


def message_list(record: Record, name: str) -> tuple[Message, ...]:
    """The messages in a field. BadInput for an item that is no message, named by its number from 0."""
    value = record.fields[name]
    where = f"{record.where}: field {name!r}"
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        keys = '"from": ..., "value"' if name == "conversations" else '"role": ..., "content"'
        raise BadInput(f"{where} must be a list of {{{keys}: ...}}, not {value!r:.40}")
    given = name == "prompt"
    return tuple(_message(message, f"{record.where}: {name}[{index}]", given) for index, message in enumerate(value))


def not_learned(record: Record, name: str, first: int = 0) -> frozenset[int]:
    """Which messages of the assistant in a field that `message_list` reads are marked, by MARKS, as not to be learned:
    their numbers, from `first`. BadInput for a mark that is neither 0 nor 1, which false and true are too."""
    found = set()
    for index, message in enumerate(record.fields[name]):
        if SPEAKERS.get(message.get("role", message.get("from"))) != "assistant":
            continue
        marks = {mark: message[mark] for mark in MARKS if message.get(mark) is not None}
        for mark, value in marks.items():
            if value not in (0, 1):
                raise BadInput(
                    f"{record.where}: {name}[{index}]: {mark} is {value!r:.40}: only 0 (not learned) and 1 (learned) "
                    "are read: write one of them, or remove it"
                )
        if 0 in marks.values():
            found.add(first + index)
    return frozenset(found)


def template_variables(record: Record) -> dict[str, Any]:
    """A record's variables for the chat template: `tools`, a list of objects or that list in JSON, and the entries of
    `chat_template_kwargs`, an object. BadInput for values of any other kind."""
    where, fields = record
    variables = fields.get("chat_template_kwargs") or {}
    if not isinstance(variables, Mapping):
        raise BadInput(f"{where}: field 'chat_template_kwargs' must be an object, not {variables!r:.40}")
    variables = {name: value for name, value in variables.items() if value is not None}
    if own := sorted(variables.keys() & {"messages", "tools", "add_generation_prompt", "strftime_now"}):
        raise BadInput(f"{where}: field 'chat_template_kwargs' holds {own[0]!r}, which the template is given already")
    tools = fields.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = parse_json(tools)
        except ValueError:
            raise BadInput(
                f"{where}: field 'tools' is a string and no JSON: write a list of objects, or that list in JSON"
            ) from None
    if tools is not None and tools != "":  # an empty list is given too: a template may tell it from none
        if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
            raise BadInput(f"{where}: field 'tools' must be a list of objects, not {tools!r:.40}")
        variables["tools"] = tools
    _check_json(variables, f"{where}: what it has for the chat template")
    return variables


def refuse_lost(fields: Mapping[str, Any], names: Sequence[str], where: str, when: str = "") -> None:
    """BadInput for a field of `names` that is not empty: other programs train on it, and this one does not read it, or
    not `when`."""
    for name in names:
        if fields.get(name) and fields[name] != "[]":
            said = f"not read {when}".strip()
            raise BadInput(f"{where} has {name!r}, which is {said}: write it into the text, or remove it")


def refuse_answered(messages: Sequence[Mapping[str, Any]], what: str) -> None:
    """BadInput, which calls the messages `what`, where the assistant has spoken last: its reply would begin a second
    message of its own."""
    if messages[-1]["role"] == "assistant":
        raise BadInput(f"{what} ends with a message of the assistant: end it with what is to be answered")


def check_role(role: Any, where: str) -> None:
    """BadInput for a role that is none of ROLES: a template may leave out the message in silence."""
    if role not in ROLES:
        raise BadInput(f"{where} has the role {role!r}: choose from {', '.join(ROLES)}")


def _message(message: Any, where: str, given: bool) -> Message:
    if not isinstance(message, Mapping):
        raise BadInput(f'{where} must be {{"role": ..., "content": ...}}, not {message!r:.40}')
    is_shared = "role" not in message and ("from" in message or "value" in message)
    who, what = ("from", "value") if is_shared else ("role", "content")
    if who not in message:
        raise BadInput(no_field(where, who, message))
    role = message[who]
    if is_shared:
        if not isinstance(role, str) or role not in SPEAKERS:
            raise BadInput(f"{where} is from {role!r}: choose from {', '.join(SPEAKERS)}")
        if role == CALL:
            calls = _calls_in_json(message.get(what), f"{where}: {what}")
            message = {**message, what: "", "tool_calls": calls}
        role = SPEAKERS[role]
    check_role(role, where)
    refuse_lost(message, ("function_call",), where)
    read = {name: message[name] for name in KEYS if message.get(name) is not None}
    for name, value in read.items():
        if name == "tool_calls":
            _check_calls(value, role, f"{where}: {name}")
        else:
            checked_text(value, f"{where}: {name}")
    if message.get(what) is None and read.get("tool_calls"):
        return {"role": role, **read}
    if what not in message:
        raise BadInput(no_field(where, what, message))
    content = message[what]
    content = text_parts(content, f"{where}: {what}") if isinstance(content, list) else content
    said: Message = {"role": role, "content": content, **read}
    if not isinstance(content, list):
        checked_text(content, f"{where}: {what}")
    if role == "assistant" and not read.get("tool_calls") and not text_of(said).strip():
        if given:
            raise BadInput(f"{where}: the assistant says nothing: remove the message, or fill it in")
        raise BadInput(empty_response(where))
    return said


def empty_response(where: str) -> str:
    return f"{where}: the response is empty, so there is nothing to learn: remove the row, or fill it in"


def _check_calls(calls: Any, role: str, where: str) -> None:
    if not isinstance(calls, list):
        raise BadInput(f"{where} must be a list of objects, not {calls!r:.40}")
    if calls and role != "assistant":
        raise BadInput(f"{where}: only the assistant calls tools, and the role is {role!r}")
    for index, call in enumerate(calls):
        function = (call.get("function") or call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadInput(
                f'{where}[{index}] must be {{"type": "function", "function": {{"name": ..., "arguments": ...}}}}, not '
                f"{call!r:.40}"
            )
    _check_json(calls, where)


def _calls_in_json(value: Any, where: str) -> list[dict[str, Any]]:
    """The tool calls in a JSON string that holds one {"name": ..., "arguments": {...}} or a list of them."""
    try:
        calls = parse_json(checked_text(value, where))
    except ValueError:
        raise BadInput(f"{where} must be a call of a tool in JSON, not {value!r:.40}") from None
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _check_json(value: Any, where: str) -> None:
    """BadInput for what JSON cannot hold, such as the times of a Parquet file."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(f"{where} is no JSON: {error}") from None
    checked_text(text, where)
