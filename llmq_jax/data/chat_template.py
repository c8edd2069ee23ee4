"""Chat templates: a conversation as the text that a model was trained on, by the Jinja template that comes with it.

The text is the one that transformers' `apply_chat_template` gives. A template is a program by whoever made the model,
so it runs in Jinja's sandbox, and its work is counted: each call and each turn of a loop is a step, each character that
`*` repeats is another, and neither steps nor output may exceed a bound. That ends loops and recursions that would go on
for ever. It does not bound the memory of a single expression: a template that asks for a gigabyte of blanks gets it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from llmq_jax.errors import BadInput

MAX_STEPS = 10**6
MAX_CHARACTERS = 2**24


class ChatTemplate:
    """A compiled template, with `special_tokens` ({"bos_token": "<s>", ...}) as variables. BadInput: it is no Jinja."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None):
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self._sandbox = _Sandbox()
        try:
            tree = self._sandbox.parse(source)
            for loop in tree.find_all(nodes.For):
                position = {"lineno": loop.lineno, "environment": self._sandbox}
                loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, **position)
            self._template = self._sandbox.from_string(tree)
        except TemplateSyntaxError as error:
            raise BadInput(f"the chat template is not valid Jinja: line {error.lineno}: {_one_line(error)}") from error
        except Exception as error:  # Jinja folds constants as it compiles, and nests as deep as the template does
            raise BadInput(f"the chat template cannot be compiled: {_one_line(error)}") from error

    def render(self, messages: Any, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of a conversation: messages {"role": ..., "content": ...}, whose other keys are the template's too.

        add_generation_prompt: end with the beginning of the assistant's answer. `variables` are what else the template
        reads, such as `tools`. To tokenize the text: `encode(text, allow_special=True)`, which adds no second beginning
        token. BadInput: messages of another form, and whatever the template raises.
        """
        given = {
            **self.special_tokens,
            # Templates ask whether these are none, and some whether they are defined.
            "tools": None,
            "documents": None,
            **variables,
            "messages": _checked(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        pieces: list[str] = []
        characters = self._sandbox.steps = 0
        try:
            for piece in self._template.generate(given):
                characters += len(piece)
                if characters > MAX_CHARACTERS:
                    raise SecurityError(f"it writes more than {MAX_CHARACTERS:,} characters")
                pieces.append(piece)
        except Exception as error:  # templates can raise anything
            raise BadInput(f"the chat template refused these messages: {_one_line(error)}") from error
        return "".join(pieces)


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the assistant says; the text is that without the marks."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers, because it decides the scope of variables that are set in it.
        return nodes.CallBlock(self.call_method("_text"), [], [], body, lineno=line)

    def _text(self, caller: Macro) -> str:
        return caller()


class _Sandbox(ImmutableSandboxedEnvironment):
    """What templates may use, as transformers has it, and the count of their steps."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.steps = 0
        self.filters |= {"tojson": _to_json, "counted": _counted}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        del self.globals["lipsum"]  # writes as much blind text as it is asked for, in one step

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS:,} steps")

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.spend(1)
        return super().call(context, called, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("** is not allowed")
        for repeated, times in ((left, right), (right, left)):
            if isinstance(repeated, str | list | tuple) and isinstance(times, int):
                self.spend(len(repeated) * max(times, 0))
        return super().call_binop(context, operator, left, right)


@pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        context.environment.spend(1)
        yield item


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape what HTML reserves."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _checked(messages: Any) -> list[dict[str, Any]]:
    """Messages without their empty (None) keys, which transformers drops too."""
    if not isinstance(messages, list | tuple):
        raise BadInput(f'messages must be a list of {{"role": ..., "content": ...}}, not {type(messages).__name__}')
    if not messages:
        raise BadInput("messages are empty; give at least one")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise BadInput(f'messages[{index}] must be {{"role": ..., "content": ...}}, not {type(message).__name__}')
        for key in ("role", "content"):
            if key not in message:
                raise BadInput(f"messages[{index}] has no {key!r}; its keys are {', '.join(map(repr, message))}")
            if not isinstance(message[key], str):
                raise BadInput(f"messages[{index}][{key!r}] must be text, not {type(message[key]).__name__}")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
