"""Random inputs, the same for every side of a row. Only NumPy: processes of JAX and of PyTorch both import it."""

import re
from dataclasses import replace
from typing import Any

import numpy as np


def random_batch(vocab_size: int, rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """`tokens`, `targets` [B, T] int32 and a `mask` of ones."""
    drawn = np.random.default_rng(seed).integers(vocab_size, size=(rows, length + 1), dtype=np.int32)
    return {"tokens": drawn[:, :-1], "targets": drawn[:, 1:], "mask": np.ones((rows, length), np.float32)}


def train_batch(row: Any, index: int) -> dict[str, np.ndarray]:
    """One of the batches of a row, as `random_batch` has them."""
    return random_batch(row.fields["vocab_size"], row.batch, row.context, seed=index)


def cross_entropy_inputs(row: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(head [V, D], hidden states [1, M, D], targets [1, M])."""
    draw = np.random.default_rng(0)
    head = draw.standard_normal((row.vocab_size, row.width), np.float32) * np.float32(0.05)
    hidden = draw.standard_normal((1, row.tokens, row.width), np.float32)
    return head, hidden, draw.integers(row.vocab_size, size=(1, row.tokens), dtype=np.int32)


def attention_inputs(row: Any, length: int) -> tuple[np.ndarray, ...]:
    """Queries [1, T, N, H], keys and values [1, T, K, H]."""
    draw = np.random.default_rng(0)
    shapes = ((1, length, heads, row.width) for heads in (row.heads, row.key_heads, row.key_heads))
    return tuple(draw.standard_normal(shape, np.float32) for shape in shapes)


def experts_inputs(row: Any, num_experts: int) -> tuple[np.ndarray, ...]:
    """Tokens [M, D], the ids [M, k] and routing weights [M, k] of their experts; gate and up projections
    [E, D, 2, F], down projections [E, F, D]."""
    draw = np.random.default_rng(0)
    tokens, width, hidden = row.tokens, row.width, row.intermediate_size
    x = draw.standard_normal((tokens, width), np.float32)
    ids = draw.random((tokens, num_experts)).argsort(1)[:, : row.top_k].astype(np.int32)
    weights = draw.random((tokens, row.top_k), np.float32) + np.float32(0.1)
    weights /= weights.sum(1, keepdims=True)
    up = draw.standard_normal((num_experts, width, 2, hidden), np.float32) * np.float32(width**-0.5)
    down = draw.standard_normal((num_experts, hidden, width), np.float32) * np.float32(hidden**-0.5)
    return x, ids, weights, up, down


def prompts(row: Any) -> list[list[int]]:
    """Token ids, [B, P]."""
    return np.random.default_rng(0).integers(row.fields["vocab_size"], size=(row.batch, row.prompt)).tolist()


def pairs_of_words(row: Any, tokenizer: Any) -> list[dict[str, str]]:
    """Prompts with two answers, all of them texts as `prompts_of_words` makes them."""
    texts = prompts_of_words(replace(row, batch=3 * row.batch), tokenizer)
    names = ("prompt", "chosen", "rejected")
    return [dict(zip(names, texts[i : i + 3], strict=True)) for i in range(0, len(texts), 3)]


def prompts_of_words(row: Any, tokenizer: Any) -> list[str]:
    """Texts of `row.prompt` tokens each, every one a whole word: encoding a text again gives the same tokens."""
    known = min(row.fields["vocab_size"], tokenizer.vocab_size)
    words = [word for word in map(tokenizer.decode, ([i] for i in range(known))) if re.fullmatch(" [a-z]{4,}", word)]
    drawn = np.random.default_rng(0).integers(len(words), size=(row.batch, row.prompt))
    return ["".join(words[index] for index in each) for each in drawn]
