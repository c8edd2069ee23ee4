"""Chat templates: a conversation as the text that a model was trained on, by the Jinja template that comes with it.

The text is the one that transformers' `apply_chat_template` gives. A template is code by the authors of the model, so
it runs in Jinja's sandbox, where it reaches nothing but its variables, and within limits that are set here:

- time: each call, filter, test and iteration of a loop is a step, and so is each character that `*` repeats. Steps are
  counted, and the clock is read with each count. That ends endless loops and recursions.
- memory: what an operator, a filter or a string method makes is counted too, and an upper bound of it is computed
  first: `"x" | center(1000000000)` is refused before it makes anything.

A template cannot be stopped within a step: the bound on what a step makes also bounds its time. Jinja folds constants
when it compiles, but no expressions that are counted here.
"""

import contextlib
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from string import Formatter
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, _PassArg
from jinja2.visitor import NodeTransformer

from llmq_jax.data.messages import REASONING, reasoning_of, text_of, text_parts
from llmq_jax.data.records import read_text
from llmq_jax.errors import BadInput, did_you_mean
from llmq_jax.json_text import parse_json

MAX_STEPS = 10**6
MAX_CHARACTERS = 2**24
"""The longest text that a template may write."""
MAX_MADE = 2**27
"""The most characters in all intermediate values together, and in any one value before it is made."""
ITEM = 256
"""How many characters a value that is no string counts as."""
MAX_SECONDS = 20.0
MAX_DEPTH = 100
"""How deeply values may be nested."""
MAX_BITS = 2**14
"""The most bits of an integer."""


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
        self._sandbox = _Sandbox()
        try:
            self._sandbox.begin()
            self._template = self._sandbox.from_string(_Counting().visit(self._sandbox.parse(source)))
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
        parts: Any = [{"type": "text", "text": text, "unread": unread} for text in (first, last)]
        asked = [{"role": "user", "content": "a"}]
        found = set()
        for role, before, after in (("system", [], asked), ("user", [], []), ("assistant", asked, asked)):
            with contextlib.suppress(BadInput):
                messages = [*before, {"role": role, "content": parts}, *after]
                text = self._written(messages, add_generation_prompt=True)
                if first in text and last in text and unread not in text:
                    found.add(role)
        return found

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
        pieces: list[str] = []
        characters = 0
        self._sandbox.begin()
        try:
            for piece in self._template.generate(given):
                characters += len(piece)
                if characters > MAX_CHARACTERS:
                    raise SecurityError(f"it writes more than {MAX_CHARACTERS:,} characters")
                pieces.append(piece)
        except Exception as error:  # templates can raise anything
            raise BadInput(f"the chat template refused these messages: {_one_line(error)}") from error
        return "".join(pieces)


def read_chat_template(path: str | Path) -> str:
    """The source of a template in a file of its own. BadInput, which names the file: it is empty, or no valid Jinja."""
    source = read_text(path)
    if not source.strip():
        raise BadInput(f"{path}: the chat template is empty")
    try:
        ChatTemplate(source)
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
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


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the assistant says. The marks are ignored."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers, because it decides the scope of variables that are set in it.
        return nodes.CallBlock(self.call_method("_text"), [], [], body, lineno=line)

    def _text(self, caller: Macro) -> str:
        return caller()


class _Counting(NodeTransformer):
    """Wraps in filters, which count, whatever Jinja would compile to plain Python that the sandbox does not see."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered("counted", node.iter)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        self.generic_visit(node)
        node.nodes = [
            child if isinstance(child, nodes.TemplateData) else _filtered("shown", child) for child in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered("concatenated", nodes.List(node.nodes, lineno=node.lineno, environment=node.environment))

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered("made", node)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered("made", node) if node.ctx == "load" else node


def _filtered(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)


class _Spent(threading.local):
    """Steps and memory that a template has used so far. Thread-local: two threads may render the same template."""

    steps = 0
    made = 0
    deadline = 0.0


class _Sandbox(ImmutableSandboxedEnvironment):
    """What templates may use, as in transformers, and the count of what they use up."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.spent = _Spent()
        self.filters |= {"tojson": _to_json}
        for name in WEB_FILTERS:
            del self.filters[name]
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}
        self.tests = {name: _stepwise(function) for name, function in self.tests.items()}
        self.filters |= {"counted": _counted, "shown": _shown, "concatenated": _concatenated, "made": _made}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        del self.globals["lipsum"]  # writes as much blind text as it is asked for, in one step

    def begin(self) -> None:
        self.spent.steps = self.spent.made = 0
        self.spent.deadline = time.monotonic() + MAX_SECONDS

    def spend(self, steps: int) -> None:
        self.spent.steps += steps
        if self.spent.steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS:,} steps")
        if time.monotonic() > self.spent.deadline:
            raise SecurityError(f"it takes more than {MAX_SECONDS:g} seconds")

    def make(self, value: Any) -> Any:
        """Count a value, and return it."""
        if isinstance(value, str | list | tuple | dict | Namespace):
            size = _size(value)
            self.spent.made += size if isinstance(value, str | Namespace) else 8 * len(value)
            if self.spent.made > MAX_MADE:
                raise SecurityError(f"it makes values of more than {MAX_MADE:,} characters in all")
        elif isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise SecurityError(f"it makes an integer of more than {MAX_BITS:,} bits")
        return value

    def call(self, context: Context, called: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.spend(1)
        method = getattr(called, "__wrapped__", called)  # the sandbox's own version of str.format
        if getattr(method, "__name__", None) in NOT_COUNTED:
            raise SecurityError(f"{method.__name__} is not allowed")
        if isinstance(text := getattr(method, "__self__", None), str):
            args = _without_iterators(args)
            _check_bound(method.__name__, (text, *args, *kwargs.values()))
            return self.make(super().call(context, called, *args, **kwargs))
        value = super().call(context, called, *args, **kwargs)
        return self.make(value) if isinstance(value, dict | Namespace) else value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("** is not allowed")
        for repeated, times in ((left, right), (right, left)) if operator == "*" else ():
            if isinstance(repeated, str | list | tuple) and isinstance(times, int):
                self.spend(len(repeated) * max(times, 0))
        if operator == "%" and isinstance(left, str):
            _check_bound("%", (left, right))
        return self.make(super().call_binop(context, operator, left, right))


WEB_FILTERS = ("urlize", "xmlattr", "striptags", "pprint", "slice", "batch", "wordwrap", "filesizeformat")
"""Made for web pages and of no use in a chat; some search texts in more than linear time."""
_CHEAP = """
    abs attr count counted d default dictsort first float int items last length list map random reject rejectattr
    reverse round select selectattr
"""
CHEAP_FILTERS = frozenset(_CHEAP.split())
"""Filters that make no text, so that no bound of what they make need be computed."""
_PRODUCTS = "indent lstrip rfind rindex rpartition rsplit rstrip strip tojson translate trim"
PRODUCTS = frozenset(_PRODUCTS.split())
"""What takes time or makes a text as the product of the lengths of a text and of an argument."""
NOT_COUNTED = frozenset(("encode", "to_bytes"))
"""Methods that make bytes, of which nothing would be counted."""
FIELD = {"%": "%", "format": "{", "format_map": "{"}
WIDE = {"%": re.compile(r"%[^%a-zA-Z]*(\*|\d{5})"), "%(": re.compile(r"\*|\d{5}"), "{": re.compile(r"\{|\d{5}")}
"""Finds a width of five digits or more, or one that is itself an argument: in a text for `%`, in one whose fields have
names in parentheses, which may hold anything, and in what follows the colon of a field for `format`."""


def _sandbox_of(context: Context) -> _Sandbox:
    assert isinstance(context.environment, _Sandbox)
    return context.environment


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter with its result counted, and refused beforehand if it could be too large."""
    first = _PassArg.from_obj(function)

    @pass_context  # also keeps Jinja from calling it as it compiles
    def bounded(context: Context, *args: Any, **kwargs: Any) -> Any:
        sandbox = _sandbox_of(context)
        sandbox.spend(1)
        if name not in CHEAP_FILTERS:
            args = _without_iterators(args)
            _check_bound("%" if name == "format" else name, (*args, *kwargs.values()))
        passed: Mapping[Any, Any] = {_PassArg.context: context, _PassArg.eval_context: context.eval_ctx}
        value = function(*args, **kwargs) if first is None else function(passed.get(first, sandbox), *args, **kwargs)
        return sandbox.make(value) if name not in CHEAP_FILTERS or name in ("int", "list") else value

    return bounded


def _stepwise(function: Any) -> Callable[..., Any]:
    """The test as a step: `select` makes it of every item."""
    first = _PassArg.from_obj(function)

    @pass_context
    def stepwise(context: Context, *args: Any, **kwargs: Any) -> Any:
        sandbox = _sandbox_of(context)
        sandbox.spend(1)
        return function(*args, **kwargs) if first is None else function(sandbox, *args, **kwargs)

    return stepwise


def _without_iterators(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values with iterators as lists, whose size is known."""
    return tuple(list(value) if isinstance(value, Iterator) else value for value in values)


def _check_bound(name: str, operands: tuple[Any, ...]) -> None:
    """Refuse an operation that could make too long a text from these operands."""
    bound, text = sum(map(_size, operands)), operands[0]
    if name == "replace" and len(operands) > 2 and all(isinstance(operand, str) for operand in operands[:3]):
        bound += text.count(operands[1]) * len(operands[2])
    elif name == "join":
        # The separator and the items, in either order: | join and str.join differ.
        bound += math.prod(len(operand) for operand in operands[:2] if isinstance(operand, str | list | tuple | dict))
    elif name in FIELD:
        if isinstance(text, str) and _has_wide_field(name, text):
            raise SecurityError("a format with such a width is not allowed")
        bound += 10_000 * str(text).count(FIELD[name]) + str(text).count(FIELD[name]) * bound
    else:
        bound *= max((abs(width) for width in operands[1:] if isinstance(width, int)), default=1) or 1
        if name in PRODUCTS:
            bound = max(bound, _size(text) * max(map(_longest, operands[1:]), default=0))
    if bound > MAX_MADE:
        raise SecurityError(f"{name} could make more than {MAX_MADE:,} characters or comparisons")


def _has_wide_field(name: str, text: str) -> bool:
    if name == "%":
        return WIDE["%(" if "%(" in text else "%"].search(text) is not None
    return any(spec and WIDE["{"].search(spec) for _, _, spec, _ in Formatter().parse(text))


def _longest(value: Any) -> int:
    """The length of the longest text in a value."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        return max(map(_longest, value), default=0)
    return len(value) if isinstance(value, str) else 0


def _size(value: Any) -> int:
    """About how many characters a value takes, as text and in memory. A value that is nested in several places counts
    in each. Refuses more than MAX_MADE characters and nesting beyond MAX_DEPTH."""
    if isinstance(value, str):
        return len(value)
    size, inside = 0, [iter((value,))]
    while inside:
        for item in inside[-1]:
            size += len(item) if isinstance(item, str) else ITEM
            if isinstance(item, Namespace):
                item = item._Namespace__attrs
            if isinstance(item, list | tuple | dict) and item:
                inside.append(iter((*item, *item.values()) if isinstance(item, dict) else item))
                break
        else:
            inside.pop()
        if size > MAX_MADE:
            raise SecurityError(f"it makes values of more than {MAX_MADE:,} characters")
        if len(inside) > MAX_DEPTH:
            raise SecurityError(f"it makes values within one another, more than {MAX_DEPTH} deep")
    return size


@pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _sandbox_of(context).spend(1)
        yield item


@pass_context
def _shown(context: Context, value: Any) -> Any:
    """A value that is about to be written; refused if it is too large."""
    _size(value)
    return value


@pass_context
def _concatenated(context: Context, values: list[Any]) -> str:
    sandbox = _sandbox_of(context)
    sandbox.spend(1)
    return str(sandbox.make("".join(str(_shown(context, value)) for value in values)))


@pass_context
def _made(context: Context, value: Any) -> Any:
    return _sandbox_of(context).make(value)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """In place of Jinja's own filter, which escapes HTML's reserved characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


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
    return [
        _with_reasoning({key: value for key, value in message.items() if value is not None}) for message in messages
    ]


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under both names that templates read, as in transformers."""
    reasoning = reasoning_of(message)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
