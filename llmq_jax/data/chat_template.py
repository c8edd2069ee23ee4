"""Chat templates: a conversation as the text that a model was trained on, by the Jinja template that comes with it.

The text is the one that transformers' `apply_chat_template` gives. A template is code by the authors of the model, so
it runs in the sandbox of template_sandbox.py, where it reaches nothing but its variables, and within limits.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError, meta, nodes

from llmq_jax.data.messages import REASONING, check_role, reasoning_of, text_of, text_parts
from llmq_jax.data.records import read_text
from llmq_jax.data.template_sandbox import Sandbox
from llmq_jax.errors import BadInput, at_place, did_you_mean
from llmq_jax.json_text import parse_json

NOT_READ = "the chat template has no place{} for {!r}: use another template, or remove it"
ABSENT = ("tools", "documents")
"""Variables that are None unless given: some templates test whether they are none, some whether they are defined."""


class ChatTemplate:
    """A compiled template, with `special_tokens` ({"bos_token": "<s>", ...}) as variables. Where tools are given, the
    template `tool_use`, if there is one, takes its place. BadInput: it is not valid Jinja."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None, tool_use: str | None = None):
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self._tool_use = tool_use
        self._sandbox = Sandbox()
        try:
            self._template = self._sandbox.compiled(source)
        except TemplateSyntaxError as error:
            raise BadInput(f"the chat template is not valid Jinja: line {error.lineno}: {_one_line(error)}") from error
        except Exception as error:  # constants that Jinja folds can raise anything, deep nesting RecursionError
            raise BadInput(f"the chat template cannot be compiled: {_one_line(error)}") from error

    @cached_property
    def tool_use(self) -> "ChatTemplate | None":
        """The template for when tools are given, compiled on first use; None where there is none."""
        return None if self._tool_use is None else ChatTemplate(self._tool_use, self.special_tokens)

    def variables(self) -> list[str]:
        """The variables that it reads beside the conversation and the special tokens, such as `enable_thinking`."""
        given = {"messages", "add_generation_prompt", *ABSENT, *self.special_tokens}
        return sorted(self._undeclared - given)

    def reads(self, name: str) -> bool:
        """Whether it reads a variable, such as `tools`, or a key of messages, such as `tool_calls`."""
        return name in self._undeclared or name in self._keys

    def refuse_unread(self, messages: Iterable[Mapping[str, Any]], variables: Mapping[str, Any]) -> None:
        """BadInput for a variable, or a message's tool calls or reasoning, that the template does not read."""
        reads = self._with(variables).reads
        for name, value in variables.items():
            if value and not reads(name):
                raise BadInput(NOT_READ.format("", name))
        for index, message in enumerate(messages):
            for name in ("tool_calls", *REASONING):
                read = any(map(reads, REASONING if name in REASONING else (name,)))
                if message.get(name) and not read:
                    raise BadInput(NOT_READ.format(f" in messages[{index}]", name))

    @cached_property
    def _undeclared(self) -> set[str]:
        return meta.find_undeclared_variables(self._sandbox.parse(self.source))

    @cached_property
    def _keys(self) -> set[str]:
        """All attribute names and constants in its code: every key that it reads is among them."""
        tree = self._sandbox.parse(self.source)
        attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
        return attributes | {str(node.value) for node in tree.find_all(nodes.Const)}

    @cached_property
    def takes_parts(self) -> set[str]:
        """The roles for which it writes the texts, and nothing else, of a content that is a list of parts."""
        first, last, unread = (f"{word}-by-the-probe" for word in ("first", "last", "unread"))
        parts = [{"type": "text", "text": text, "unread": unread} for text in (first, last)]
        written = self._probed(parts)
        return {role for role, text in written.items() if first in text and last in text and unread not in text}

    @cached_property
    def takes_only_parts(self) -> set[str]:
        """Those of `takes_parts` for which it does not write a content that is a text, as templates that show images
        may."""
        word = "text-by-the-probe"
        return self.takes_parts - {role for role, text in self._probed(word).items() if word in text}

    def _probed(self, content: Any) -> dict[str, str]:
        """{role: the text of a conversation in which it has this content}, of the roles that it does not refuse."""
        asked: list[dict[str, Any]] = [{"role": "user", "content": "a"}]
        before: dict[str, list[dict[str, Any]]] = {"system": [], "developer": [], "user": [], "assistant": asked}
        written = {}
        for role, first in before.items():
            with contextlib.suppress(BadInput):
                messages = [*first, {"role": role, "content": content}, *(asked if role != "user" else [])]
                written[role] = self._written(messages, add_generation_prompt=True)
        return written

    def with_variables(self, values: Mapping[str, Any]) -> str:
        """The source of this template with these values as defaults of these variables.

        The defaults are part of the template and go where it goes: to `llmq chat`, to exports, to transformers.
        BadInput: it reads no such variable, or a value is no string, finite number or truth value.
        """
        known = self.variables()
        for name, value in values.items():
            if name not in known:
                advice = did_you_mean(name, known) if known else "it reads none at all"
                raise BadInput(f"the chat template reads no variable {name!r}; {advice}")
            if not isinstance(value, str | bool | int | float) or value in (math.inf, -math.inf) or value != value:
                raise BadInput(f"the chat template's variable {name!r} must be text, a number, true or false")
        # JSON's strings, numbers, true and false are valid Jinja. `trim_blocks`, which is on wherever chat templates
        # are rendered, removes the line breaks.
        texts = ((name, json.dumps(value, ensure_ascii=False)) for name, value in values.items())
        lines = (f"{{% if {name} is not defined %}}{{% set {name} = {text} %}}{{% endif %}}\n" for name, text in texts)
        return "".join(lines) + self.source

    def render(self, messages: Any, /, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of a conversation: messages as messages.py describes them. The template sees all their keys.

        A content that is a list of parts stays a list if the template reads such lists, else it becomes one text.
        add_generation_prompt: end with the beginning of the assistant's answer. `variables` are what else the template
        reads, such as `tools`. To tokenize the text: `encode(text, allow_special=True)`, which adds no second beginning
        token. BadInput: messages of another form, and whatever the template raises. What the template does not read is
        left out, as in transformers; `refuse_unread` refuses it.
        """
        template = self._with(variables)
        checked = _checked(messages)
        checked = [
            message | {"content": text_of(message)}
            if isinstance(message.get("content"), list) and message["role"] not in template.takes_parts
            else message
            for message in checked
        ]
        return template._written(checked, add_generation_prompt=add_generation_prompt, **variables)

    def _with(self, variables: Mapping[str, Any]) -> "ChatTemplate":
        return self if variables.get("tools") is None else self.tool_use or self

    def _written(self, messages: list[dict[str, Any]], /, **variables: Any) -> str:
        given = {**self.special_tokens, **dict.fromkeys(ABSENT), **variables, "messages": messages}
        try:
            return self._sandbox.written(self._template, given)
        except Exception as error:  # templates can raise anything
            raise BadInput(f"the chat template refused these messages: {_one_line(error)}") from error


def read_chat_template(path: str | Path) -> str:
    """The source of a template in a file of its own. BadInput, which names the file: it is empty, or no valid Jinja."""
    source = read_text(path)
    if not source.strip():
        raise BadInput(f"{path}: the chat template is empty")
    with at_place(path):
        ChatTemplate(source)
    return source


def parse_variables(text: str, option: str) -> dict[str, Any]:
    """A template's variables from the JSON of an `option`: {"enable_thinking": false}. BadInput: it is no object, or
    empty."""
    try:
        values = parse_json(text)
    except ValueError:
        values = None
    if not isinstance(values, dict) or not values:
        raise BadInput(f"{option} {text!r:.60} is no object in JSON; write '{{\"enable_thinking\": false}}'")
    return values


def _checked(messages: Any) -> list[dict[str, Any]]:
    """The messages, checked, without keys that are None, which transformers drops too."""
    if not isinstance(messages, list | tuple):
        raise BadInput(f'messages must be a list of {{"role": ..., "content": ...}}, not {type(messages).__name__}')
    if not messages:
        raise BadInput("messages are empty; give at least one")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise BadInput(f'messages[{index}] must be {{"role": ..., "content": ...}}, not {type(message).__name__}')
        place = f"messages[{index}]"
        only_calls = message.get("content") is None and message.get("tool_calls")
        for key in ("role",) if only_calls else ("role", "content"):
            if key not in message:
                raise BadInput(f"{place} has no {key!r}; its keys are {', '.join(map(repr, message))}")
            if key == "content" and isinstance(message[key], list):
                text_parts(message[key], f"{place}[{key!r}]")
            elif not isinstance(message[key], str):
                raise BadInput(f"{place}[{key!r}] must be text, not {type(message[key]).__name__}")
        check_role(message["role"], place)
    return [
        _with_reasoning({key: value for key, value in message.items() if value is not None}) for message in messages
    ]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under both names that templates read, as in transformers."""
    reasoning = reasoning_of(message)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
