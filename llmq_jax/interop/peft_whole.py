"""Matrices that a PEFT folder holds whole, in place of those of its base model: the token embedding, and heads.

`modules_to_save` trains a copy of a module. Where the embedding was resized (`resize_token_embeddings`), or has an
adapter, PEFT saves the base's own embedding beside the adapters. If the base has one matrix for embedding and head
(`tie_word_embeddings`), a copy belongs to one of the two, and the other stays as it was: they are two matrices from
then on, unless their values are the same.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from llmq_jax.errors import BadInput
from llmq_jax.interop.peft import BASE_LAYER, EMBEDDING_A, EMBEDDING_B, PREFIX, memory_table
from llmq_jax.interop.peft_tensors import AdapterTensors
from llmq_jax.interop.tables import equal
from llmq_jax.models import override
from llmq_jax.models.heads import LM_HEAD, SCORE

EMBEDDING = "token_embedding"
LEAVES = {EMBEDDING: "embedding", LM_HEAD: "kernel", SCORE: "kernel"}
TWICE = ("modules_to_save", "original_module")
"""Further names under which PEFT saves the copy and the base's own matrix, where it has both reasons to save a
module."""


def module_name(config: Any, name: str) -> str:
    """PEFT's name for the module of our embedding or head."""
    path = f"params/{name}/{LEAVES[name]}"
    return next(rule.key for rule in memory_table(config).rules if rule.path == path).removesuffix(".weight")


def with_embedding_and_head(
    tensors: AdapterTensors, config: Any, variables: dict[str, Any]
) -> tuple[Any, dict[str, Any], dict[str, bool]]:
    """(config, variables, marks) with the matrices that the folder holds whole in place of the base's, and with an
    adapter at the embedding merged into it.

    `marks` has our names of an embedding or a head that is a copy, or differs from the base's, each with whether it is
    a copy that trains. BadInput for matrices of other shapes, or an embedding and a head of different numbers of
    tokens.
    """
    params = variables["params"]
    embedding, is_tied = params[EMBEDDING]["embedding"], config.labels is None and LM_HEAD not in params
    given = _take_whole(tensors, config, _whole_shapes(config, params))
    copies = _copies(tensors, config, given)
    if is_tied:
        given = _parted(given, copies, embedding)
    module = module_name(config, EMBEDDING)
    rows, width = given.get(EMBEDDING, embedding).shape
    pair = tensors.take_pair(f"{PREFIX}{module}", rows, width, EMBEDDING_A, EMBEDDING_B)
    if pair is not None:
        first, last = pair
        tensors.check_dora(module)
        change = tensors.scale(module, len(last)) * (first @ last)
        given[EMBEDDING] = jnp.asarray(given.get(EMBEDDING, embedding), jnp.float32) + change
    adapts_head = any(key.startswith(f"{PREFIX}{LM_HEAD}.lora_") for key in tensors.state)
    if is_tied and not adapts_head and equal(given[EMBEDDING], given[LM_HEAD]):
        del given[LM_HEAD]
    params, changed = _replaced(params, given)
    own = {*changed, *copies} - {SCORE}  # the score head is any classifier's own
    marks = {name: name in copies for name in given if name in own}
    return _fitting(config, params, tensors.file), {**variables, "params": params}, marks


def _take_whole(tensors: AdapterTensors, config: Any, shapes: Mapping[str, tuple[int | str, int]]) -> dict[str, Any]:
    """Those of these matrices that the folder holds, by our names."""
    given: dict[str, Any] = {}
    for name, shape in shapes.items():
        module = f"{PREFIX}{module_name(config, name)}"
        for key in (f"{module}.weight", f"{module}{BASE_LAYER}.weight"):
            if (matrix := tensors.take(key, shape)) is not None:
                given[name] = matrix
        if name in given:
            for twice in TWICE:
                tensors.state.pop(f"{module}.{twice}.weight", None)
    return given


def _copies(tensors: AdapterTensors, config: Any, names: Collection[str]) -> set[str]:
    """Those of our names of whose modules PEFT trained a copy (`modules_to_save`)."""
    ends = tuple(tensors.values.get("modules_to_save", []))
    return {name for name in names if module_name(config, name).endswith(ends)}


def _whole_shapes(config: Any, params: dict[str, Any]) -> dict[str, tuple[int | str, int]]:
    """{our name: rows and columns} of the matrices that may come whole: "v" is any number of tokens; classes are those
    of the base."""
    width = params[EMBEDDING]["embedding"].shape[1]
    if config.labels is None:
        return {EMBEDDING: ("v", width), LM_HEAD: ("v", width)}
    return {EMBEDDING: ("v", width), SCORE: (params[SCORE]["kernel"].shape[1], width)}


def _parted(given: dict[str, Any], copies: Collection[str], shared: Any) -> dict[str, Any]:
    """The embedding and the head for a base that has one matrix, `shared`, for both. Each is what is given for it, else
    the base's matrix: one that is given and no copy (it takes the place of `shared`), or `shared`."""
    shared = next((matrix for name, matrix in given.items() if name not in copies), shared)
    return {name: given.get(name, shared) for name in (EMBEDDING, LM_HEAD)}


def _replaced(params: dict[str, Any], given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the parameters with the `given` matrices, {our name: [rows, D]}, in the types of those that they replace; the
    names of those whose values differ). Where the values are the same, the array stays, since several models may share
    it."""
    after, changed = dict(params), []
    for name, matrix in given.items():
        leaf = LEAVES[name]
        own = params[name][leaf] if name in params else params[EMBEDDING]["embedding"].T
        new = jnp.asarray(matrix, own.dtype)
        new = new if name == EMBEDDING else new.T
        if not equal(own, new):
            own = new
            changed.append(name)
        after[name] = {leaf: own}
    return after, changed


def _fitting(config: Any, params: dict[str, Any], file: Path) -> Any:
    """The config of these parameters; BadInput, which names the file, for an embedding and a head of different
    numbers of tokens."""
    vocab_size = len(params[EMBEDDING]["embedding"])
    is_tied = config.tie_word_embeddings and LM_HEAD not in params
    rows = vocab_size if LM_HEAD not in params else params[LM_HEAD]["kernel"].shape[1]
    if rows != vocab_size:
        raise BadInput(
            f"{file}: would leave an embedding of {vocab_size} tokens beside a head of {rows}; save the adapter with "
            "both (save_embedding_layers=True)"
        )
    return override(config, vocab_size=vocab_size, tie_word_embeddings=is_tied)
