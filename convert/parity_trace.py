"""Where two implementations of a model part ways: the places that both have, and the first at which they differ.

A place is one of our modules and the module of transformers that holds the same parameters by the weight table; an
architecture need not say more. `{block}/attention/out/kernel` and `transformer.h.{layer}.attn.c_proj.weight` make a
place of `attention/out` and `attn.c_proj`; and as the parameters under `attention` are those under `attn`, these are a
place too, and so are the blocks. Both sides run on the same tokens, ours layer by layer, and the inputs and outputs of
each place are compared. Each of our layers is given the input of theirs: otherwise rounding would grow from layer to
layer until it hides small faults, and a fault would show in all later layers.
"""

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict

from convert.parity_reference import Pass
from convert.parity_weights import IN_A_LAYER, IN_ALL_LAYERS, Difference, LayerPaths, home
from llmq_jax.interop.tables import Placement
from llmq_jax.models.decoder import Decoder, default_positions

ModulePath = tuple[str, ...]
"""The path of one of our modules: within its block or, for a module outside the blocks, within the model."""


INPUT, OUTPUT = "__input__", "__call__"
"""The names under which the inputs and outputs of modules are recorded in Linen's collection "intermediates"."""


class Pair(NamedTuple):
    """A module on both sides."""

    layer: int | None
    path: ModulePath
    theirs: str
    keys: tuple[str, ...]
    """The names, in a file, of the parameters in it."""


class Place(NamedTuple):
    """A module on both sides, and how far apart they are there."""

    layer: int | None
    path: ModulePath
    theirs: str
    keys: tuple[str, ...]
    output: Difference
    input: Difference | None = None
    """None where the inputs of the two cannot be compared."""
    parts: tuple["Place", ...] = ()
    """The places inside, in the order of computation."""

    @property
    def name(self) -> str:
        what = " ".join(self.path).replace("_", " ") or "output"
        return what if self.layer is None else f"layer {self.layer}, {what}"


class First(NamedTuple):
    """The first place that differs."""

    place: Place
    before: bool
    """Whether its input differs already: then the fault lies between it and the place before."""
    among: tuple[Place, ...]
    """The places beside it, itself included."""

    @property
    def difference(self) -> Difference:
        return self.place.input if self.before else self.place.output

    def __str__(self) -> str:
        where, comma, what = self.place.name.rpartition(", ")
        if self.before:
            what = f"input of {what}" if self.place.path else "input"
        theirs = f" ({self.place.theirs})" if self.place.theirs else ""
        return f"{where}{comma}{what}{theirs}"


def first_difference(places: Sequence[Place], tolerance: float) -> First | None:
    """The first place above the tolerance, and of nested places the innermost.

    A part counts only if the output of the place that holds it differs too: two implementations may arrange their inner
    arrays differently and still compute the same.
    """
    for place in places:
        before = place.input is not None and place.input.above(tolerance)
        # A block was given their input: a difference that arises between two blocks does not show in its output.
        if place.output.above(tolerance) or (before and place.layer is not None and not place.path):
            if before:
                return First(place, True, tuple(places))
            return first_difference(place.parts, tolerance) or First(place, False, tuple(places))
    return None


def pair_modules(
    placements: Iterable[Placement], layer_paths: LayerPaths, owners: Mapping[str, str], modules: Collection[str]
) -> list[Pair]:
    """The modules of both sides that hold the same parameters.

    `layer_paths` are our model's, `owners` the reference's names in memory by name in a file, and `modules` those of
    its modules that compute. Nested modules that hold the same parameters pair from the outermost inwards.
    """
    ours: dict[tuple[int | None, ModulePath], list[str]] = {}
    theirs: dict[str, list[str]] = {}
    for placement in placements:
        if placement.key not in owners:
            continue
        layer, leaf = home(placement, layer_paths)
        for depth in range(1 if layer is None else 0, len(leaf)):
            ours.setdefault((layer, leaf[:depth]), []).append(placement.key)
        owner = owners[placement.key].split(".")
        for depth in range(1, len(owner)):
            if (name := ".".join(owner[:depth])) in modules:
                theirs.setdefault(name, []).append(placement.key)
    by_keys: dict[frozenset[str], list[str]] = {}
    for name in sorted(theirs, key=lambda name: name.count(".")):
        by_keys.setdefault(frozenset(theirs[name]), []).append(name)
    pairs = []
    for layer, path in sorted(ours, key=lambda module: len(module[1])):
        keys = ours[layer, path]
        if candidates := by_keys.get(frozenset(keys)):
            pairs.append(Pair(layer, path, candidates.pop(0), tuple(keys)))
    return pairs


class Trace(NamedTuple):
    """The inputs and outputs of our modules, by (layer, path)."""

    inputs: dict[tuple[int | None, ModulePath], np.ndarray]
    outputs: dict[tuple[int | None, ModulePath], np.ndarray]
    stages: dict[str, set[ModulePath]]
    """The modules outside the layers, by the method of the model that calls them: "embed", "normalise", "unembed"."""
    embedded: np.ndarray
    """The input of the first layer."""


def trace(model: Decoder, variables: dict, tokens: np.ndarray, given: Mapping[int, np.ndarray]) -> Trace:
    """A forward pass over tokens [B, T], layer by layer, that records every module's first input and first output.

    `given` replaces the inputs of layers; what our layer before gave is still recorded as the layer's input.
    """
    ids = jnp.asarray(tokens, jnp.int32)
    context = model.context(default_positions(ids))
    outside, layers = model.slice_layers(variables)
    blocks = model.unbound_blocks()
    inputs: dict = {}
    outputs: dict = {}

    def note(layer: int | None, captured: dict) -> set[ModulePath]:
        recorded = flatten_dict(captured.get("intermediates", {}))
        notes = {path: value for path, value in recorded.items() if path[-1] in (INPUT, OUTPUT)}
        for (*path, kind), value in notes.items():
            array = next((leaf for leaf in jax.tree.leaves(value) if jnp.issubdtype(leaf.dtype, jnp.floating)), None)
            if array is not None:
                noted = inputs if kind == INPUT else outputs
                noted.setdefault((layer, tuple(path)), np.asarray(array, np.float32))
        return {path[:-1] for path in notes}

    stages = {}
    embedded, captured = _recorded(model, "embed", outside, ids, context.positions)
    stages["embed"] = note(None, captured)
    x = embedded
    for layer, ((path, _), own) in enumerate(zip(model.layer_paths(), layers, strict=True)):
        reached, theirs = x, given.get(layer)
        if theirs is not None and theirs.shape == x.shape:
            x = jnp.asarray(theirs, x.dtype)
        (x, _, _), captured = _recorded(blocks[path], OUTPUT, own, x, context)
        note(layer, captured)
        inputs[layer, ()] = np.asarray(reached, np.float32)
    for method in ("normalise", "unembed"):
        x, captured = _recorded(model, method, outside, x)
        stages[method] = note(None, captured)
    return Trace(inputs, outputs, stages, np.asarray(embedded, np.float32))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _recorded(module: nn.Module, method: str, variables: dict, *args: Any) -> Any:
    """(the result of a method, the inputs and outputs of the modules inside)."""

    def note_input(call, args, kwargs, context):
        if context.method_name == OUTPUT and args:
            # By way of Linen, which records outputs so too: an array stored by hand could not leave a scanned module.
            context.module.sow("intermediates", INPUT, args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(note_input):
        return module.apply(variables, *args, method=method, capture_intermediates=True, mutable=["intermediates"])


def compare(
    pairs: Sequence[Pair], ours: Trace, our_logits: np.ndarray, theirs: Pass, nudged: Pass, tokens: np.ndarray
) -> tuple[Place, ...]:
    """All places in the order of computation: embeddings, layers, final norm, logits; each with its parts.

    `nudged` is their pass with other last bits in the parameters (`parity_reference.nudged`).
    """
    order = {name: index for index, name in enumerate(theirs.outputs)}
    places = []
    for pair in sorted(pairs, key=lambda pair: order.get(pair.theirs, -1)):
        module = pair.layer, pair.path
        outputs = ours.outputs.get(module), *(side.outputs.get(pair.theirs) for side in (theirs, nudged))
        output = _difference(*outputs, tokens)
        if output is not None:
            inputs = ours.inputs.get(module), *(side.inputs.get(pair.theirs) for side in (theirs, nudged))
            given = _difference(*inputs, tokens)
            places.append(Place(*pair, output, given))

    def outside(method: str) -> tuple[Place, ...]:
        return _nest([place for place in places if place.layer is None and place.path in ours.stages[method]])

    block = next((pair.theirs for pair in pairs if pair.layer == 0 and not pair.path), "")
    embeddings = outside("embed")
    embedded = _difference(ours.embedded, theirs.inputs.get(block), nudged.inputs.get(block), tokens)
    if embedded is not None:
        keys = tuple(key for place in embeddings for key in place.keys)
        embeddings = (Place(None, ("embeddings",), f"input of {block}", keys, embedded, parts=embeddings),)
    layers = sorted({place.layer for place in places if place.layer is not None})
    head = outside("unembed")
    logits = _difference(our_logits, theirs.logits, nudged.logits, tokens, IN_ALL_LAYERS)
    if logits is None:
        logits = Difference(np.inf, np.inf)  # another vocabulary
    return (
        *embeddings,
        *(top for layer in layers for top in _nest([place for place in places if place.layer == layer])),
        *outside("normalise"),
        Place(None, ("logits",), "", tuple(key for place in head for key in place.keys), logits, parts=head),
    )


def _nest(places: Sequence[Place]) -> tuple[Place, ...]:
    """The places of one layer, with those inside others as their parts."""

    def inside(place: Place, other: Place) -> bool:
        return place.path != other.path and place.path[: len(other.path)] == other.path

    tops = [place for place in places if not any(inside(place, other) for other in places)]
    return tuple(top._replace(parts=_nest([place for place in places if inside(place, top)])) for top in tops)


def _difference(
    ours: np.ndarray | None,
    theirs: np.ndarray | None,
    nudged: np.ndarray | None,
    tokens: np.ndarray,
    roundings: float = IN_A_LAYER,
) -> Difference | None:
    """How far ours is from theirs; None where one is missing or they do not have equally many values per token."""
    if ours is None or theirs is None:
        return None
    ours, theirs, nudged = (_rows(array, tokens.shape) for array in (ours, theirs, nudged))
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return None
    return rows_difference(ours, theirs)._replace(rounding=roundings * rows_difference(nudged, theirs).relative)


def _rows(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray | None:
    """[B, T, ...], [1, T, ...] (position embeddings) or [B·T, ...] (experts) as [B·T, features]; None for others."""
    batch, length = shape
    if array.shape[:2] == (1, length):
        array = np.broadcast_to(array, (batch, *array.shape[1:]))
    if array.shape[:2] == shape:
        array = array.reshape(batch * length, *array.shape[2:])
    return array.reshape(batch * length, -1) if array.ndim > 1 and len(array) == batch * length else None


def rows_difference(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """How far vectors [tokens, features] differ, relative to the root mean square of each token's own vector.

    Some tokens of trained models have states hundreds of times as large as all others: relative to the whole array,
    faults in the others would be invisible. A vector smaller than the median one is measured by the size of that.
    """
    distance = np.abs(ours - theirs).max(-1)
    size = np.sqrt(np.square(theirs).mean(-1))
    size = np.maximum(size, np.median(size))
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(distance == 0, 0.0, distance / size)
    return Difference(float(distance.max()), float(relative.max()))
