"""A classifier's head: what its config says of it, and which token of a row it reads.

A classifier is a language model whose head tells classes apart instead of tokens: one product `score`, without a bias,
of the hidden state of the last real token, which alone has seen the whole text. That token is found by segments or
lengths, which say what is padding, never by a token's id: where the padding is and what fills it changes no answer. A
head of one class gives a scalar, a score of the text.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmq_jax.errors import BadInput
from llmq_jax.json_text import half_surrogate
from llmq_jax.models.config import require

LM_HEAD, SCORE = "lm_head", "score"
"""The modules of the two kinds of heads."""
MOST_CLASSES = 2**20
Labels = tuple[str, ...] | list[str] | None


def set_labels(config: Any) -> None:
    """Check the names of a config's classes, and hold them as a tuple: JSON gives a list."""
    labels = config.labels
    if labels is None:
        return
    names = not isinstance(labels, str) and all(isinstance(label, str) and label for label in labels)
    require(names, config, "labels", 'must be the names of the classes, as ("ham", "spam")')
    require(len(labels) > 0, config, "labels", "must name at least one class; None is a language model")
    whole = all(half_surrogate(label) is None for label in labels)
    require(whole, config, "labels", "has half a surrogate pair, which is no character")
    for label, count in Counter(labels).items():
        require(count == 1, config, "labels", f"names {label!r} twice")
    object.__setattr__(config, "labels", tuple(labels))


def numbered_labels(count: int) -> tuple[str, ...]:
    """The names of classes that have none, as transformers calls them."""
    if count > MOST_CLASSES:
        raise BadInput(f"a head of {count:,} classes is not supported; the most are {MOST_CLASSES:,}")
    return tuple(f"LABEL_{i}" for i in range(count))


def shown(labels: Sequence[str], limit: int = 5) -> str:
    """The names of classes, shortened for a message."""
    more = f" and {len(labels) - limit} more" if len(labels) > limit else ""
    return ", ".join(labels[:limit]) + more


def last_hidden(hidden: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None) -> Float[Array, "B D"]:
    """The hidden state of each row's last token that is not padding (segment 0); of a row that is all padding the
    first."""
    if segment_ids is None:
        return hidden[:, -1]
    places = jnp.where(segment_ids != 0, jnp.arange(hidden.shape[1]), 0)
    return jnp.take_along_axis(hidden, places.max(axis=1)[:, None, None], axis=1)[:, 0]
