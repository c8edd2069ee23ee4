"""Options of a command from a YAML file, laid under those of the command line.

    data: lyrics.txt
    learning_rate: 3e-4
    betas: [0.9, 0.99]
    separate_documents: true

A value is the text that would follow the option on the command line. YAML's own reading of it is not used: that takes
10:15 for the number 615, and 3e-4 for text. JSON is YAML too.
"""

import re
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from llmq_jax.errors import BadInput
from llmq_jax.option_names import meant_by
from llmq_jax.options import option_name

YAMLS_OWN = re.compile(r"tag:yaml\.org,2002:\w+")
NULL, BOOL = "tag:yaml.org,2002:null", "tag:yaml.org,2002:bool"
NUMBER = re.compile(r"-[\d.][\w.+-]*")
TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")


def read_options(path: str, kinds: dict[str, Any], given: Iterable[str]) -> dict[str, list[str]]:
    """{field: arguments that give its option} of a file, without the fields of `given` and those that are null.

    `kinds` are the annotations of the command's fields. BadInput, with the line: not YAML, no such option, an option
    that occurs twice, or a value of another shape.
    """
    found: dict[str, list[str]] = {}
    for key, value in _entries(path):
        where = f"{path}: line {key.start_mark.line + 1}"
        name = _text(key, where).replace("-", "_")
        if name not in kinds:
            hint = meant_by(name, kinds, _as_key) or "--help tells which there are"
            raise BadInput(f"{where}: there is no option {name!r}; {hint}")
        if name in found:
            raise BadInput(f"{where}: {name} stands there a second time; leave one of them out")
        found[name] = list(_arguments(name, value, kinds[name], where))
    return {name: arguments for name, arguments in found.items() if arguments and name not in given}


def _as_key(field: str, value: str = "") -> str:
    return f"{field}: {value}" if value else field


def _entries(path: str) -> list[tuple[Any, Any]]:
    """The pairs of the file's one mapping, as YAML's nodes."""
    text = Path(path).read_bytes()
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f": line {mark.line + 1}" if mark else ""
        fault = getattr(error, "problem", None) or getattr(error, "reason", None) or "nested too deeply"
        raise BadInput(f"{path}{line}: not YAML ({fault}); write options as batch_size: 8, one in a line") from None
    if not isinstance(root, yaml.MappingNode):
        raise BadInput(f"{path}: holds no options; write them as batch_size: 8, one in a line")
    entries: list[tuple[Any, Any]] = root.value
    return entries


def _arguments(name: str, node: Any, kind: Any, where: str) -> Iterator[str]:
    option = option_name(name)
    if node.tag == NULL and node.value.lower() in ("", "~", "null"):
        return
    bare, of_option = typing.get_args(kind)[:2] if typing.get_origin(kind) is typing.Annotated else (kind, None)
    if bare is bool:
        if node.tag != BOOL or node.value.lower() not in TRUE + FALSE:
            raise BadInput(f"{where}: {name} must be true or false")
        if node.value.lower() in TRUE:
            yield option
        elif of_option is None:  # one that is on unless it is switched off
            yield option.replace("--", "--no-", 1)
    elif isinstance(node, yaml.SequenceNode):
        if tuple not in {typing.get_origin(part) for part in (bare, *typing.get_args(bare))}:
            raise BadInput(f"{where}: {name} takes one value, not a list")
        yield option
        for text in (_text(item, where) for item in node.value):
            if text.startswith("-") and not NUMBER.fullmatch(text):
                raise BadInput(f"{where}: {text!r} in {name} would be an option of its own; write no hyphen before it")
            yield text
    else:
        yield f"{option}={_text(node, where)}"


def _text(node: Any, where: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise BadInput(f"{where}: a mapping or a list stands where a value is meant; write the value alone")
    if not YAMLS_OWN.fullmatch(node.tag):
        raise BadInput(f"{where}: the tag {node.tag!r} has no meaning here; leave it out")
    return str(node.value)
