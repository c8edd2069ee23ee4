"""Rewards by rules: what they give, where they have nothing to say, and what names itself when it fails."""

import functools
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from llmq_jax import rewards as rewards_module
from llmq_jax.data.records import record_files
from llmq_jax.errors import BadInput
from llmq_jax.rewards import (
    Rewards,
    exact_answer,
    final_number,
    find,
    is_built_in,
    length,
    numeric_answer,
    think_answer_format,
    think_format,
)
from train.rewards import data_digest, reward_models
from train.sources import one_split

# (completion, reference, reward)
ANSWERS = [
    ("She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 18", 1.0),
    ("#### 1,080", "that is\n#### 1080", 1.0),
    ("The answer is $1,234.50.", "#### 1234.5", 1.0),
    ("so 50% of them.", "50", 1.0),
    ("in all 3.0", 3, 1.0),
    ("+7", "7", 1.0),
    ("it is -7", "7", 0.0),
    ("it loses $-5, or -$5", "#### -5", 1.0),
    ("the sum is −4", "-4", 1.0),
    ("10-3", "3", 1.0),  # a difference, no negative number
    ("(2+8)-3", "3", 1.0),
    ("GPT-4", "4", 1.0),
    ("it costs $.50", "0.5", 1.0),
    ("the roots are 1,2", "2", 1.0),  # two numbers, not thousands
    ("1,234,567", "1234567", 1.0),
    ("1,2345", "2345", 1.0),
    ("12.", "12", 1.0),
    ("0.1", "0.10000000000000001", 0.0),  # compared as written, not in floating point
    ("9007199254740993", "9007199254740992", 0.0),
    ("0" * 5000 + "7", "7", 1.0),
    # what LaTeX and units make of numbers
    ("4 m^12", "4", 1.0),
    ("x^10", "10", 1.0),  # no number else
    (r"\boxed{72\text{ m}^2}", "72", 1.0),
    (r"it is \boxed{3 \text{ cm}^{-3}}", "3", 1.0),
    (r"\boxed{10{,}000}", "10000", 1.0),
    (r"10,\!080", "10080", 1.0),
    ("1.5e3 m", "1500", 1.0),
    ("in room 2e3b", "3", 1.0),  # no power of ten
    # fractions
    ("it is 3/4", "0.75", 1.0),
    (r"\boxed{\frac{3}{4}}", "3/4", 1.0),
    (r"\boxed{-\dfrac{3}{4}}", "-0.75", 1.0),
    (r"\boxed{1/4}", "3/4", 0.0),
    ("on 3/4/2020", "2020", 1.0),
    ("1/0", "0", 0.0),
    # marks: the last decides
    ("<answer>6 * 3 = 18 dollars</answer> for 7 days", "18", 1.0),
    ("<answer>7</answer> no: <answer>8</answer>", "8", 1.0),
    ("<answer>8</answer> no:\n#### 9 (of 10)", "9", 1.0),
    (r"so \boxed{\text{it is } 42} of 99", "42", 1.0),
    (r"<answer>\boxed{5}</answer>", "5", 1.0),
    ("####   $ 70,000 is it, not 5", "70000", 1.0),
    ("#### **18**", "18", 1.0),
    ("#### Step 2\nIt is 18", "18", 1.0),  # a heading
    ("#### 1. First\n5 and 7\n#### 2. Then\nIt is 12", "12", 1.0),
    ("#### 72.\nDone 5", "72", 1.0),
    ("#### 1\nnot 5", "1", 1.0),  # the number of a first heading, without a title
    ("#### 72. The total of 5", "72", 1.0),
    ("#### 3/4", "0.75", 1.0),
    ("12 of them <answer>none</answer>", "12", 0.0),
    ("<answer>12", "12", 1.0),
    ("I do not know", "12", 0.0),
    ("", "12", 0.0),
    # a reference without a number
    ("12", "none", None),
    ("12", None, None),
]


@pytest.mark.parametrize(("completion", "reference", "reward"), ANSWERS)
def test_numeric_answers(completion, reference, reward):
    assert numeric_answer(prompts=["?"], completions=[completion], answer=[reference], question=["?"]) == [reward]


def test_digits_of_other_scripts_are_no_numbers():
    assert final_number("١٢") is None and final_number("#### ١٢") is None


# (completion, reference, reward)
EXACT = [
    ("B", "B", 1.0),
    (" B \n\n", "B ", 1.0),
    ("It is warm, so\nB", "B", 1.0),
    ("B\nor not", "B", 0.0),
    ("b", "B", 0.0),
    ("(B)", "B", 0.0),
    ("B.", "B", 0.0),
    ("so B", "B", 0.0),
    ("(B)", "(B)", 1.0),
    ("Let us see.\n#### Emily Brontë", "Emily Brontë", 1.0),
    ("####B", "B", 1.0),
    ("the sum is\r\n7\r\n", 7, 1.0),
    ("7.0", 7, 0.0),
    ("<answer> B\n</answer> I am sure", "B", 1.0),
    ("<answer>A</answer> no, <answer>B</answer>", "B", 1.0),
    ("<answer>A</answer>\nB", "B", 0.0),
    (r"it is $\boxed{x^{2}}$.", "x^{2}", 1.0),
    (r"\boxed{A} or <answer>B</answer>", "B", 1.0),
    (r"<think>\boxed{A}" + "\nA</think>\n B", "B", 1.0),
    ("<think>A</think>", "A", 0.0),
    ("<think>A</think><answer>A</answer></think>B", "B", 1.0),  # up to the last </think>
    ("<answer>two\nlines</answer>", "two\nlines", 1.0),
    ("", "B", 0.0),
    # nothing to compare with
    ("B", None, None),
    ("", " ", None),
]


@pytest.mark.parametrize(("completion", "reference", "reward"), EXACT)
def test_exact_answers(completion, reference, reward):
    assert exact_answer(prompts=["?"], completions=[completion], answer=[reference], question=["?"]) == [reward]


# (completion, prompt, reward in eighths)
FORMS = [
    ("<think>2 + 2</think><answer>4</answer>", "?", 8),
    ("\n<think>\n2\n</think>\n\n<answer>\n4\n</answer>\n", "?", 8),
    ("<think></think><answer></answer>", "?", 8),
    ("Sure! <think>2</think><answer>4</answer>", "?", 6),
    ("<think>2</think> so <answer>4</answer>", "?", 6),
    ("<think>2</think><answer>4</answer> bye", "?", 6),
    ("<answer>4</answer><think>2</think>", "?", 4),
    ("<think>2<answer>4</think></answer>", "?", 4),
    ("<think>2</think><answer>4", "?", 3),
    ("<think>2</think><think>3</think><answer>4</answer>", "?", 2),
    ("<answer>4</answer>", "?", 2),
    ("<think>2", "?", 1),
    ("the answer is 4", "?", 0),
    ("", "?", 0),
    ("2</think><answer>4</answer>", "?<think>\n", 8),
    ("<think>2</think><answer>4</answer>", "?<think>\n", 3),
    ("2</think><answer>4</answer>", [{"role": "user", "content": "?"}], 3),
]


@pytest.mark.parametrize(("completion", "prompt", "eighths"), FORMS)
def test_forms(completion, prompt, eighths):
    assert think_answer_format(prompts=[prompt], completions=[completion], answer=[None]) == [eighths / 8]


def test_a_thought_may_be_opened_by_the_prompt():
    prompts = ["?<think>\n", "?<think>\n", [{"role": "user", "content": "?"}]]
    completions = ["2</think> 4", "<think>2</think> 4", "2</think> 4"]
    assert think_format(prompts=prompts, completions=completions, answer=completions) == [1.0, 0.0, 0.0]


def test_lengths():
    texts = ["", "x" * 400, "x" * 500, "x" * 800, "x" * 2000]
    assert length(400)(prompts=texts, completions=texts, answer=texts) == [1.0, 1.0, 0.75, 0.0, 0.0]


# ---------------------------------------------------------------------------------------------------------------------
# Several at once


def one_of(value):
    return lambda prompts, completions, **_: [value(text) for text in completions]


def test_the_weighted_sum_leaves_out_what_has_nothing_to_say():
    rewards = Rewards(
        ("digits", "answer"), (one_of(lambda text: len(text) if text.isdigit() else None), numeric_answer), (0.5, -2.0)
    )
    total, by_name = rewards(["a", "b", "c"], ["12", "345", "no"], {"answer": ["12", "?", "7"], "question": "abc"})
    np.testing.assert_array_equal(total, [0.5 * 2 - 2.0 * 1, 0.5 * 3, 0.0])
    np.testing.assert_array_equal(by_name["digits"], [2, 3, np.nan])
    np.testing.assert_array_equal(by_name["answer"], [1, np.nan, 0])
    assert list(by_name) == ["digits", "answer"] and total.dtype == np.float32
    total, _ = rewards(["a"], ["no"], {"answer": ["?"]}, alone=False)  # beside a reward model
    np.testing.assert_array_equal(total, [0.0])


def test_each_function_has_lists_of_its_own():
    """What one does with them changes nothing for the others, nor for who ranks the same answers later."""
    prompts, completions = [[{"content": "?"}]], ["12"]
    columns = {"answer": ["12"], "numbers": [[2, 1]]}

    def careless(prompts, completions, answer, numbers):
        rewards = [len(completions.pop()) + sum(numbers.pop())]
        prompts.pop()[0].clear()
        answer[0] = None
        return rewards

    rewards = Rewards(("careless", "again", "answer"), (careless, careless, numeric_answer), (1.0, 1.0, 1.0))
    assert rewards(prompts, completions, columns)[0] == 11
    assert (prompts, completions) == ([[{"content": "?"}]], ["12"])
    assert columns == {"answer": ["12"], "numbers": [[2, 1]]}


def test_numbers_of_any_type():
    values = iter([True, np.float32(0.5), np.int64(3), np.asarray(2.0)])
    total, _ = Rewards(("any",), (one_of(lambda text: next(values)),), (1.0,))(["?"] * 4, ["x"] * 4, {})
    np.testing.assert_array_equal(total, [1.0, 0.5, 3.0, 2.0])


def test_a_function_in_another_takes_what_that_one_takes():
    """Whatever the inner one's arguments are called."""

    def inner(completions, solution):
        return [float(text == solution) for text in completions]

    @functools.wraps(inner)
    def outer(completions, answer, optional=None, **_):
        return inner(completions, answer)

    total, _ = Rewards(("wrapped",), (outer,), (1.0,))(["?"], ["7"], {"answer": "7"})
    np.testing.assert_array_equal(total, [1.0])


class Indexed:
    """A list by its indices alone, as Python's oldest protocol has it."""

    def __getitem__(self, index):
        return [1.0, 0.5][index]


def test_values_that_are_read_by_their_indices():
    total, _ = Rewards(("mine",), (lambda prompts, completions, **_: Indexed(),), (1.0,))(["a", "b"], ["x", "y"], {})
    np.testing.assert_array_equal(total, [1.0, 0.5])


def refuse():
    raise ValueError("no\nsuch thing")


def failing(prompts, completions, **_):
    refuse()


def leaving(prompts, completions, **_):
    sys.exit(3)


LINE = refuse.__code__.co_firstlineno + 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (failing, f"the reward 'mine' failed with ValueError: no such thing (test_rewards.py, line {LINE})"),
        (leaving, "the reward 'mine' failed with SystemExit: 3 (test_rewards.py, line "),
        (
            lambda prompts, completions, **_: [len(completion[0]["content"]) for completion in completions],
            "); prompts and completions are texts here, not messages",
        ),
        (
            numeric_answer,
            "the reward 'mine' needs 'answer', which it is not given: there are prompts, completions and, beside the "
            "prompt, the records' fields (question); rename the field that is meant, or the argument of a function",
        ),
        (
            lambda completions: [0],
            "the reward 'mine' takes no 'prompts', which it is given: end its arguments with **_",
        ),
        (
            lambda prompts, completions, **_: None,
            "the reward 'mine' returned None; it must return a list: a number, or None, for each completion",
        ),
        (lambda prompts, completions, **_: 3.0, "the reward 'mine' returned 3.0; it must return a list"),
        (lambda prompts, completions, **_: np.float32(3), "the reward 'mine' returned np.float32(3.0); it must return"),
        (lambda prompts, completions, **_: [1.0], "the reward 'mine' returned 1 value for 2 completions"),
        (one_of(lambda text: float("nan")), "the reward 'mine' returned nan for completion 0; it must return a finite"),
        (one_of(lambda text: 1.0 if text == "x" else float("-inf")), "returned -inf for completion 1"),
        (one_of(lambda text: 1e39), "returned 1e+39 for completion 0"),  # more than float32 holds
        (one_of(lambda text: "1.0"), "returned '1.0' for completion 0"),
        (one_of(lambda text: np.zeros((2, 2))), "returned array([[0., 0.], [0., 0.]]) for completion 0"),
        (one_of(lambda text: 1.0 if text == "x" else None), "no reward of completion 1 ('b'): all functions (mine)"),
    ],
)
def test_a_function_that_fails_names_itself(function, message):
    with pytest.raises(BadInput) as error:
        Rewards(("mine",), (function,), (1.0,))(["a", "b"], ["x", "y"], {"question": ["a", "b"]})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_words_are_told_from_numbers():
    """train.grpo's default reward reads numbers; a data set whose answers are words wants another."""
    with pytest.raises(BadInput, match=r"answer, 'red', holds no number; for words there is the reward exact$"):
        Rewards(("answer",), (numeric_answer,), (1.0,))(["a", "b"], ["x", "y"], {"answer": ["7", "red"]})


def test_the_error_that_a_function_raised_is_kept():
    with pytest.raises(BadInput) as error:
        Rewards(("mine",), (failing,), (1.0,))(["a"], ["x"], {})
    assert isinstance(error.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ((), (), "and at least one; given: 0 names, 0 functions, 0 weights"),
        (("a", "b"), (1.0,), "given: 2 names, 2 functions, 1 weight"),
        (("a", "a"), (1.0, 1.0), "there are 2 rewards called 'a'"),
        (("a",), (float("inf"),), "the weight of the reward 'a' is inf"),
    ],
)
def test_rewards_that_cannot_be(names, weights, message):
    with pytest.raises(BadInput) as error:
        Rewards(names, (numeric_answer,) * len(names), weights)
    assert message in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# By name

FILE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Scale:
    by: float = 2.0

def by_words(completions, **columns):
    return [Scale().by * len(text.split()) for text in completions]

number = 3
"""


def test_names(tmp_path):
    assert find("answer") is numeric_answer and find("format") is think_answer_format
    assert find("exact") is exact_answer and find("think") is think_format
    assert find("length:4")(prompts=["?"], completions=["x" * 5]) == [0.75]
    file = tmp_path / "my:rewards.py"
    file.write_text(FILE)
    by_words = find(f"{file}:by_words")
    assert by_words(prompts=["?"], completions=["a b c"], answer=["?"]) == [6.0]
    # A file is run once, so that its functions share what it holds; and again where it has changed.
    assert find(f"{file}:Scale") is by_words.__globals__["Scale"]
    file.write_text(FILE.replace("2.0", "30.0"))
    assert find(f"{file}:by_words")(prompts=["?"], completions=["a b c"], answer=["?"]) == [90.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("anwser", "there is no reward 'anwser'; did you mean answer?"),
        ("lenght:400", "there is no reward 'lenght:400'; did you mean length:400?"),
        ("lenght:²", "there is no reward 'lenght:²'; did you mean length:CHARACTERS?"),
        ("answer-rm", "did you mean answer? A folder is named as ./answer-rm"),
        ("runs/answer", "there is no reward 'runs/answer'; choose from answer, "),
        (
            "novelty",
            "there is no reward 'novelty'; choose from answer, exact, format, think, length:CHARACTERS, "
            "path/to/file.py:function or, for --reward of train.grpo, the folder of a reward model",
        ),
        ("length", "the reward 'length' needs a number of characters, as length:400"),
        ("length:-4", "the reward 'length:-4' needs a number of characters"),
        ("length:²", "the reward 'length:²' needs a number of characters"),
        ("length:0", "a reward for completions of at most 0 characters makes no sense"),
        ("FOLDER/missing.py:reward", "there is no file FOLDER/missing.py to read the reward 'reward' from"),
        ("FOLDER/mine.py", "the reward 'FOLDER/mine.py' is a file; add the name of a function in it"),
        ("FOLDER/mine.py:by_word", "mine.py has no function 'by_word' for a reward; did you mean by_words?"),
        ("FOLDER/mine.py:number", "mine.py has no function 'number' for a reward"),
        ("FOLDER/empty.py:reward", "empty.py has no function 'reward' for a reward; it has no function at all"),
        (
            "FOLDER/broken.py:reward",
            "which holds the reward 'reward', cannot be run: ZeroDivisionError: division by zero",
        ),
        ("FOLDER/not_python.py:reward", "cannot be run: SyntaxError:"),
        ("FOLDER/leaves.py:reward", "cannot be run: SystemExit: 3"),
    ],
)
def test_names_of_nothing(name, message, tmp_path):
    files = {"mine": FILE, "empty": "", "broken": "1 / 0", "not_python": "def def", "leaves": "raise SystemExit(3)"}
    for stem, text in files.items():
        (tmp_path / f"{stem}.py").write_text(text)
    with pytest.raises(BadInput) as error:
        find(name.replace("FOLDER", str(tmp_path)))
    assert message.replace("FOLDER", str(tmp_path)) in str(error.value) and "\n" not in str(error.value)


def test_a_new_reward_wants_one_entry(tmp_path, monkeypatch):
    """By it the name is found, told, and taken from the folders that are reward models."""
    monkeypatch.chdir(tmp_path)
    for name in ("answer", "format", "brief", "length:5", "judge"):
        (tmp_path / name).mkdir()
    given = SimpleNamespace(reward="answer,brief,judge,length:5,mine.py:brief,nowhere")
    assert reward_models(given) == ["brief", "judge"]
    monkeypatch.setitem(rewards_module._BUILT_IN, "brief", think_answer_format)
    assert find("brief") is think_answer_format and is_built_in("brief")
    assert reward_models(given) == ["judge"]
    with pytest.raises(
        BadInput, match="choose from answer, exact, format, think, brief, length:CHARACTERS, path/to/file"
    ):
        find("short")


def test_a_run_knows_the_files_of_pairs_that_it_goes_on_learning_from(tmp_path):
    """Of a folder each, so that what changed is told."""
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "b.csv").write_text("a\n")
    of_file = data_digest(str(tmp_path / "a.jsonl"))
    assert len(of_file) == 64
    of_folder = data_digest(folder := one_split(str(tmp_path), "train", record_files))
    assert of_folder["a.jsonl"] == of_file and list(of_folder) == ["a.jsonl", "b.csv"]
    (tmp_path / "b.csv").write_text("b\n")
    assert data_digest(folder)["b.csv"] != of_folder["b.csv"]
