"""Holding out text for evaluation: whole documents where there are several, else the end of the one text.

Also the random orders that a seed alone decides.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Bool, Integer

from llmq_jax.counts import counted
from llmq_jax.errors import BadInput

Document = TypeVar("Document")


def split_documents(
    documents: Sequence[Document], fraction: float, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents, each in their order; `fraction` of the documents, at least one, is held out.

    The choice depends on the number of documents and the seed alone. Raises BadInput for fewer than two documents: one
    text is split by `split_tokens`.
    """
    training: list[Document] = []
    held_out: list[Document] = []
    for document, out in zip(documents, are_held_out(len(documents), fraction, seed), strict=True):
        (held_out if out else training).append(document)
    return training, held_out


def are_held_out(count: int, fraction: float, seed: int = 0) -> Bool[np.ndarray, " count"]:
    """Which of `count` documents `split_documents` holds out. BadInput: fewer than two documents, or a fraction that
    does not lie between 0 and 1."""
    _check_fraction(fraction)
    if count < 2:
        raise BadInput(
            f"holding out whole documents needs at least 2 of them, found {count}; give more, or a file of "
            "its own for validation"
        )
    held_out = np.zeros(count, bool)
    held_out[seeded_order(count, seed)[: min(max(1, round(fraction * count)), count - 1)]] = True
    return held_out


def split_tokens(
    tokens: Integer[np.ndarray, " N"], fraction: float
) -> tuple[Integer[np.ndarray, " train"], Integer[np.ndarray, " held_out"]]:
    """(training, held-out) tokens of one text, as views: the whole last `fraction` is held out, as nanoGPT does.

    The training part has floor((1 - fraction) * N) tokens. BadInput: one of the parts would be empty, or a
    fraction that does not lie between 0 and 1.
    """
    _check_fraction(fraction)
    # 0.9 * 1,115,394 characters: nanoGPT's int(n * 0.9). Rounding first keeps 1 - 0.1 from landing below 0.9.
    cut = math.floor(round((1 - fraction) * len(tokens), 6))
    if cut < 1 or cut >= len(tokens):
        raise BadInput(
            f"{counted(len(tokens), 'token')}: too few to hold out a fraction of {fraction}; give more text, or a file "
            "of its own for validation"
        )
    return tokens[:cut], tokens[cut:]


def seeded_order(count: int, seed: int | Sequence[int]) -> Integer[np.ndarray, " count"]:
    """A permutation of `range(count)` that depends on the two arguments alone."""
    # A seeded sort of random words, not Generator.permutation, whose stream numpy may change between versions.
    words = np.random.SeedSequence(seed).generate_state(count, np.uint64)
    return np.argsort(words, kind="stable")


def shuffled_epochs(count: int, entropy: int | Sequence[int]) -> Any:
    """Maps the index over all epochs to the index in the epoch: another permutation of `range(count)` in each epoch,
    which depends on the arguments alone (grain's shuffle, with random access)."""
    import grain  # takes a second

    # grain shuffles epoch e with seed + e, so that neighbouring seeds share their epochs, shifted by one. A hashed seed
    # does not.
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    return grain.MapDataset.range(count).shuffle(seed=seed)


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise BadInput(f"the held-out fraction must lie between 0 and 1, not {fraction}")
