"""The weights of one model in another: the parts that a new idea leaves alone start trained, the others fresh."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from llmq_jax.errors import BadInput
from llmq_jax.field_types import require_model
from llmq_jax.language_model import LanguageModel
from llmq_jax.layers.lora import LORA
from llmq_jax.models import abstract_variables, all_layer_paths, init
from llmq_jax.models.decoder import PARAMS
from llmq_jax.weight_type import weight_type


class Place(NamedTuple):
    """Where a weight stands: a leaf of the variables, or one layer of a leaf that stacks several."""

    path: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]


def with_config(
    lm: LanguageModel,
    config: Any,
    *,
    fresh: Sequence[str] = (),
    unused: Sequence[str] = (),
    renamed: Callable[[str], str] = lambda name: name,
    seed: int = 0,
) -> LanguageModel:
    """The model of another config, which may be one of your own, with the weights of this one: how a trained model
    takes up a new idea. Tokenizer and end tokens stay.

    The names of weights number the layers from 0, across all groups: "token_embedding/embedding",
    "layers/3/qkv/kernel". Weights that both models have in the same shape are taken over. All others must be named, by
    patterns in which * stands for anything: in `fresh` those that are to be drawn as `init` does, by `seed` (because
    only the new model has them, or to replace trained ones); in `unused`, by their old names, those that the new model
    has no place for. Where your block has other modules, or layers in another order, `renamed` maps each name in the
    new model to the one in this model; two may map to the same one, to have a layer twice.

    BadInput, which names them: weights that differ and are not named, a pattern without a match, adapters (merge them
    first).
    """
    require_model(lm)
    if LORA in lm.variables:
        raise BadInput("this model has adapters, which belong to its own matrices; merge them first: lq.merge(lm)")
    wanted, there = _places(abstract_variables(config), config), _places(lm.variables, lm.config)
    drawn = _matching("fresh", fresh, wanted)
    origins = {name: renamed(name) for name in wanted}
    used = set(origins.values())
    left = [name for name in there if name not in used]
    left_out = _matching("unused", unused, left)
    taken = {
        name: there[origin]
        for name, origin in origins.items()
        if name not in drawn and origin in there and wanted[name].shape == there[origin].shape
    }
    unknown = [name for name in wanted if name not in taken and name not in drawn]
    of_other_shapes = {name: there[origins[name]].shape for name in unknown if origins[name] in there}
    _check(wanted, unknown, of_other_shapes, [name for name in left if name not in left_out])

    old, dtype = flatten_dict(lm.variables), weight_type(lm.params)
    paths = {wanted[name].path for name in drawn}
    new = jax.jit(lambda: {path: leaf for path, leaf in flatten_dict(init(config, seed)).items() if path in paths})()

    def weight(name: str) -> Any:
        path, layer, _ = taken.get(name, wanted[name])
        leaf = old[path] if name in taken else new[path]
        if name in drawn and path[0] == PARAMS:  # a router's bias keeps its own type
            leaf = leaf.astype(dtype)
        return leaf if layer is None else leaf[layer]

    variables = {}
    for path, expected in flatten_dict(abstract_variables(config)).items():
        names = [name for name, place in wanted.items() if place.path == path]
        as_it_is = all(taken.get(name) == wanted[name] for name in names)
        if as_it_is and old[path].shape == expected.shape:
            variables[path] = old[path]
        elif wanted[names[0]].layer is None:
            variables[path] = weight(names[0])
        else:
            variables[path] = jnp.stack([weight(name) for name in names])
    return lm.replace(config=config, variables=unflatten_dict(variables))


def _places(variables: Mapping[str, Any], config: Any) -> dict[str, Place]:
    """Every weight by its name; those of layers in order."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for number, (block, _) in enumerate(all_layer_paths(config)):
        numbers.setdefault(block, []).append(number)
    places = {}
    for path, leaf in flatten_dict(variables).items():
        within = () if path[0] == PARAMS else path[:1]
        for layer, number in enumerate(numbers.get(path[1:3], ())):
            name = "/".join(("layers", str(number), *within, *path[3:]))
            places[name] = Place(path, layer, tuple(leaf.shape[1:]))
        if path[1:3] not in numbers:
            places["/".join((*within, *path[1:]))] = Place(path, None, tuple(leaf.shape))
    return places


def _matching(option: str, patterns: Sequence[str], names: Collection[str]) -> set[str]:
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            there = f"there are {_shown(names)}" if names else "there are none"
            raise BadInput(f"{option}: {pattern!r} matches no weight of those that may be named; {there}")
        found |= matched
    return found


def _check(
    wanted: Mapping[str, Place],
    unknown: Sequence[str],
    of_other_shapes: Mapping[str, tuple[int, ...]],
    without_place: Sequence[str],
) -> None:
    """BadInput for weights of the new model that are neither taken over nor drawn, and for old ones that would be
    lost."""
    faults = []
    if missing := [name for name in unknown if name not in of_other_shapes]:
        faults.append(f"the model has no {_shown(missing)}")
    if other := next(iter(of_other_shapes), None):
        shapes = f"{list(of_other_shapes[other])} in the model and {list(wanted[other].shape)} by the config"
        faults.append(f"{other} is {shapes}")
    if unknown:
        faults.append(f"to draw them anew, fresh={_patterns(unknown)}")
    if without_place:
        faults.append(f"the config has no place for {_shown(without_place)}")
        faults.append(f"to leave them out, unused={_patterns(without_place)}")
    if faults:
        raise BadInput("; ".join(faults))


def _patterns(names: Iterable[str]) -> list[str]:
    """Names without the numbers of their layers, each once."""
    return list(dict.fromkeys(re.sub(r"^layers/\d+/", "layers/*/", name) for name in names))


def _shown(names: Iterable[str]) -> str:
    patterns = _patterns(names)
    more = f" and {len(patterns) - 8} more" if len(patterns) > 8 else ""
    return ", ".join(patterns[:8]) + more
