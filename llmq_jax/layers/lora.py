"""Low-rank adapters: a frozen weight matrix W learns an update of low rank, which is stored beside it.

    y = x W + s · x A B           LoRA: A [D, R], B [R, F] train              Hu et al. 2021, arXiv:2106.09685, eq. 3
    s = alpha / R                 alpha / √R with rsLoRA                      Kalajdzievski 2023, arXiv:2312.03732
    y = m · x V / ‖V‖             DoRA: m [F] trains, too; V = W + s A B      Liu et al. 2024, arXiv:2402.09353, eq. 5
    y = x W + s · x A M B         LoRA-XS: M [R, R] alone trains              Bałazy et al. 2024, arXiv:2405.17604
                                  A = U Σ, B = Vᵀ, of the largest singular values of W = U Σ Vᵀ
    M = Σᵢ vᵢ Pᵢ                  TinyLoRA: v alone trains, Pᵢ are random     Morris et al. 2026, arXiv:2602.04118
                                  A = U √Σ, B = √Σ Vᵀ

Adapters are added by transforming a model's variables; no architecture's file knows of them. Two collections mirror the
paths of `params`, with a dict of factors in the place of each matrix: `lora` holds what trains, `lora_fixed` what does
not (the scale s, the rate of dropout, fixed factors). The linear layer adds the update when it finds factors at its
path, and so do stacked experts (`expert_dispatch`): W gets no gradient, and in training A B is never formed.

Factors of stacked layers are stacked like their matrices; layers without an adapter have the scale 0 there.
"""

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from llmq_jax.errors import BadInput, close_names
from llmq_jax.field_types import check_fields, has_type, scalar
from llmq_jax.layers.axes import on_host

LORA, LORA_FIXED = "lora", "lora_fixed"
A, B, MIDDLE, NUMBERS, PROJECTIONS, MAGNITUDE, SCALE, DROPOUT = "A", "B", "M", "v", "P", "magnitude", "scale", "dropout"
RATIO = "ratio"
"""The entry of `lora_fixed` in which `measured` puts m / ‖V‖."""
TIED = "tied"
"""The entry of `lora` with TinyLoRA's v, if all matrices share one."""
WHOLE = "whole"
"""The entry of `lora_fixed` that names parameters which came whole with the adapters, in place of the base's own (an
embedding, a head), each with one of these marks: {"lm_head": jnp.asarray(TRAINS)}."""
STAYS, TRAINS = 1.0, 2.0
"""What came whole stays as it is, or trains on with the adapters, as PEFT's `modules_to_save` do. Marks are arrays,
because they stand in the variables, which checkpoints, meshes and `jax.jit` take for a tree of arrays."""
NUMBERS_BY_DEFAULT = 64
Path = tuple[str, ...]
Adapter = tuple[dict[str, Any], dict[str, Any]]
"""What stands beside one matrix: (factors that train, factors that are fixed), each by name."""


@dataclass(frozen=True)
class LoRA:
    """What adapters to add, and where. PEFT's names in brackets."""

    rank: int = 8
    """R (r)."""
    alpha: float | None = None
    """The update is multiplied by alpha / rank (lora_alpha), in all variants; None is twice the rank."""
    targets: str | tuple[str, ...] = "all-linear"
    """"all-linear" (attention and feed-forward networks, experts too), "attention", "mlp", or patterns of names
    (target_modules)."""
    layers: tuple[int, ...] | None = None
    """Layers that get them, from 0 on; None is all (layers_to_transform)."""
    variant: Literal["lora", "dora", "lora-xs", "tinylora"] = "lora"
    use_rslora: bool = False
    """Whether alpha is divided by the root of the rank in place of the rank (rsLoRA; use_rslora)."""
    dropout: float = 0.0
    """Rate of dropout on the update's input in training (lora_dropout)."""
    numbers: int | None = None
    """TinyLoRA: length of v (u); None is 64."""
    tied: bool = False
    """TinyLoRA: whether all matrices share one v (weight_tying=1)."""

    def __post_init__(self) -> None:
        check_fields(self)

        def require(condition: bool, name: str, rule: str) -> None:
            if not condition:
                raise BadInput(f"LoRA: {name}={getattr(self, name)!r} {rule}")

        require(self.rank >= 1, "rank", "must be at least 1")
        require(self.alpha is None or 0 < self.alpha < math.inf, "alpha", "must be positive, and finite")
        require(0 <= self.dropout < 1, "dropout", "must be at least 0 and below 1")
        require(self.variant in ("lora", "dora", "lora-xs", "tinylora"), "variant", "is unknown")
        require(self.numbers is None or self.numbers >= 1, "numbers", "must be at least 1")
        tiny = self.variant == "tinylora"
        require(self.numbers is None or tiny, "numbers", "has no effect but on tinylora")
        require(not self.tied or tiny, "tied", "has no effect but on tinylora")
        require(isinstance(self.targets, Sequence), "targets", "must be a name, or several: ('query', 'value')")
        require(len(self.targets) > 0, "targets", "names no matrix")
        named = all(isinstance(target, str) for target in self.targets)
        require(named, "targets", "must be a name, or several: ('query', 'value')")
        require(self.layers is None or isinstance(self.layers, Sequence), "layers", "must be a sequence: (0, 1)")
        require(self.layers is None or len(self.layers) > 0, "layers", "names no layer")
        numbered = all(has_type(scalar(layer), int) for layer in self.layers or ())
        require(numbered, "layers", "must be a sequence of whole numbers: (0, 1)")

    @property
    def scale(self) -> float:
        """What the update is multiplied by: alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    @property
    def length(self) -> int:
        """TinyLoRA: length of v."""
        return NUMBERS_BY_DEFAULT if self.numbers is None else self.numbers


# What a layer computes.


def adapted(
    x: Float[Array, "M D"],
    y: Float[Array, "M *features"],
    kernel: Float[Array, "D *features"],
    trained: dict[str, Any],
    fixed: dict[str, Any],
    dropout_key: Any = None,
) -> Float[Array, "M *features"]:
    """The output of the adapted layer, from y = x W. DoRA's norm is a constant in gradients (section 4.3 of its
    paper)."""
    if DROPOUT in fixed and dropout_key is not None:
        keep = 1.0 - fixed[DROPOUT]
        kept = jax.random.bernoulli(dropout_key, keep, x.shape)
        x = jnp.where(kept, x / jnp.where(keep > 0, keep, 1.0).astype(x.dtype), 0)  # x / 0 has the gradient 0 · inf
    first, last = factors(trained, fixed)
    low = x.astype(y.dtype) @ first.astype(y.dtype)
    y = y + raised(low, last.astype(y.dtype).reshape(last.shape[0], -1)).reshape(y.shape)
    if MAGNITUDE in trained:
        # In float32: near 1, where all these ratios start, bfloat16 is too coarse for what m learns.
        y = (y * magnitude_ratio(kernel, first, last, trained, fixed)).astype(y.dtype)
    return y


@jax.custom_vjp
def raised(low: Float[Array, "M R"], last: Float[Array, "R F"]) -> Float[Array, "M F"]:
    """low B. The gradient of B is formed as lowᵀ grad, with R rows: JAX would form (gradᵀ low)ᵀ, with F rows and only R
    columns, which XLA's CPU backend computes several times as slowly.

    The forward rule calls this function, where no policy of remat looks for products to keep: this one is as large as
    x W, which is kept, and takes no longer to compute than to read."""
    return low @ last


raised.defvjp(
    lambda low, last: (raised(low, last), (low, last)),
    lambda saved, grad: (grad @ saved[1].T, jax.lax.dot_general(saved[0], grad, (((0,), (0,)), ((), ())))),
)


def factors(trained: dict[str, Any], fixed: dict[str, Any]) -> tuple[Float[Array, "*stack D R"], Array]:
    """(A [*stack, D, R], s M B [*stack, R, *features]): the two matrices whose product is added to W."""
    first, last = (trained[name] if name in trained else fixed[name] for name in (A, B))
    scaled = _along(fixed[SCALE], last) * last
    if NUMBERS in trained:
        middle = jnp.einsum("...u,...urs->...rs", trained[NUMBERS], fixed[PROJECTIONS])
    elif MIDDLE in trained:
        middle = trained[MIDDLE]
    else:
        return first, scaled
    stack = first.ndim - 2
    flat = scaled.reshape(*scaled.shape[: stack + 1], -1)
    return first, (middle @ flat).reshape(scaled.shape)


def magnitude_ratio(kernel: Array, first: Array, last: Array, trained: dict[str, Any], fixed: dict[str, Any]) -> Array:
    """DoRA's m / ‖V‖ of each column of V = W + A B, with s contained in B; 1 in layers without an adapter. What
    `measured` has put there is taken as it is."""
    if RATIO in fixed:
        ratio: Array = fixed[RATIO]
        return ratio
    stack = first.ndim - 2
    columns = jax.lax.stop_gradient(_column_norms(kernel, first, last))
    ratio = jnp.where(_along(fixed[SCALE], columns) == 0, 1.0, trained[MAGNITUDE].reshape(columns.shape) / columns)
    return ratio.reshape(*kernel.shape[:stack], *kernel.shape[stack + 1 :])


def _along(leading: Array, leaf: Array) -> Array:
    """A number for each entry of a leaf's first axes, so shaped that it multiplies the leaf."""
    return leading.reshape(leading.shape + (1,) * (leaf.ndim - leading.ndim))


def _column_norms(kernel: Array, first: Array, last: Array) -> Float[Array, "*stack F"]:
    """‖W + A B‖ of each column: ‖w + A b‖² = ‖w‖² + 2 (Aᵀ w) · b + b · (Aᵀ A b), without forming A B. Kept above 0,
    also for a column of zeros, because it is a divisor."""
    stack = first.ndim - 2
    w, a = _matrices(kernel, stack), first.astype(jnp.float32)
    b = _matrices(last, stack)
    squares = jnp.square(w).sum(-2) + 2 * ((a.mT @ w) * b).sum(-2) + (b * (a.mT @ a @ b)).sum(-2)
    return jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))


def _matrices(leaf: Array, stack: int) -> Float[Array, "*stack D F"]:
    """[*stack, D, *features] in float32, with features flattened; `stack` counts the leading axes."""
    return leaf.astype(jnp.float32).reshape(*leaf.shape[: stack + 1], -1)


# Transformations of variables with adapters.


def adapters(variables: dict[str, Any]) -> dict[Path, Adapter]:
    """The adapter at each path of a matrix in `params`, and at (TIED,) the numbers that matrices share, before
    `spread`."""
    found: dict[Path, Adapter] = {}
    for place, collection in enumerate((LORA, LORA_FIXED)):
        for (*path, name), leaf in flatten_dict(variables.get(collection, {})).items():
            if path[0] != WHOLE:
                found.setdefault(tuple(path), ({}, {}))[place][name] = leaf
    return found


def from_adapters(found: dict[Path, Adapter]) -> dict[str, Any]:
    """The two collections, from what `adapters` returns."""
    trained, fixed = (
        {(*path, name): leaf for path, adapter in found.items() for name, leaf in adapter[place].items()}
        for place in (0, 1)
    )
    return {LORA: unflatten_dict(trained), LORA_FIXED: unflatten_dict(fixed)}


def measured(variables: dict[str, Any]) -> dict[str, Any]:
    """The variables for passes in which nothing trains, with DoRA's m / ‖V‖ beside its factors: else each pass would
    measure the columns again. Of the adapters' collections, only what `adapters` finds is kept."""
    found = adapters(variables)
    for path, (trained, fixed) in found.items():
        if MAGNITUDE in trained:
            kernel: Any = flatten_dict(variables["params"])[path]
            fixed[RATIO] = _ratio(kernel, trained, fixed)
    return {**variables, **from_adapters(found)} if found else variables


@jax.jit
def _ratio(kernel: Array, trained: dict[str, Any], fixed: dict[str, Any]) -> Array:
    return magnitude_ratio(kernel, *factors(trained, fixed), trained, fixed)


def merge(variables: dict[str, Any]) -> dict[str, Any]:
    """The same model without adapters: W + s A B in W's place, formed in float32 and rounded to W's type. In bfloat16
    the rounding may lose a good part of a small update."""
    return _moved(variables, adapters(variables), _merged)


def merge_when_read(variables: dict[str, Any]) -> dict[str, Any]:
    """The same as `merge`, with an `Unmerged` in the place of each matrix that has an adapter."""
    return _moved(variables, adapters(variables), Unmerged)


@dataclass(frozen=True)
class Unmerged:
    """A matrix, or a stack of them, beside its adapter. A part is merged when it is asked for, so that not all matrices
    need be there twice; half of a matrix that holds two is merged with the other half, each time."""

    kernel: Array
    trained: dict[str, Any]
    fixed: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @property
    def dtype(self) -> Any:
        return self.kernel.dtype

    def __getitem__(self, slot: tuple[Any, ...]) -> Array:
        stack = (self.trained | self.fixed)[A].ndim - 2
        at = tuple(itertools.takewhile(lambda index: isinstance(index, int), slot))[:stack]
        trained, fixed = (
            {name: leaf[at[: leaf.ndim]] for name, leaf in part.items()} for part in (self.trained, self.fixed)
        )
        part: Array = _merged(self.kernel[at], trained, fixed)[slot[len(at) :]]
        return part


def unmerge(variables: dict[str, Any], adapted: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `merge`, up to rounding: the adapters of `adapted` are subtracted from the matrices of `variables`
    and put beside them. How long DoRA's columns were before is told by the matrices of `adapted`.

    BadInput for `variables` whose adapters are not merged; for those of another model; and for a column whose DoRA
    magnitude is 0, of which merging left nothing.
    """
    if LORA in variables:
        raise BadInput("this model has adapters beside its matrices, so that they are not merged; merge them first")
    found = adapters(measured(spread(adapted)))
    for path, (_, fixed) in found.items():
        if RATIO in fixed and not fixed[RATIO].all():
            raise BadInput(f"adapters at {'/'.join(path)} have a magnitude of 0, which nothing undoes; keep the base")
    for name in adapted.get(LORA_FIXED, {}).get(WHOLE, {}):
        own, here = (jax.tree.map(jnp.shape, each["params"].get(name)) for each in (adapted, variables))
        if own != here:
            raise BadInput(f"adapters with a {name} {own}, where this model has {here}; load those of this model")
    beside = {name: adapted[name] for name in (LORA, LORA_FIXED) if name in adapted}
    return _moved(variables, found, _unmerged) | beside


def _moved(variables: dict[str, Any], found: Mapping[Path, Adapter], moved: Callable[..., Any]) -> dict[str, Any]:
    """`variables` without adapters; in the place of each matrix that has one, what `moved` makes of it and them."""
    params = flatten_dict(variables["params"]) if found else {}
    missing = [path for path in found if path not in params]
    if missing:
        raise BadInput(f"adapters at {'/'.join(missing[0])}, where this model has no matrix; load those of this model")
    for path, adapter in found.items():
        first, last = factors(*adapter)
        shape = (*first.shape[:-1], *last.shape[first.ndim - 1 :])
        if shape != params[path].shape:
            raise BadInput(
                f"adapters at {'/'.join(path)} of a matrix {list(shape)}, where this model has "
                f"{list(params[path].shape)}; load those of this model"
            )
    params |= {path: moved(params[path], *adapter) for path, adapter in found.items()}
    rest = {name: tree for name, tree in variables.items() if name not in (LORA, LORA_FIXED)}
    return {**rest, "params": unflatten_dict(params)} if found else rest


@jax.jit
def _merged(kernel: Array, trained: dict[str, Any], fixed: dict[str, Any]) -> Array:
    with jax.default_matmul_precision("highest"):  # not TF32 on a GPU: what is merged once stays in the weights
        first, last = factors(trained, fixed)
        stack = first.ndim - 2
        total = _matrices(kernel, stack) + first.astype(jnp.float32) @ _matrices(last, stack)
        total = total.reshape(kernel.shape)
        if MAGNITUDE in trained:
            total *= jnp.expand_dims(magnitude_ratio(kernel, first, last, trained, fixed), stack)
        return total.astype(kernel.dtype)


@jax.jit
def _unmerged(merged: Array, trained: dict[str, Any], fixed: dict[str, Any]) -> Array:
    """W, from what `_merged` makes of it; of DoRA `fixed` has the ratio."""
    stack = (trained | fixed)[A].ndim - 2
    scaled = merged / jnp.expand_dims(fixed[RATIO], stack) if RATIO in fixed else merged
    undone = {name: leaf for name, leaf in trained.items() if name != MAGNITUDE}, {**fixed, SCALE: -fixed[SCALE]}
    kernel: Array = _merged(scaled, *undone)
    return kernel.astype(merged.dtype)


# Fresh adapters.


def add(
    variables: dict[str, Any],
    layer_paths: Sequence[tuple[tuple[str, str], int]],
    spec: LoRA,
    aliases: Mapping[str, Collection[str]] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The variables with fresh adapters, which do not change the outputs yet.

    `layer_paths` are the model's. `aliases` are other names of matrices: {"q_proj": {"attention/query"}}.
    BadInput: there are adapters already, a pattern or layer names nothing, the rank is above that of a matrix.
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
    return {**variables, **trees}


def spread(variables: dict[str, Any]) -> dict[str, Any]:
    """Variables in which TinyLoRA's shared v is repeated at each matrix, where the model reads it."""
    if TIED not in variables.get(LORA, {}):
        return variables
    numbers = variables[LORA][TIED][NUMBERS]
    each = {
        (*path[:-1], NUMBERS): jnp.broadcast_to(numbers, leaf.shape[:-2])
        for path, leaf in flatten_dict(variables[LORA_FIXED]).items()
        if path[-1] == PROJECTIONS
    }
    return {**variables, LORA: unflatten_dict(each)}


def trained_whole(variables: dict[str, Any]) -> set[str]:
    """The names of the parameters (an embedding, a head) that came whole with the adapters and train on with them."""
    return {name for name, mark in variables.get(LORA_FIXED, {}).get(WHOLE, {}).items() if np.asarray(mark) == TRAINS}


def trained_numbers(variables: dict[str, Any]) -> int:
    """How many values train, counted only in layers that have adapters."""
    total: int = sum(leaf.size for leaf in jax.tree.leaves(variables[LORA].get(TIED, {})))
    for path, (trained, fixed) in adapters(variables).items():
        if path != (TIED,) and trained:
            share = np.count_nonzero(fixed[SCALE]) / fixed[SCALE].size
            total += round(share * sum(leaf.size for leaf in trained.values()))
    return total


ALL_LINEAR, ATTENTION, MLP = "all-linear", "attention", "mlp"
EXPERT_KERNELS = ("up_kernel", "down_kernel")
CHOOSERS = ("router", "noise")
"""Layers of a mixture of experts that "all-linear" leaves out: those that choose the experts stay as they are."""


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
    stacked = path[0].startswith("group_")
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
        return leaf * _along(chosen, leaf)

    lead = kernel.shape[:stack]
    fixed: dict[str, Array] = {SCALE: in_chosen(jnp.full(lead[:stacked], spec.scale, jnp.float32))}
    if spec.dropout:
        fixed[DROPOUT] = jnp.full(lead[:stacked], spec.dropout, jnp.float32)
    if spec.variant in ("lora", "dora"):
        # Kaiming's uniform with a = √5, PEFT's choice: U(-1/√D, 1/√D).
        first = jax.random.uniform(key, (*lead, width, spec.rank), minval=-1, maxval=1) / width**0.5
        trained = {A: in_chosen(first), B: jnp.zeros((*lead, spec.rank, *features))}
        if spec.variant == "dora":
            trained[MAGNITUDE] = _column_norms(kernel, trained[A], trained[B]).reshape(*lead, *features)
        return trained, fixed
    left, values, right = _largest_singular(on_host(_matrices(kernel, stack)), spec.rank)
    tiny = spec.variant == "tinylora"
    before, after = (np.sqrt(values), np.sqrt(values)) if tiny else (values, np.ones_like(values))
    fixed[A] = jnp.asarray(left * before[..., None, :])
    fixed[B] = jnp.asarray(after[..., None] * right).reshape(*lead, spec.rank, *features)
    if not tiny:
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
