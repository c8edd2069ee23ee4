"""Jinja's sandbox for chat templates, which are code by the authors of a model: within it a template reaches nothing
but its variables, and it keeps to limits that are set here.

- time: each call, filter, test and iteration of a loop is a step, and so is each character that `*` repeats. Steps are
  counted, and the clock is read with each count. That ends endless loops and recursions.
- memory: what an operator, a filter or a string method makes is counted too, and an upper bound of it is computed
  first: `"x" | center(1000000000)` is refused before it makes anything.

A template cannot be stopped within a step: the bound on what a step makes also bounds its time. Jinja folds constants
when it compiles, but no expressions that are counted here.
"""

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from string import Formatter
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, _PassArg
from jinja2.visitor import NodeTransformer

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


class _Dict:
    """What a template may do with Python's `dict`, and no more: a class leads to others."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _PlainNamespace(Namespace):
    """Jinja's, without names that begin with an underscore, which could hide Python's own attributes."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be among the names
        self, *given = args
        Namespace.__init__(self, _without_underscores(dict(*given, **kwargs)))

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, _without_underscores({name: value})[name])


def _without_underscores(names: dict[Any, Any]) -> dict[Any, Any]:
    for name in names:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace with the name {name!r} is unsafe: it begins with an underscore")
    return names


class _Spent(threading.local):
    """Steps and memory that a template has used so far. Thread-local: two threads may render the same template."""

    steps = 0
    made = 0
    deadline = 0.0


class Sandbox(ImmutableSandboxedEnvironment):
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
        self.globals |= {"dict": _Dict(), "namespace": _PlainNamespace}
        del self.globals["lipsum"]  # writes as much blind text as it is asked for, in one step

    def compiled(self, source: str) -> Template:
        """The template with its steps counted."""
        self.begin()
        return self.from_string(_Counting().visit(self.parse(source)))

    def written(self, template: Template, variables: Mapping[str, Any]) -> str:
        """The text that a template writes; SecurityError beyond the limits."""
        pieces: list[str] = []
        characters = 0
        self.begin()
        for piece in template.generate(variables):
            characters += len(piece)
            if characters > MAX_CHARACTERS:
                raise SecurityError(f"it writes more than {MAX_CHARACTERS:,} characters")
            pieces.append(piece)
        return "".join(pieces)

    def begin(self) -> None:
        """Count from nothing: a template is compiled, or begins to write."""
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
        if getattr(method, "__name__", None) in MAKE_BYTES:
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
PRODUCTS = frozenset(
    ("indent", "lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip", "tojson", "translate", "trim")
)
"""What takes time or makes a text as the product of the lengths of a text and of an argument."""
MAKE_BYTES = frozenset(("encode", "to_bytes"))
"""Methods that make bytes, of which nothing would be counted."""
FIELD = {"%": "%", "format": "{", "format_map": "{"}
WIDTHS = {"%": re.compile(r"[%)][^%a-zA-Z]*(\*|\d{5})"), "{": re.compile(r"\{|\d{5}")}
"""Finds a width of five digits or more, or one that is itself an argument: in a text for `%`, behind the sign or the
name in parentheses, and in what follows the colon of a field for `format`."""


def _sandbox_of(context: Context) -> Sandbox:
    assert isinstance(context.environment, Sandbox)
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
        return WIDTHS["%"].search(text) is not None
    return any(spec and WIDTHS["{"].search(spec) for _, _, spec, _ in Formatter().parse(text))


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
