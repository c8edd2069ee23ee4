"""The parameters of a parity check: named, filled from the reference, perturbed, and their gradients compared."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llmq_jax.errors import BadInput, did_you_mean
from llmq_jax.interop.tables import Placement, WeightTable
from llmq_jax.models import abstract_variables, init
from llmq_jax.models.decoder import Decoder
from llmq_jax.objectives.next_token import NextToken

LayerPaths = Sequence[tuple[tuple[str, str], int]]
"""A model's `layer_paths()`."""

PERTURBATION = 0.1
"""How much of its size `perturb` adds to a parameter."""

IN_A_LAYER, IN_ALL_LAYERS = 2, 25
"""Two correct implementations may differ by this many times the effect of other last bits in the parameters: within a
layer that has the same input on both sides, and after all layers. Measured on SmolLM2: at most 0.7 times, and 9 or 23
times, depending on the processor."""


class Difference(NamedTuple):
    """How far ours is from theirs."""

    absolute: float
    """The largest difference of two elements."""
    relative: float
    """The same relative to the size of what is compared."""
    rounding: float = 0.0
    """How much of `relative` rounding explains, from how far theirs moves with the last bits of its parameters."""

    def above(self, tolerance: float) -> bool:
        return not self.relative <= max(tolerance, self.rounding)  # NaN is above


class Gradient(NamedTuple):
    """How far apart a parameter's gradients are."""

    key: str
    """The parameter's name in a file."""
    ours: str
    layer: int | None
    difference: Difference
    """Relative to the largest element of theirs."""


class Unmatched(NamedTuple):
    """Parameters that do not match: one side lacks them, or has another shape."""

    theirs: tuple[str, ...]
    """In transformers' files, but not read by the weight table."""
    ours: tuple[str, ...]
    """Not in the files, or not in the weight table: these keep their initial values."""
    other_shape: tuple[str, ...]
    """On both sides, in shapes that do not fit; ours keeps its initial value."""


def home(placement: Placement, layer_paths: LayerPaths) -> tuple[int | None, tuple[str, ...]]:
    """(layer, path inside its block) of a leaf, or (None, path inside the model) where it stands outside the layers."""
    path = placement.path[1:]  # without the collection
    for layer, (block, repeat) in enumerate(layer_paths):
        if path[:2] == block and placement.slot[:1] == (repeat,):
            return layer, path[2:]
    return None, path


def our_name(placement: Placement) -> str:
    """`group_0/block_0/mlp/up/kernel[3]`: a leaf and, where layers are stacked in it, which of them."""
    index = ", ".join({"Ellipsis": "...", "slice(None, None, None)": ":"}.get(str(i), str(i)) for i in placement.slot)
    return _join(placement.path) + (f"[{index}]" if index else "")


def _join(path: tuple[str, ...]) -> str:
    return "/".join(path[1:] if path[0] == "params" else path)


def fill(config: Any, table: WeightTable, state: Mapping[str, np.ndarray]) -> tuple[dict, Unmatched]:
    """Our variables in float32 from the reference's tensors, and what did not fit.

    Less strict than `from_state_dict`, which refuses incomplete weights: whoever is halfway through a port wants to see
    how far it gets.
    """
    shapes = flatten_dict(abstract_variables(config))
    placements = table.placements(config)
    absent, other_shape, fitting = [], [], []
    for placement in placements:
        shape, tensor = placement.our_shape(shapes[placement.path].shape), state.get(placement.key)
        expected = placement.transform.their_shape(shape)
        if tensor is None and not placement.optional:
            absent.append(our_name(placement))
        elif tensor is not None and tensor.shape != expected:
            other_shape.append(f"{placement.key} {list(tensor.shape)}, by our config {list(expected)}")
        else:
            fitting.append((placement, shape))
    placed = {placement.path for placement in placements}
    ruleless = [_join(path) for path in shapes if path not in placed]
    unread = sorted(state.keys() - {placement.key for placement in placements})

    # Initial values are computed only if some of them remain.
    keeps = absent or other_shape or ruleless
    leaves = {
        path: np.array(leaf) if keeps else np.zeros(leaf.shape, leaf.dtype)
        for path, leaf in (flatten_dict(init(config)) if keeps else shapes).items()
    }
    for placement, shape in fitting:
        tensor = state.get(placement.key)
        leaves[placement.path][placement.slot] = 0 if tensor is None else placement.transform.to_ours(tensor, shape)
    variables = unflatten_dict({path: jnp.asarray(leaf) for path, leaf in leaves.items()})
    return variables, Unmatched(tuple(unread), (*absent, *ruleless), tuple(other_shape))


def named(tree: dict, placements: Iterable[Placement]) -> dict[str, np.ndarray]:
    """Our variables, or gradients, under the other side's names and in its shapes."""
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(tree).items()}
    return {
        placement.key: placement.transform.to_theirs(leaves[placement.path][placement.slot])
        for placement in placements
        if placement.path in leaves
    }


def find(name: str, placements: Sequence[Placement]) -> Placement:
    """The parameter of this name, ours (with or without its collection) or theirs; BadInput where there is none."""
    name = name.removeprefix("params/")
    for placement in placements:
        if name in (placement.key, our_name(placement)):
            return placement
    layers = [our_name(placement) for placement in placements if our_name(placement).partition("[")[0] == name]
    if layers:
        raise BadInput(f"{name} holds several layers; name one of {layers[0]} to {layers[-1]}")
    near = did_you_mean(name, [known for placement in placements for known in (placement.key, our_name(placement))])
    hint = near if near.startswith("did") else "names are those of the gradients in this command's report"
    raise BadInput(f"no parameter is called {name!r}; {hint}")


def perturb(variables: dict, placement: Placement, seed: int) -> dict:
    """Our variables with noise of a tenth of its size added to one parameter (of size 1 where it is all zeros)."""
    leaves = flatten_dict(variables)
    leaf = np.array(leaves[placement.path])
    part = leaf[placement.slot]
    size = np.sqrt(np.mean(np.square(part))) or 1.0
    leaf[placement.slot] = part + PERTURBATION * size * np.random.default_rng(seed).standard_normal(part.shape)
    return unflatten_dict(leaves | {placement.path: jnp.asarray(leaf)})


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradients(model: Decoder, variables: dict, tokens: Any) -> tuple[Any, dict]:
    """Next-token loss of tokens [B, T], and its gradients as a tree {"params": ...}."""
    ids = jnp.asarray(tokens, jnp.int32)
    # The last token has no target, but transformers reads it, so we do: frequencies may depend on the row's length.
    mask = jnp.ones(ids.shape, jnp.float32).at[:, -1].set(0)
    batch = {"tokens": ids, "targets": jnp.roll(ids, -1, axis=1), "mask": mask}
    objective = NextToken(model)

    def compute(params):
        return objective.loss({**variables, "params": params}, batch, objective.weights(batch))[0]

    loss, gradients = jax.value_and_grad(compute)(variables["params"])
    return loss, {"params": gradients}


def compare_gradients(
    ours: dict,
    theirs: Mapping[str, np.ndarray],
    nudged: Mapping[str, np.ndarray],
    placements: Sequence[Placement],
    layer_paths: LayerPaths,
) -> list[Gradient]:
    """Compare every parameter's gradient, in the order of the weight table. `nudged` are theirs with other last bits in
    the parameters.

    A gradient that is tiny beside the largest one is measured relative to a thousandth of the largest, not to itself:
    that of a bias on keys, which softmax ignores, is nothing but rounding.
    """
    found = named(ours, placements)
    pairs = [placement for placement in placements if placement.key in found and placement.key in theirs]
    floor = 1e-3 * max((np.abs(theirs[placement.key]).max() for placement in pairs), default=0.0)
    gradients = []
    for placement in pairs:
        mine, expected = found[placement.key], theirs[placement.key]
        if mine.shape != expected.shape:
            continue  # reported as a parameter of another shape
        moved = elements_difference(nudged[placement.key], expected, floor).relative
        difference = elements_difference(mine, expected, floor)._replace(rounding=IN_ALL_LAYERS * moved)
        gradients.append(Gradient(placement.key, our_name(placement), home(placement, layer_paths)[0], difference))
    return gradients


def first_gradient(gradients: Sequence[Gradient], tolerance: float) -> Gradient | None:
    """The first above the tolerance in the order of the backward pass, which reaches the last parameters first."""
    return next((found for found in reversed(gradients) if found.difference.above(tolerance)), None)


def elements_difference(ours: np.ndarray, theirs: np.ndarray, floor: float = 0.0) -> Difference:
    """How far whole arrays differ, relative to the largest element of theirs, or to `floor` if that is larger."""
    absolute = float(np.abs(ours - theirs).max())
    size = max(float(np.abs(theirs).max()), float(floor))
    return Difference(absolute, 0.0 if absolute == 0 else absolute / size if size > 0 else np.inf)
