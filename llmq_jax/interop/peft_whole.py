"""Matrices that a folder of PEFT's holds whole, in place of those of its base: the tokens' embedding, and heads.

`modules_to_save` trains a copy of a module. Where the embedding got other rows (`resize_token_embeddings`), or has an
adapter, PEFT saves the base's own beside the adapters. Of a base that has one matrix for embedding and head
(`tie_word_embeddings`) a copy is of one of the two, and the other stays: they are two from then on, unless their values
are the same.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from llmq_jax.errors import BadInput
from llmq_jax.interop.peft import PREFIX, memory_table
from llmq_jax.layers.axes import on_host
from llmq_jax.models import override
from llmq_jax.models.heads import LM_HEAD, SCORE

EMBEDDING = "token_embedding"
LEAVES = {EMBEDDING: "embedding", LM_HEAD: "kernel", SCORE: "kernel"}
TWICE = ("modules_to_save", "original_module")
"""Under these names, too, PEFT saves the copy and the base's where it has both reasons to save a module."""


def module_name(config: Any, name: str) -> str:
    """What PEFT calls the module that has our embedding or head."""
    path = f"params/{name}/{LEAVES[name]}"
    return next(rule.key for rule in memory_table(config).rules if rule.path == path).removesuffix(".weight")


def embedding_adapter(config: Any) -> str:
    """Where the names of an adapter at the embedding begin."""
    return f"{PREFIX}{module_name(config, EMBEDDING)}.lora_embedding_"


def take_whole(
    file: Path,
    state: dict[str, np.ndarray],
    in_file: Mapping[str, str],
    copies: Sequence[str],
    config: Any,
    variables: dict[str, Any],
) -> tuple[Any, dict[str, Any], list[str]]:
    """Take such matrices out of `state`, into a base: (its config, its variables, our names of what changed: embedding,
    head). `in_file` has their names in the file, `copies` are the `modules_to_save`.

    BadInput: one of another base, or an embedding and a head of different numbers of tokens.
    """
    params = dict(variables["params"])
    tied = config.labels is None and LM_HEAD not in params
    given, copied = {}, set()
    for name in (EMBEDDING, SCORE if config.labels is not None else LM_HEAD):
        module = module_name(config, name)
        width = params[EMBEDDING]["embedding"].shape[1]
        rows = str(params[SCORE]["kernel"].shape[1]) if name == SCORE else "v"
        for key in (f"{PREFIX}{module}.weight", f"{PREFIX}{module}.base_layer.weight"):
            if key not in state:
                continue
            matrix = given[name] = state.pop(key)
            if matrix.ndim != 2 or matrix.shape[1] != width or rows not in ("v", str(len(matrix))):
                raise BadInput(
                    f"{file}: {in_file[key]} is {list(matrix.shape)} instead of [{rows}, {width}]: it is an adapter of "
                    "another base"
                )
            if any(module.endswith(copy) for copy in copies):
                copied.add(name)
            for twice in TWICE:
                state.pop(f"{PREFIX}{module}.{twice}.weight", None)
    if tied and given:  # what is no copy is the base's one matrix
        of_base = next((matrix for name, matrix in given.items() if name not in copied), params[EMBEDDING]["embedding"])
        given = {name: given.get(name, of_base) for name in (EMBEDDING, LM_HEAD)}
    apart = (f"{PREFIX}{module_name(config, LM_HEAD)}.lora_", embedding_adapter(config))
    adapts_one = any(key.startswith(apart) for key in state)
    if tied and (adapts_one or not _equal(given.get(EMBEDDING), given.get(LM_HEAD))):
        given.setdefault(LM_HEAD, params[EMBEDDING]["embedding"])
        params[LM_HEAD] = {"kernel": params[EMBEDDING]["embedding"].T}
    replaced = []
    for name, matrix in given.items():
        if name not in params:
            continue
        leaf = LEAVES[name]
        before = params[name][leaf]
        after = jnp.asarray(matrix, before.dtype)
        after = after if name == EMBEDDING else after.T
        if not _equal(before, after):
            params[name] = {leaf: after}
            replaced += [name] if name != SCORE else []
    vocab_size = len(params[EMBEDDING]["embedding"])
    if LM_HEAD in params and params[LM_HEAD]["kernel"].shape[1] != vocab_size:
        raise BadInput(
            f"{file}: would leave an embedding of {vocab_size} tokens beside a head of "
            f"{params[LM_HEAD]['kernel'].shape[1]}; save the adapter with both (save_embedding_layers=True)"
        )
    if (vocab_size, LM_HEAD in params) != (config.vocab_size, LM_HEAD in variables["params"]):
        is_tied = config.tie_word_embeddings and LM_HEAD not in params
        config = override(config, vocab_size=vocab_size, tie_word_embeddings=is_tied)
    return config, {**variables, "params": params}, replaced


def _equal(left: Any, right: Any) -> bool:
    return left is right or (left.shape == right.shape and bool((on_host(left) == on_host(right)).all()))
