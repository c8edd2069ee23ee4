"""The reward `think` against TRL's `think_format_reward`, which is given messages."""

import itertools

import pytest

from llmq_jax.rewards import think_format

rewards = pytest.importorskip("trl.rewards")

TEXTS = [
    "<think>\n2 + 2\n</think>\n4",
    "<think>2</think>4",
    "<think></think>",
    "<think>2</think>",
    "<think>2\n4",
    "2</think>4",
    "2 + 2 = 4",
    "",
    "\n<think>2</think>4",
    "Well. <think>2</think>4",
    "4\n<think>2</think>4",
    "<think>2<think>3</think>4",
    "<think>2</think>4<think>",
    "<think>2</think>\n\n<think>3</think>\n4",
    "<think>2</think></think>4",
    "<THINK>2</THINK>4",
    "<think >2</think>4",
    "</think><think>4",
    "<think>é 😀\r\n\u2028</think>日本",
]


def test_texts():
    # And all that three pieces make.
    texts = TEXTS + ["".join(pieces) for pieces in itertools.product(["<think>", "</think>", "\n", "a"], repeat=4)]
    expected = rewards.think_format_reward([[{"role": "assistant", "content": text}] for text in texts])
    assert think_format(prompts=["?"] * len(texts), completions=texts, answer=texts) == expected
    assert 0 < sum(expected) < len(texts)
