"""Low-rank adapters: a frozen weight matrix W learns an update of low rank, which is stored beside it.

    y = x W + s · x A B           LoRA: A [D, R], B [R, F] train              Hu et al. 2021, arXiv:2106.09685, eq. 3
    s = alpha / R                 alpha / √R with rsLoRA                      Kalajdzievski 2023, arXiv:2312.03732
    y = m · x V / ‖V‖             DoRA: m [F] trains, too; V = W + s A B      Liu et al. 2024, arXiv:2402.09353, eq. 5
    y = x W + s · x A M B         LoRA-XS: M [R, R] alone trains              Bałazy et al. 2024, arXiv:2405.17604
                                  A = U Σ, B = Vᵀ, of the largest singular values of W = U Σ Vᵀ
    M = Σᵢ vᵢ Pᵢ                  TinyLoRA: v alone trains, Pᵢ are random     Morris et al. 2026, arXiv:2602.04118
                                  A = U √Σ, B = √Σ Vᵀ, as in PEFT; in the paper they are those of LoRA-XS

Adapters are added by transforming a model's variables; no architecture's file knows of them. Two collections mirror the
paths of `params`, with a dict of factors in the place of each matrix: `lora` holds what trains, `lora_fixed` what does
not (the scale s, the rate of dropout, fixed factors). The linear layer adds the update when it finds factors at its
path, and so do stacked experts (`expert_dispatch`): W gets no gradient, and in training A B is never formed.

Factors of stacked layers are stacked like their matrices; layers without an adapter have the scale 0 there.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from llmq_jax.errors import BadInput, did_you_mean
from llmq_jax.field_types import check_fields, has_type, scalar

LORA, LORA_FIXED = "lora", "lora_fixed"
A, B, MIDDLE, NUMBERS, PROJECTIONS, MAGNITUDE, SCALE, DROPOUT = "A", "B", "M", "v", "P", "magnitude", "scale", "dropout"
RATIO = "ratio"
"""The entry of `lora_fixed` in which `measured` puts m / ‖V‖."""
TIED = "tied"
"""The entry of `lora` with TinyLoRA's v, if all matrices share one."""
WHOLE = "whole"
"""The entry of `lora_fixed` that names parameters which belong to the adapters whole, in place of the base's own (an
embedding, a head), each with one of these marks: {"lm_head": jnp.asarray(TRAINS)}."""
STAYS, TRAINS = 1.0, 2.0
"""What is whole stays as it came, or trains with the adapters, as PEFT's `modules_to_save` do. Marks are arrays,
because they stand in the variables, which checkpoints, meshes and `jax.jit` take for a tree of arrays."""
EXPERT_KERNELS = ("up_kernel", "down_kernel")
NUMBERS_BY_DEFAULT = 64
Variant = Literal["lora", "dora", "lora-xs", "tinylora"]
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
    variant: Variant = "lora"
    use_rslora: bool = False
    """Whether alpha is divided by the root of the rank in place of the rank (rsLoRA; use_rslora)."""
    dropout: float = 0.0
    """Rate of dropout on the update's input in training (lora_dropout)."""
    numbers: int | None = None
    """TinyLoRA: length of v (u); None is 64."""
    tied: bool = False
    """TinyLoRA: whether all matrices share one v (weight_tying=1)."""
    whole: str | tuple[str, ...] = ()
    """What trains whole beside them (modules_to_save): "token_embedding", "lm_head", or both."""

    def __post_init__(self) -> None:
        check_fields(self)

        def require(condition: bool, name: str, rule: str) -> None:
            if not condition:
                raise BadInput(f"LoRA: {name}={getattr(self, name)!r} {rule}")

        require(self.rank >= 1, "rank", "must be at least 1")
        require(self.alpha is None or 0 < self.alpha < math.inf, "alpha", "must be positive, and finite")
        require(0 <= self.dropout < 1, "dropout", "must be at least 0 and below 1")
        advice = did_you_mean(str(self.variant).lower(), get_args(Variant), count=1)
        require(self.variant in get_args(Variant), "variant", f"is unknown; {advice}")
        require(self.numbers is None or self.numbers >= 1, "numbers", "must be at least 1")
        tiny = self.variant == "tinylora"
        require(self.numbers is None or tiny, "numbers", "has no effect but on tinylora")
        require(not self.tied or tiny, "tied", "has no effect but on tinylora")
        for name, example in (("targets", ("query", "value")), ("whole", ("token_embedding", "lm_head"))):
            given = getattr(self, name)
            named = isinstance(given, Sequence) and all(isinstance(each, str) and "," not in each for each in given)
            require(named, name, f"must be a name, or several: {example}")
        require(len(self.targets) > 0, "targets", "names no matrix")
        listed = self.layers is None or isinstance(self.layers, Sequence)
        require(listed, "layers", "must be a sequence: (0, 1), or (1,) for one layer")
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
    scaled = along(fixed[SCALE], last) * last
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
    columns = jax.lax.stop_gradient(column_norms(kernel, first, last))
    ratio = trained[MAGNITUDE].reshape(columns.shape) / columns
    # A fresh m is the length that another program measured, and rounded otherwise: such a ratio has the value 1, so
    # that the adapter changes nothing at first, and keeps its gradient.
    rounding = max(8, kernel.shape[stack] ** 0.5 / 4) * jnp.finfo(jnp.float32).eps
    ratio += jax.lax.stop_gradient(jnp.where(jnp.abs(ratio - 1) <= rounding, 1 - ratio, 0))
    ratio = jnp.where(along(fixed[SCALE], columns) == 0, 1.0, ratio)
    return ratio.reshape(*kernel.shape[:stack], *kernel.shape[stack + 1 :])


def along(leading: Array, leaf: Array) -> Array:
    """A number for each entry of a leaf's first axes, so shaped that it multiplies the leaf."""
    return leading.reshape(leading.shape + (1,) * (leaf.ndim - leading.ndim))


def column_norms(kernel: Array, first: Array, last: Array) -> Float[Array, "*stack F"]:
    """‖W + A B‖ of each column: ‖w + A b‖² = ‖w‖² + 2 (Aᵀ w) · b + b · (Aᵀ A b), without forming A B. Kept above 0,
    also for a column of zeros, because it is a divisor."""
    stack = first.ndim - 2
    w, a = as_matrices(kernel, stack), first.astype(jnp.float32)
    b = as_matrices(last, stack)
    squares = jnp.square(w).sum(-2) + 2 * ((a.mT @ w) * b).sum(-2) + (b * (a.mT @ a @ b)).sum(-2)
    return jnp.sqrt(jnp.maximum(squares, jnp.finfo(jnp.float32).tiny))


def as_matrices(leaf: Array, stack: int) -> Float[Array, "*stack D F"]:
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


def without_adapters(variables: dict[str, Any]) -> dict[str, Any]:
    """The variables of the base alone."""
    return {name: tree for name, tree in variables.items() if name not in (LORA, LORA_FIXED)}


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
    with jax.default_matmul_precision("highest"):  # as `_merged` has it
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
    and put beside them. How long DoRA's columns were before is told by the matrices of `adapted`, which have to be
    those that the adapters were merged into.

    BadInput for `variables` whose adapters are not merged; for those of another model; for a column whose DoRA
    magnitude is 0, of which merging left nothing; and for a DoRA beside other matrices than it was merged into.
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
    parted = _moved(variables, found, _unmerged)
    own, result = (flatten_dict(each["params"]) for each in (adapted, parted))
    for path, (trained, fixed) in found.items():
        if MAGNITUDE in trained and not _same_columns(result[path], own[path], trained, fixed):
            raise BadInput(
                f"adapters at {'/'.join(path)}, a DoRA, were merged into another matrix, or in a coarser type; load "
                "them onto that base, in that type"
            )
    return parted | {name: adapted[name] for name in (LORA, LORA_FIXED) if name in adapted}


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
    rest = without_adapters(variables)
    return {**rest, "params": unflatten_dict(params)} if found else rest


@jax.jit
def _merged(kernel: Array, trained: dict[str, Any], fixed: dict[str, Any]) -> Array:
    with jax.default_matmul_precision("highest"):  # not TF32 on a GPU: what is merged once stays in the weights
        first, last = factors(trained, fixed)
        stack = first.ndim - 2
        total = as_matrices(kernel, stack) + first.astype(jnp.float32) @ as_matrices(last, stack)
        total = total.reshape(kernel.shape)
        if MAGNITUDE in trained:
            total *= jnp.expand_dims(magnitude_ratio(kernel, first, last, trained, fixed), stack)
        return total.astype(kernel.dtype)


@jax.jit
def _unmerged(merged: Array, trained: dict[str, Any], fixed: dict[str, Any]) -> Array:
    """W, from what `_merged` makes of it; of DoRA `fixed` has the ratio."""
    stack = (trained | fixed)[A].ndim - 2
    scaled = merged / jnp.expand_dims(fixed[RATIO], stack) if RATIO in fixed else merged
    plain = {name: leaf for name, leaf in trained.items() if name != MAGNITUDE}
    kernel: Array = _merged(scaled, plain, {**fixed, SCALE: -fixed[SCALE]})
    return kernel.astype(merged.dtype)


@jax.jit
def _same_columns(found: Array, kernel: Array, trained: dict[str, Any], fixed: dict[str, Any]) -> Array:
    """Whether two matrices differ by no more than merging and unmerging round, in layers that have an adapter."""
    with jax.default_matmul_precision("highest"):
        first, last = factors(trained, fixed)
        norms = column_norms(kernel, first, last)
    stack = first.ndim - 2
    one, other = as_matrices(found, stack), as_matrices(kernel, stack)
    # What is rounded is W and W + s A B, each in the coarser of both types; sums in float32 add 1e-5 at most.
    lengths = jnp.linalg.norm(other, axis=-2) + norms
    rounding = 2 * max(jnp.finfo(found.dtype).eps, jnp.finfo(kernel.dtype).eps) + 1e-5
    near = jnp.linalg.norm(one - other, axis=-2) <= rounding * lengths
    return jnp.all(near | (along(fixed[SCALE], near) == 0))


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
    """The names of the parameters (an embedding, a head) that train whole beside the adapters."""
    return {name for name, mark in variables.get(LORA_FIXED, {}).get(WHOLE, {}).items() if np.asarray(mark) == TRAINS}


def trained_numbers(variables: dict[str, Any]) -> int:
    """How many values train, counted only in layers that have adapters."""
    total: int = sum(leaf.size for leaf in jax.tree.leaves(variables[LORA].get(TIED, {})))
    for path, (trained, fixed) in adapters(variables).items():
        if path != (TIED,) and trained:
            share = np.count_nonzero(fixed[SCALE]) / fixed[SCALE].size
            total += round(share * sum(leaf.size for leaf in trained.values()))
    return total
