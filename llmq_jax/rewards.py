r"""Rewards that a rule can compute, for reinforcement learning without a reward model.

A reward function is called as `f(prompts=..., completions=..., **columns)`, all of them lists with one entry per
completion; `columns` are those of the data, by name: a function names what it needs and leaves the others to `**_`. It
returns a list of numbers, with None where it has no reward for a completion. TRL's functions of texts have the same
form.
"""

import copy
import functools
import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from llmq_jax.counts import counted
from llmq_jax.errors import BadInput, close_names, did_you_mean
from llmq_jax.field_types import scalar

RewardFunction = Callable[..., Sequence[float | None]]

FAULTS = (Exception, SystemExit)
"""What a user's code may raise for which it is named; `sys.exit` too would end the run without a word."""

# ---------------------------------------------------------------------------------------------------------------------
# The right number

# A minus after a word, a number or a bracket is no sign ("7-3", "step-3"); a comma separates thousands or numbers.
_SIGN = r"(?:(?<![\w)])[-+−])?"
_NUMBER = (
    _SIGN + r"\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE][-+]?\d{1,2}(?!\w))?"  # 1.5e3
)
# 3/4, which is no date (3/4/2020), and LaTeX's form of it.
_VALUE = rf"{_SIGN}\\[dt]?frac{{{_NUMBER}}}{{{_NUMBER}}}|(?<![/\d.]){_NUMBER}/{_NUMBER}(?![/\d])|{_NUMBER}"
# Braces in \boxed{} may be nested once; "####" is a heading where no number follows.
_GIVEN = r"<answer>([\s\S]*?)</answer>|\\boxed{((?:[^{}]|{[^{}]*})*)}"
_MARKED = re.compile(rf"####\W{{0,20}}?({_VALUE})|{_GIVEN}", re.ASCII)
_TITLE = re.compile(r"\.[ \t]+[A-Za-z]")
_NUMBERS, _VALUES = re.compile(_NUMBER, re.ASCII), re.compile(_VALUE, re.ASCII)
# LaTeX's separators of thousands, and powers of units.
_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\,)(?=\d{3})", re.ASCII)
_POWER = re.compile(r"(?<=[A-Za-z}])\^(?:\d+|\{-?\d+\})", re.ASCII)


def numeric_answer(
    prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any], **_: Any
) -> list[float | None]:
    r"""1 where the completion's final number is that of the column `answer`, else 0; None where that holds no number.

    The final number of a text is the last one in its last mark: "#### 1,234" (the form of GSM8K, whose `answer` ends
    so), <answer>...</answer> or \boxed{...}; a mark without a number is no answer. The final number of a text without
    marks is its last number. Thousands' commas, $, %, a leading +, a trailing dot and powers of units (m^2) do not
    matter; 3.0 is 3, 1.5e3 is 1500, and 3/4 and \frac{3}{4} are 0.75.
    """
    rewards = []
    for completion, reference in zip(completions, answer, strict=True):
        expected = None if reference is None else final_number(str(reference))
        rewards.append(None if expected is None else float(final_number(completion) == expected))
    return rewards


def final_number(text: str) -> Fraction | None:
    """The final number of a text, as `numeric_answer` defines it; None where there is none."""
    text = _THOUSANDS.sub(",", text)
    region = _region(text)
    values = _VALUES.findall(_POWER.sub("", region)) or _VALUES.findall(region)
    return _exact(values[-1]) if values else None


def _region(text: str) -> str:
    """The part of a text that its last mark marks; the whole text where it has no mark. A numbered heading
    ("#### 1. First") is no mark."""
    headings, region = 0, text
    for mark in _MARKED.finditer(text):
        if mark[1] is not None and mark[1] == str(headings + 1) and _TITLE.match(text, mark.end()):
            headings += 1
        else:
            region = mark[mark.lastindex or 0]
    return region


def _exact(value: str) -> Fraction | None:
    plain = value.replace(",", "").replace("$", "").replace("−", "-")
    # By way of Decimal, which keeps all digits.
    numbers = [Fraction(Decimal(number)) for number in _NUMBERS.findall(plain)]
    if len(numbers) == 1:
        return numbers[0]
    numerator, denominator = numbers
    sign = -1 if plain.startswith("-\\") else 1
    return sign * numerator / denominator if denominator else None


# ---------------------------------------------------------------------------------------------------------------------
# The very answer


def exact_answer(
    prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any], **_: Any
) -> list[float | None]:
    r"""1 where the completion's final answer is the text of the column `answer`, else 0; None where that is empty.

    The final answer is what stands in the last <answer>...</answer> or \boxed{...}; without them it is the last line
    that is not blank, without the "####" that may begin it. Thoughts, up to </think>, do not count. White space around
    an answer does not matter, all else does: "B" is neither "b" nor "(B)" nor "B.", so that the prompt should say which
    form is wanted. A reference that is a number is the text that Python writes for it.
    """
    rewards = []
    for completion, reference in zip(completions, answer, strict=True):
        expected = "" if reference is None else str(reference).strip()
        rewards.append(float(final_answer(completion) == expected) if expected else None)
    return rewards


def final_answer(text: str) -> str:
    """The final answer of a text, as `exact_answer` defines it; "" where there is none."""
    text = text.rpartition(_TAGS[1])[2].strip()
    marks = [mark[mark.lastindex or 0] for mark in re.finditer(_GIVEN, text)]
    if marks:
        return str(marks[-1]).strip()
    return text.rpartition("\n")[2].strip().removeprefix("####").strip()


# ---------------------------------------------------------------------------------------------------------------------
# The form

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def think_answer_format(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float]:
    """How far a completion has the form <think>...</think><answer>...</answer>, from 0 to 1 in eighths:

    1/8 for each of the four tags that occurs exactly once; 1/4 if all four do, in this order; and then 1/4 if nothing
    but white space stands before, between and after the two parts. Where a prompt ends with <think>, as some chat
    templates have it, the completion goes on from there.
    """
    return [_format(_opened(prompt) + text) for prompt, text in zip(prompts, completions, strict=True)]


def think_format(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float]:
    """1 for a completion of the form <think>...</think> and an answer, which may be empty, else 0: it begins with
    <think>, which does not come again, and has </think> somewhere after it. TRL's `think_format_reward`; where a prompt
    ends with <think>, the completion goes on from there, which TRL does not know."""
    texts = [_opened(prompt) + text for prompt, text in zip(prompts, completions, strict=True)]
    begin, end = _TAGS[:2]
    return [float(text.startswith(begin) and text.count(begin) == 1 and end in text) for text in texts]


def _opened(prompt: Any) -> str:
    return _TAGS[0] if isinstance(prompt, str) and prompt.rstrip().endswith(_TAGS[0]) else ""


def _format(text: str) -> float:
    once = sum(text.count(tag) == 1 for tag in _TAGS) / 8
    places = [text.find(tag) for tag in _TAGS]
    if once < 1 / 2 or places != sorted(places):
        return once
    think, end_think, answer, end_answer = places
    outside = text[:think] + text[end_think + len(_TAGS[1]) : answer] + text[end_answer + len(_TAGS[3]) :]
    return once + (1 / 4 if outside.strip() else 1 / 2)


# ---------------------------------------------------------------------------------------------------------------------
# The length


def length(most: int) -> RewardFunction:
    """A reward function: 1 for completions of up to `most` characters, from there falling linearly to 0 at twice as
    many. The soft punishment of overlong answers of DAPO (arXiv:2503.14476, eq. 13), one higher and in characters."""
    if most < 1:
        raise BadInput(f"a reward for completions of at most {most} characters makes no sense; give 1 or more")

    def length_reward(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float]:
        return [min(1.0, max(0.0, 2 - len(completion) / most)) for completion in completions]

    return length_reward


# ---------------------------------------------------------------------------------------------------------------------
# By name

_BUILT_IN: dict[str, RewardFunction] = {
    "answer": numeric_answer,
    "exact": exact_answer,
    "format": think_answer_format,
    "think": think_format,
}


def is_built_in(name: str) -> bool:
    """Whether `find` has a reward of this name itself, so that no file or folder is meant by it."""
    return name in _BUILT_IN or name.startswith("length:")


def find(name: str) -> RewardFunction:
    """The reward function of a name: "answer" (`numeric_answer`), "exact" (`exact_answer`), "format"
    (`think_answer_format`), "think" (`think_format`), "length:400" (`length`), or "path/to/file.py:function", for one's
    own. Raises BadInput where there is none."""
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    before, colon, after = name.rpartition(":")
    if before.endswith(".py"):
        return _from_file(Path(before), after)
    if before == "length" and after.isascii() and after.isdigit():
        return length(int(after))
    if "length" in (before, name):
        raise BadInput(f"the reward {name!r} needs a number of characters, as length:400")
    if not colon and name.endswith(".py"):
        raise BadInput(f"the reward {name!r} is a file; add the name of a function in it, as {name}:reward")
    near = [] if {"/", "."} & set(name) else close_names(before or name, (*_BUILT_IN, "length"), count=1)
    if near:
        number = after if after.isascii() and after.isdigit() else "CHARACTERS"
        meant = f"length:{number}" if near == ["length"] else near[0]
        raise BadInput(f"there is no reward {name!r}; did you mean {meant}? A folder is named as ./{name}")
    known = ", ".join((*_BUILT_IN, "length:CHARACTERS"))
    raise BadInput(
        f"there is no reward {name!r}; choose from {known}, path/to/file.py:function or, for --reward of train.grpo, "
        "the folder of a reward model"
    )


def _from_file(path: Path, name: str) -> RewardFunction:
    if not path.is_file():
        raise BadInput(f"there is no file {path} to read the reward {name!r} from")
    try:
        module = _module(path.resolve(), path.read_bytes())
    except FAULTS as error:
        raise BadInput(f"{path}, which holds the reward {name!r}, cannot be run: {_error_line(error)}") from error
    function: RewardFunction | None = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        hint = did_you_mean(name, known) if known else "it has no function at all"
        raise BadInput(f"{path} has no function {name!r} for a reward; {hint}")
    return function


@functools.cache
def _module(path: Path, contents: bytes) -> ModuleType:
    """The module of a file with these contents, which is run once for all functions in it."""
    # In sys.modules, under a name of its own, since classes that the file defines look it up there.
    module_name = f"_reward_file_{path.as_posix()}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None  # as of every .py file
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _error_line(error: BaseException) -> str:
    """One line of an error: its type and what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# ---------------------------------------------------------------------------------------------------------------------
# Several at once


@dataclass(frozen=True)
class Rewards:
    """Reward functions, each with a name and a weight."""

    names: tuple[str, ...]
    functions: tuple[RewardFunction, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.names or not len(self.names) == len(self.functions) == len(self.weights):
            counts = [counted(len(self.names), "name"), counted(len(self.functions), "function")]
            counts.append(counted(len(self.weights), "weight"))
            raise BadInput(
                f"rewards need one name, function and weight each, and at least one; given: {', '.join(counts)}"
            )
        for name, weight in zip(self.names, self.weights, strict=True):
            if self.names.count(name) > 1:
                raise BadInput(f"there are {self.names.count(name)} rewards called {name!r}; give them different names")
            if not math.isfinite(weight):
                raise BadInput(f"the weight of the reward {name!r} is {weight}; give a finite number")

    def check_columns(self, names: Collection[str]) -> None:
        """BadInput, before any prompt is answered, for a function that needs a column not among these, or does not take
        all that it is given."""
        given = ("prompts", "completions", *names)
        for reward, function in zip(self.names, self.functions, strict=True):
            needed, taken = _arguments(function)
            for missing in sorted(needed - set(given)):
                raise BadInput(
                    f"the reward {reward!r} needs {missing!r}, which it is not given: there are prompts, completions "
                    f"and, beside the prompt, the records' fields ({', '.join(names) or 'none'}); rename the field "
                    "that is meant, or the argument of a function of your own"
                )
            for name in given:
                if taken is not None and name not in taken:
                    raise BadInput(
                        f"the reward {reward!r} takes no {name!r}, which it is given: end its arguments with **_"
                    )

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        alone: bool = True,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(Σ weight · reward, the rewards by name) of each completion, float32 [B].

        Where a function returned None its reward is nan, and it has no part in the sum. Raises BadInput, with the name
        of the function, for one that fails or does not return a finite number or None for each completion, and for a
        completion for which every function returned None: any reward, 0 too, would be made up. With `alone` False,
        where something else gives every completion a reward, the sum is 0 there.
        """
        self.check_columns(columns)
        values = {
            name: _called(name, function, prompts, completions, columns)
            for name, function in zip(self.names, self.functions, strict=True)
        }
        table = np.stack(list(values.values()), axis=1)
        silent = np.isnan(table).all(axis=1)
        if alone and silent.any():
            row = int(silent.argmax())
            advice = "drop such records, or add a function that has a reward for each"
            if numeric_answer in self.functions and (answer := columns["answer"][row]) not in (None, ""):
                advice = f"the field answer, {_shown(answer)}, holds no number; for words there is the reward exact"
            raise BadInput(
                f"no reward of completion {row} ({_shown(prompts[row])}): all functions ({', '.join(self.names)}) "
                f"returned None; {advice}"
            )
        total = np.nansum(table * np.asarray(self.weights), axis=1)
        return total.astype(np.float32), {name: column.astype(np.float32) for name, column in values.items()}


def _arguments(function: RewardFunction) -> tuple[set[str], set[str] | None]:
    """(the names of arguments that a function must be given, all that it takes or None where it takes any)."""
    try:
        arguments = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):  # one written in C may not tell
        return set(), None
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {each.name: each.default is each.empty for each in arguments if each.kind in by_name}
    takes_any = any(each.kind is each.VAR_KEYWORD for each in arguments)
    return {name for name, must in named.items() if must}, None if takes_any else set(named)


def _called(
    name: str, function: RewardFunction, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]
) -> np.ndarray:
    """What one function returns, checked, float64 [B], with nan for None."""
    # Copies of its own: what one function changes in place would be what the next one reads.
    arguments = copy.deepcopy({"prompts": prompts, "completions": completions, **columns})
    try:
        returned = function(**arguments)
        values = list(returned) if _is_iterable(scalar(returned)) else None
    except FAULTS as error:
        fault = f"{_error_line(error)}{_place(error, function)}"
        if "string indices must be integers" in fault:  # as TRL's functions read conversations
            fault += "; prompts and completions are texts here, not messages"
        raise BadInput(f"the reward {name!r} failed with {fault}") from error
    if values is None:
        raise BadInput(
            f"the reward {name!r} returned {_shown(returned)}; it must return a list: a number, or None, for each "
            "completion"
        )
    if len(values) != len(completions):
        raise BadInput(
            f"the reward {name!r} returned {counted(len(values), 'value')} for {len(completions)} completions"
        )
    return np.asarray([_number(name, row, value) for row, value in enumerate(values)], np.float64)


def _is_iterable(value: Any) -> bool:
    """Also by `__getitem__` alone, which `Iterable` does not know."""
    try:
        iter(value)
    except TypeError:
        return False
    return True


def _place(error: BaseException, function: RewardFunction) -> str:
    """ " (my_rewards.py, line 7)": the last place in the file that holds the function, whatever libraries it called;
    nothing where the call itself failed."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    called = traceback.extract_tb(error.__traceback__)[1:]  # behind the frame that calls it
    own = [frame for frame in called if code is not None and frame.filename == code.co_filename]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


def _number(name: str, row: int, value: Any) -> float:
    if value is None:
        return math.nan
    try:
        # float() would also read a number from a text.
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise BadInput(
            f"the reward {name!r} returned {_shown(value)} for completion {row}; it must return a finite number or None"
        )
    return number


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
