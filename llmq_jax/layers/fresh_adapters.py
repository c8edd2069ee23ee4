"""Fresh adapters for a model: which of its matrices get one, and the factors that an adapter starts from."""

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array

from llmq_jax.errors import BadInput, close_names
from llmq_jax.layers.axes import is_stacked, on_host
from llmq_jax.layers.lora import (
    DROPOUT,
    EXPERT_KERNELS,
    LORA,
    LORA_FIXED,
    MAGNITUDE,
    MIDDLE,
    NUMBERS,
    PROJECTIONS,
    SCALE,
    TIED,
    TRAINS,
    WHOLE,
    A,
    Adapter,
    B,
    LoRA,
    Path,
    along,
    as_matrices,
    column_norms,
    from_adapters,
)

ALL_LINEAR, ATTENTION, MLP = "all-linear", "attention", "mlp"
EMBEDDING, HEAD, SCORE = "token_embedding", "lm_head", "score"
CHOOSERS = ("router", "noise")
"""Layers of a mixture of experts that "all-linear" leaves out: those that choose the experts stay as they are."""


def add_adapters(
    variables: dict[str, Any],
    layer_paths: Sequence[tuple[tuple[str, str], int]],
    spec: LoRA,
    aliases: Mapping[str, Collection[str]] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The variables with fresh adapters, which do not change the outputs yet.

    `layer_paths` are the model's. `aliases` are other names of matrices: {"q_proj": {"attention/query"}}.
    BadInput: there are adapters already, a pattern or layer names nothing, the rank is above that of a matrix, what is
    to train whole is no embedding or head.
    """
    if LORA in variables:
        raise BadInput("this model has adapters already; merge them first, or start from the base")
    params = flatten_dict(variables["params"])
    chosen = _chosen(params, layer_paths, spec, aliases or {})
    keys = jax.random.split(jax.random.key(seed), len(chosen))
    fresh = {
        path: _fresh(params[path], path, np.array(in_layer), spec, key)
        for key, (path, in_layer) in zip(keys, chosen.items(), strict=True)
    }
    trees = from_adapters(fresh)
    if spec.tied:
        trees[LORA] = {TIED: {NUMBERS: jnp.zeros(spec.length)}}
    if spec.whole:
        trees[LORA_FIXED][WHOLE] = {name: jnp.asarray(TRAINS) for name in _whole(params, spec, aliases or {}, chosen)}
    return {**variables, **trees}


def own_names(names: str | Sequence[str], aliases: Mapping[str, Collection[str]]) -> dict[str, str]:
    """{our name: the name given} of an embedding or a head."""
    given = (names,) if isinstance(names, str) else names
    return {next(iter(aliases.get(name, {name}))): name for name in given}


def _whole(
    params: Mapping[Path, Any], spec: LoRA, aliases: Mapping[str, Collection[str]], adapted: Collection[Path]
) -> list[str]:
    """Our names of what trains whole; BadInput for what cannot."""
    parts = {path[0] for path in params}
    there = [name for name in (EMBEDDING, HEAD) if name in parts]
    own = own_names(spec.whole, aliases)
    for name, given in own.items():
        at_fault = f"LoRA: whole={given!r}"
        if (name, "kernel") in adapted:
            raise BadInput(f"{at_fault} has an adapter among the targets; leave it out there, or here")
        if name == SCORE and SCORE in parts:
            raise BadInput(f"{at_fault} is a classifier's head, which trains anyway; leave it out")
        if name == HEAD and parts.isdisjoint((HEAD, SCORE)):
            raise BadInput(f"{at_fault} is one matrix with the embedding in this model; name {EMBEDDING} alone")
        if name not in there:
            raise BadInput(f"{at_fault} is no embedding or head of this model; choose from {', '.join(there)}")
    return list(own)


def _chosen(
    params: Mapping[Path, Any], layer_paths: Sequence[Any], spec: LoRA, aliases: Mapping[str, Collection[str]]
) -> dict[Path, list[bool]]:
    """{path of a matrix: for each repetition of its block, whether it gets an adapter}."""
    layers = range(len(layer_paths)) if spec.layers is None else spec.layers
    outside = [layer for layer in layers if not 0 <= layer < len(layer_paths)]
    if outside:
        raise BadInput(f"LoRA: layer {outside[0]} does not exist; the model has layers 0 to {len(layer_paths) - 1}")
    places: dict[Path, list[bool]] = {block: [] for block, _ in layer_paths}
    for layer, (block, _) in enumerate(layer_paths):
        places[block].append(layer in layers)
    matrices = {
        path: "/".join(path[2:] if path[-1] in EXPERT_KERNELS else path[2:-1])
        for path in sorted(params)
        if path[:2] in places and path[-1] in ("kernel", *EXPERT_KERNELS)
    }
    matrices |= {path: path[0] for path in sorted(params) if len(path) == 2 and path[-1] == "kernel"}
    aliases = {name: theirs for name, theirs in aliases.items() if {*theirs} & {*matrices.values()}}
    patterns = (spec.targets,) if isinstance(spec.targets, str) else spec.targets
    wanted: set[Path] = set()
    for pattern in patterns:
        found = {path for path, name in matrices.items() if _means(pattern, path, name, aliases)}
        in_layers = {path for path in found if any(places.get(path[:2], [True]))}
        if found and not in_layers:
            raise BadInput(f"LoRA: layers {', '.join(map(str, layers))} have no {pattern}; leave it out")
        if not found:
            names = [ALL_LINEAR, ATTENTION, MLP, *sorted(set(matrices.values()))]
            if near := close_names(pattern, [*names, *sorted(aliases)], 1):
                raise BadInput(f"LoRA: {pattern!r} matches no matrix; did you mean {near[0]}?")
            raise BadInput(
                f"LoRA: {pattern!r} matches no matrix; there are {', '.join(names)}"
                + (f", or by their other names {', '.join(sorted(aliases))}" if aliases else "")
            )
        wanted |= in_layers
    return {path: places.get(path[:2], [True]) for path in sorted(wanted)}


def _means(pattern: str, path: Path, name: str, aliases: Mapping[str, Collection[str]]) -> bool:
    in_block, parts = len(path) > 2, name.split("/")
    ordinary = in_block and not any(part in CHOOSERS for part in parts)
    if pattern == ALL_LINEAR:
        return ordinary
    if pattern in (ATTENTION, MLP):
        return ordinary and (parts[0] == ATTENTION) == (pattern == ATTENTION)
    names = {name, parts[-1], *(alias for alias, theirs in aliases.items() if name in theirs)}
    return any(fnmatch(candidate, pattern) for candidate in names)


def _fresh(kernel: Array, path: Path, in_layer: np.ndarray, spec: LoRA, key: Array) -> Adapter:
    """The adapter of one matrix, or of a stack of them; `in_layer` says which of the stack have one."""
    name = "/".join(path)
    stacked = is_stacked(path[0])
    of_experts = path[-1] in EXPERT_KERNELS
    stack = stacked + of_experts
    width, features = kernel.shape[stack], kernel.shape[stack + 1 :]
    smaller = min(width, int(np.prod(features)))
    if spec.rank > smaller:
        raise BadInput(
            f"LoRA: rank={spec.rank} is above that of {name}, a matrix of rank {smaller}; choose a lower one"
        )
    if of_experts and (spec.dropout or spec.variant == "dora"):
        what = f"dropout={spec.dropout}" if spec.dropout else f"variant={spec.variant!r}"
        raise BadInput(f"LoRA: {what} does not act on stacked experts ({name}); choose targets without them")

    if spec.dropout and not stacked:  # a head is applied chunk by chunk, in the loss, without random numbers
        raise BadInput(f"LoRA: dropout={spec.dropout} does not act on the head ({name}); choose targets without it")

    chosen = jnp.asarray(in_layer if stacked else in_layer[0])

    def in_chosen(leaf: Array) -> Array:
        return leaf * along(chosen, leaf)

    lead = kernel.shape[:stack]
    fixed: dict[str, Array] = {SCALE: in_chosen(jnp.full(lead[:stacked], spec.scale, jnp.float32))}
    if spec.dropout:
        fixed[DROPOUT] = jnp.full(lead[:stacked], spec.dropout, jnp.float32)
    if spec.variant in ("lora", "dora"):
        # Kaiming's uniform with a = √5, PEFT's choice: U(-1/√D, 1/√D).
        first = jax.random.uniform(key, (*lead, width, spec.rank), minval=-1, maxval=1) / width**0.5
        trained = {A: in_chosen(first), B: jnp.zeros((*lead, spec.rank, *features))}
        if spec.variant == "dora":
            trained[MAGNITUDE] = column_norms(kernel, trained[A], trained[B]).reshape(*lead, *features)
        return trained, fixed
    left, values, right = _largest_singular(on_host(as_matrices(kernel, stack)), spec.rank)
    tiny = spec.variant == "tinylora"
    before, after = (np.sqrt(values), np.sqrt(values)) if tiny else (values, np.ones_like(values))
    fixed[A] = jnp.asarray(left * before[..., None, :])
    fixed[B] = jnp.asarray(after[..., None] * right).reshape(*lead, spec.rank, *features)
    if not tiny:  # M is 0, so that nothing changes at first; the paper draws it from normal(1e-5)
        return {MIDDLE: jnp.zeros((*lead, spec.rank, spec.rank))}, fixed
    # Normal with the variance 1 / R, as PEFT; the paper does not say.
    fixed[PROJECTIONS] = jax.random.normal(key, (*lead, spec.length, spec.rank, spec.rank)) / spec.rank**0.5
    return {NUMBERS: jnp.zeros((*lead, spec.length))}, fixed


def _largest_singular(matrices: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(U [*, D, R], Σ [*, R], Vᵀ [*, R, F]) of the largest singular values, from the smaller Gram matrix in float64:
    several times as fast as a full singular value decomposition."""
    from scipy.linalg import eigh

    def of_one(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if w.shape[0] > w.shape[1]:
            left, values, right = of_one(w.T)
            return right.T, values, left.T
        size = len(w)
        squares, left = eigh(w @ w.T, subset_by_index=(size - rank, size - 1))
        left, values = left[:, ::-1], np.sqrt(np.maximum(squares[::-1], 0))
        real = values > values[0] * np.finfo(np.float32).eps  # smaller ones are rounding errors of a lower rank
        values = np.where(real, values, 0)
        return left, values, np.where(real, left / np.where(real, values, 1), 0).T @ w

    stack = matrices.shape[:-2]
    parts = [of_one(w) for w in matrices.astype(np.float64).reshape(-1, *matrices.shape[-2:])]
    left, values, right = (
        np.stack(part).reshape(*stack, *part[0].shape).astype(np.float32) for part in zip(*parts, strict=True)
    )
    return left, values, right
