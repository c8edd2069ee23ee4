"""New tokens: a tokenizer that knows them, and rows for them in the model's embedding and head."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llmq_jax.errors import BadInput
from llmq_jax.field_types import require_model
from llmq_jax.language_model import LanguageModel
from llmq_jax.layers.axes import axis_sizes, put
from llmq_jax.layers.lora import LORA_FIXED, STAYS, WHOLE
from llmq_jax.models import abstract_variables, override


def add_tokens(lm: LanguageModel, tokens: str | Iterable[str], *, special: bool = True) -> LanguageModel:
    """The model with more tokens: its tokenizer knows them (`Tokenizer.with_tokens`, which explains `special`), and its
    embedding [V, D] and head [D, V] have rows and columns for them. The logits of the old tokens stay as they are.

    Where the embedding has spare rows, because V is above the tokenizer's number of ids, the first new tokens take
    these as they are. Rows and columns that are added are the mean of the old ones, with which a new token is at first
    no likelier than the old ones are on average (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language
    Models", https://nlp.stanford.edu/~johnhew/vocab-expansion.html).

    BadInput: a token is no text, empty or there twice; the model has no tokenizer, or an adapter at its head.
    """
    require_model(lm)
    tokenizer = lm.require_tokenizer("this model").with_tokens(tokens, special=special)
    if tokenizer.vocab_size <= lm.config.vocab_size:
        return lm.replace(tokenizer=tokenizer)
    config = override(lm.config, vocab_size=tokenizer.vocab_size)
    before, after = (flatten_dict(abstract_variables(each)) for each in (lm.config, config))
    variables = flatten_dict(lm.variables)
    adapted = {path[1:-1] for path in variables if path[0] == LORA_FIXED}
    for path in [path for path in after if after[path].shape != before[path].shape]:
        if path[1:] in adapted:
            raise BadInput("this model has an adapter at its head, which cannot grow; merge it first: lq.merge(lm)")
        leaf = _grown(variables[path], before[path].shape, after[path].shape)
        variables[path] = put(path, leaf) if axis_sizes() else leaf
        if adapted:  # as in PEFT, an embedding that is not the base's belongs to the adapters
            variables.setdefault((LORA_FIXED, WHOLE, path[1]), jnp.asarray(STAYS))
    return lm.replace(config=config, tokenizer=tokenizer, variables=unflatten_dict(variables))


def _grown(leaf: Any, before: tuple[int, ...], after: tuple[int, ...]) -> Any:
    """The array with more entries along the axis in which the shapes differ, each the mean of the old ones."""
    (axis,) = (axis for axis, (old, new) in enumerate(zip(before, after, strict=True)) if old != new)
    of_its_kind: Any = np if isinstance(leaf, np.ndarray) else jnp
    mean = leaf.mean(axis, keepdims=True, dtype=np.float32).astype(leaf.dtype)
    return of_its_kind.concatenate([leaf, of_its_kind.repeat(mean, after[axis] - before[axis], axis)], axis)
