"""Weight tables: the strict two-way machinery between our variables and the state dicts of other libraries.

A table is a short list of rules, one per kind of tensor:

    rule("transformer.h.{layer}.attn.c_attn.weight", "{block}/attention/qkv/kernel", in_out)

Both directions follow from it, and all shapes from our own abstract tree. `{layer}` runs over the layers from the first
to the last, and `{block}` is where our tree keeps that layer's block; a rule holds in the layers whose block has the
leaf, so that layers of several kinds share one table. `{expert}` runs over the experts that our leaf stacks. Where
several of their tensors share one of our leaves, `at` says which part of it a rule fills. Nothing is guessed: every
leaf must be filled, every key read or on the list of names to ignore, every shape right. All faults are reported at
once.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llmq_jax.errors import BadInput, warn
from llmq_jax.layers.axes import on_host, put
from llmq_jax.models import abstract_variables, all_layer_paths
from llmq_jax.models.decoder import PARAMS

Shape = tuple[int, ...]
Path = tuple[str, ...]
KEEP = "keep such a model in our own format (lq.save)"
"""The advice in errors about a model that another format cannot hold."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read, or made, when `np.asarray` asks for it. Readers of files give mappings of these."""

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.read(), dtype, copy=copy)


# How one of their tensors relates to one of ours.


@dataclass(frozen=True)
class Transform:
    """Their tensor is ours with some axes merged (`merge` gives the shape) and then, if `transposed`, the last two
    swapped."""

    merge: Callable[[Shape], Shape]
    transposed: bool = False

    def their_shape(self, ours: Shape) -> Shape:
        merged = self.merge(ours)
        return (*merged[:-2], merged[-1], merged[-2]) if self.transposed else merged

    def to_ours(self, theirs: np.ndarray, shape: Shape) -> np.ndarray:
        return (theirs.swapaxes(-1, -2) if self.transposed else theirs).reshape(shape)

    def to_theirs(self, ours: np.ndarray) -> np.ndarray:
        merged = ours.reshape(self.merge(ours.shape))
        return merged.swapaxes(-1, -2) if self.transposed else merged


def _matrix(shape: Shape) -> Shape:
    return shape[0], math.prod(shape[1:])


as_is = Transform(lambda shape: shape)
"""The same shape on both sides."""
vector = Transform(lambda shape: (math.prod(shape),))
"""A bias or a scale: theirs is flat, ours may have several axes."""
in_out = Transform(_matrix)
"""transformers' Conv1D, (in, out), to our kernel [in, *out]."""
convolution = Transform(lambda shape: (1, *_matrix(shape)))
"""TensorFlow's convolution of width 1, (1, in, out), to our kernel [in, *out]."""
out_in = Transform(_matrix, transposed=True)
"""torch's Linear, (out, in), to our kernel [in, *out]."""
experts_out_in = Transform(lambda shape: (shape[0], *_matrix(shape[1:])), transposed=True)
"""The same for all experts in one tensor, (experts, out, in), to our kernel [experts, in, *out]."""


class Rule(NamedTuple):
    key: str
    path: str
    transform: Transform
    at: tuple[Any, ...] = ()
    optional: bool = False


def rule(
    key: str,
    path: str,
    transform: Transform,
    collection: str = PARAMS,
    at: tuple[Any, ...] = (),
    optional: bool = False,
) -> Rule:
    """Their `key` is our `collection`'s leaf at `path`, or the part `at` (an index) of that leaf, under `transform`.

    For a key with `{expert}`, `at` is a part of one expert's slice. A file has either all of a table's optional tensors
    or none, and then they are zero.
    """
    return Rule(key, f"{collection}/{path}", transform, at, optional)


SCORE = rule("score.weight", "score/kernel", out_in)
"""A classifier's head, which is the same in all of transformers' `...ForSequenceClassification`."""


class Placement(NamedTuple):
    """A rule applied to one layer and expert: their tensor `key` is `leaf[slot]` of our leaf at `path`."""

    key: str
    path: Path
    slot: tuple[Any, ...]
    transform: Transform
    optional: bool

    def our_shape(self, leaf_shape: Shape) -> Shape:
        # A view of the right shape that takes no memory.
        part: np.ndarray = np.broadcast_to(0, leaf_shape)[self.slot]
        return part.shape


@dataclass(frozen=True)
class WeightTable:
    """All tensors of an architecture in one layout."""

    rules: tuple[Rule, ...]
    ignorable: tuple[str, ...] = ()
    """Names that may be there and are not read, such as buffers of constants."""
    optional_prefix: str = ""
    """A prefix of their names that some files leave out."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """{name of a tensor: name of the tensor that it may repeat}, in a model that has no leaf for the former."""
    writes_tied: bool = False
    """Whether files of this layout hold tied tensors all the same, so that they are written."""
    within: Mapping[str, str] = field(default_factory=dict)
    """{prefix of our part's names in files of a larger model: the prefix in files of the part alone}"""
    beside: tuple[str, ...] = ()
    """Prefixes of the names of that model's other parts, which are left out with a warning."""
    select: Callable[[Mapping[str, Any], Any], Mapping[str, Any]] = lambda state, config: state
    """From (a state dict, a config), the tensors that the config describes."""
    spellings: tuple["WeightTable", ...] = ()
    """Tables with other names for all tensors, which some files of this layout have; they are read and never
    written."""

    def with_rules(self, before: str, *rules: Rule) -> "WeightTable":
        """The table with more rules, in front of the rule for our parameter `before`; they replace those for the same
        leaves."""
        filled, merged = {entry.path for entry in rules}, list[Rule]()
        for entry in self.rules:
            if entry.path == f"{PARAMS}/{before}":
                merged += rules
            if entry.path not in filled:
                merged.append(entry)
        return replace(self, rules=tuple(merged))

    def spelling(self, names: Iterable[str]) -> "WeightTable":
        """This table or one of its other spellings, the one that knows most of these names."""
        names = tuple(names)
        return max((self, *self.spellings), key=lambda table: sum(map(table._knows, names)))

    def placements(self, config: Any, most: int | None = None) -> list[Placement]:
        """The rules written out for a config: layer by layer, within a layer in the order of the rules, expert by
        expert.

        More than `most` are BadInput: a damaged config would make any number of them.
        """
        leaves = flatten_dict(abstract_variables(config), sep="/")
        layers = [(f"{group}/{block}", repeat) for (group, block), repeat in all_layer_paths(config)]
        placements: list[Placement] = []
        for in_layers, rules in itertools.groupby(self.rules, lambda entry: "{block}" in entry.path):
            run = tuple(rules)
            for layer, (block, repeat) in enumerate(layers) if in_layers else [(0, ("", 0))]:
                entries = [entry._replace(path=entry.path.format(block=block)) for entry in run]
                held = [entry for entry in entries if entry.path in leaves]
                found = _expert_by_expert(held, leaves, layer, (repeat,) if in_layers else ())
                placements += found if most is None else itertools.islice(found, most + 1 - len(placements))
                if most is not None and len(placements) > most:
                    raise BadInput(f"{type(config).__name__} has more than {most:,} tensors, far more than there are")
        return placements

    def from_state_dict(self, state: Mapping[str, Any], config: Any, dtype: Any = None) -> dict[str, Any]:
        """`state` as our variables, in its own types unless `dtype` says otherwise; see `interop.from_state_dict`.

        `dtype` is that of parameters. Other collections keep their types: a router's bias moves in steps too small for
        half precision.
        """
        leaves = flatten_dict(abstract_variables(config))
        _check_sizes(leaves)
        placements = self.placements(config, most=10_000 + 10 * len(state))
        others = [name for name in state if name.startswith(self.beside)]
        if others:
            warn(f"{len(others)} tensors of other parts are ignored: {self.parts_of(others)}")
        state = self.select(self._own_part(state), config)
        names = self._names(state, placements)
        problems = self._problems(state, names, placements, leaves, config)
        if problems:
            raise BadInput(f"the weights do not fit {type(config).__name__}: {'; '.join(problems)}")
        tensors = {part.key: _tensor(state, names[part.key]) for part in placements if part.key in names}
        by_leaf: dict[Path, list[Placement]] = {}
        for placement in placements:
            by_leaf.setdefault(placement.path, []).append(placement)
        filled = {}
        for path, parts in by_leaf.items():
            present = [tensors[part.key] for part in parts if part.key in tensors]
            # A leaf whose tensors are all absent takes the type of the others.
            types = [tensor.dtype for tensor in present or tensors.values()]
            leaf_type = _widest(types) if dtype is None or path[0] != PARAMS else dtype
            leaf = _aligned_empty(leaves[path].shape, jax.dtypes.canonicalize_dtype(leaf_type))
            for part in parts:
                if part.key in tensors:
                    shape = part.our_shape(leaf.shape)
                    leaf[part.slot] = part.transform.to_ours(np.asarray(tensors[part.key]), shape)
                else:
                    leaf[part.slot] = 0
            filled[path] = put(path, leaf)
        variables: dict[str, Any] = unflatten_dict(filled)
        return variables

    def lazy_state_dict(self, variables: dict[str, Any], config: Any, dtype: Any = None) -> dict[str, LazyTensor]:
        """Our variables, or any tree of that structure, as a state dict; tensors are made when asked for. Leaves are
        arrays, or anything with a shape and a type that gives its parts by index. A tree without `params` is one of
        that collection's structure, such as its gradient, and gives its tensors alone (without a router's biases).

        `dtype` is that of parameters, as in `from_state_dict`.
        """
        expected = flatten_dict(abstract_variables(config))
        placements = self.placements(config)
        if PARAMS not in variables:
            variables = {PARAMS: variables}
            expected = {path: leaf for path, leaf in expected.items() if path[0] == PARAMS}
            placements = [part for part in placements if part.path[0] == PARAMS]
        leaves = flatten_dict(variables)
        wrong = [
            f"{'/'.join(path)} is {list(leaf.shape)} instead of {list(expected[path].shape)}"
            for path, leaf in leaves.items()
            if path in expected and leaf.shape != expected[path].shape
        ]
        named = {placement.path for placement in placements}
        homeless = [path for path in leaves if path not in named]
        problems = [
            *_listed("missing", ["/".join(path) for path in expected if path not in leaves]),
            *_listed("without a place in this layout", ["/".join(path) for path in homeless]),
            *_listed("of another shape", wrong),
            *([KEEP] if any(path in expected for path in homeless) else []),  # not for leaves foreign to the model
        ]
        if problems:
            raise BadInput(f"the variables do not fit {type(config).__name__}: {'; '.join(problems)}")
        tensors = {
            part.key: _theirs(part, leaves[part.path], dtype if part.path[0] == PARAMS else None) for part in placements
        }
        if self.writes_tied:
            tensors |= {key: tensors[source] for key, source in self.tied.items() if key not in tensors}
        return tensors

    def recognises(self, name: str) -> bool:
        """Whether a tensor of this name may occur in this layout, in any spelling, for some config."""
        return any(table._knows(name) for table in (self, *self.spellings))

    def _knows(self, name: str) -> bool:
        """Whether a tensor of this name may occur in this spelling."""
        own = self.own_name(name)
        return any(self._known.fullmatch(full) for full in (own, self.optional_prefix + own))

    @functools.cached_property
    def _known(self) -> re.Pattern[str]:
        """What matches every name with its prefix: one pattern, as all names of a file are asked of all tables."""
        keys = [*(entry.key for entry in self.rules), *self.tied, *self.ignorable]
        return re.compile("|".join(_NUMBER.sub(r"\\d+", re.escape(key)) for key in keys))

    def survey(self, state: Mapping[str, Any]) -> tuple[dict[str, Shape], int]:
        """What `state` tells about its config: ({path of our leaf, within its block: the shape of their tensor}, the
        number of layers)."""
        shapes: dict[str, Shape] = {}
        layers = set()
        state = self._own_part(state)
        for name in state:
            for entry in self.rules:
                match = _matches(entry.key, name) or _matches(entry.key, self.optional_prefix + name)
                if match:
                    path = entry.path.partition("/")[2].removeprefix("{block}/")
                    shapes.setdefault(path, tuple(_tensor(state, name).shape))
                    layers.add(match.groupdict().get("layer"))
        return shapes, len(layers - {None})

    def is_tied(self, state: Mapping[str, Any]) -> bool:
        """Whether every tensor that may repeat another one does so, or is absent."""
        state = self._own_part(state)
        prefix = "" if any(name.startswith(self.optional_prefix) for name in state) else self.optional_prefix
        pairs = [(key.removeprefix(prefix), source.removeprefix(prefix)) for key, source in self.tied.items()]
        both = [pair for pair in pairs if pair[0] in state and pair[1] in state]
        return all(equal(*(np.asarray(_tensor(state, name)) for name in pair)) for pair in both)

    def _own_part(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Our part of a larger model's state dict, under the part's own names; any other state dict unchanged."""
        if not self.within:
            return state
        part: dict[str, Any] = {}
        for name in state:
            if not name.startswith(self.beside):
                own = self.own_name(name)
                twice = own != name and (own in state or own in part)
                part[name if twice else own] = state[name]
        return part

    def parts_of(self, others: Iterable[str]) -> str:
        """The larger model's other parts that these names are of."""
        return ", ".join(part.rstrip(".") for part in self.beside if any(name.startswith(part) for name in others))

    def own_name(self, name: str) -> str:
        """The name that a tensor of a larger model, or a module, has in our part alone."""
        prefix = next((prefix for prefix in self.within if name.startswith(prefix)), "")
        return self.within.get(prefix, "") + name.removeprefix(prefix)

    def _names(self, state: Mapping[str, Any], placements: list[Placement]) -> dict[str, str]:
        """{the table's name: the name in `state`}; they differ where `state` leaves the prefix out."""
        known = {placement.key for placement in placements} | set(self.tied)
        names: dict[str, str] = {}
        for name in state:
            full = self.optional_prefix + name
            names.setdefault(full if full in known or self._ignores(full) else name, name)
        wanted = {placement.key for placement in placements}
        for key, source in self.tied.items():  # a file may keep a shared tensor by its other name alone
            if key in names and source not in names and key not in wanted:
                names[source] = names.pop(key)
        return names

    def _ignores(self, name: str) -> bool:
        return any(_matches(key, name) for key in self.ignorable)

    def _problems(
        self,
        state: Mapping[str, Any],
        names: Mapping[str, str],
        placements: Sequence[Placement],
        leaves: Mapping[Path, Any],
        config: Any,
    ) -> list[str]:
        wanted = {placement.key: placement for placement in placements}
        duplicates = [name for name in state if name not in names.values()]
        others = [key for key in names if key not in wanted and key not in self.tied and not self._ignores(key)]
        # An empty tensor has nothing to be read: transformers makes some where there are no shared experts.
        unread = [names[key] for key in others if math.prod(_tensor(state, names[key]).shape)]
        wrong = []
        for key, placement in wanted.items():
            if key not in names:
                continue
            tensor = _tensor(state, names[key])
            ours = placement.our_shape(leaves[placement.path].shape)
            theirs = placement.transform.their_shape(ours)
            if tuple(tensor.shape) != theirs:
                wrong.append(f"{names[key]} is {list(tensor.shape)} instead of {list(theirs)}")
            elif not jnp.issubdtype(tensor.dtype, jnp.floating):
                wrong.append(f"{names[key]} has the type {tensor.dtype}")
        untied = []
        for key, source in self.tied.items():
            if key in wanted or key not in names or source not in names:
                continue
            if equal(*(np.asarray(_tensor(state, names[name])) for name in (key, source))):
                continue
            if config.labels is not None and SCORE.key in names:
                untied.append(f"{names[key]} is a language model's head, which no classifier has; leave it out")
            elif config.tie_word_embeddings:
                untied.append(
                    f"{names[key]} differs from {names[source]} although tie_word_embeddings is true"
                    " (set it to false in the config if the head has weights of its own)"
                )
        filled = {placement.path for placement in placements}
        some_optional = any(placement.optional and key in names for key, placement in wanted.items())
        missing = [key for key, part in wanted.items() if key not in names and (some_optional or not part.optional)]
        return [
            *_listed("missing", missing),
            *_listed("unread", unread),
            *_listed("there twice, with and without a prefix", duplicates),
            *_listed("of another shape or type", wrong),
            *_listed("of ours without a name in this layout", ["/".join(p) for p in leaves if p not in filled]),
            *untied,
        ]


def _expert_by_expert(
    entries: Iterable[Rule], leaves: Mapping[str, Any], layer: int, slot: tuple[Any, ...]
) -> Iterator[Placement]:
    """Placements of rules in one layer, which is `slot` of their leaves. Consecutive rules with `{expert}` are placed
    together, for one expert after the other."""
    for of_experts, neighbours in itertools.groupby(entries, lambda entry: "{expert}" in entry.key):
        run = tuple(neighbours)
        for expert in range(leaves[run[0].path].shape[len(slot)]) if of_experts else (0,):
            for key, path, transform, at, optional in run:
                part = (*slot, expert, *at) if of_experts else (*slot, *at)
                name = key.format(layer=layer, expert=expert)
                yield Placement(name, tuple(path.split("/")), part, transform, optional)


def _tensor(state: Mapping[str, Any], name: str) -> Any:
    """A value of a state dict, as something with a shape and a numpy type."""
    tensor = state[name]
    if isinstance(getattr(tensor, "dtype", None), np.dtype):
        return tensor
    try:
        return np.asarray(tensor)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput(
            f"{name} cannot be read as a numpy array ({str(error).splitlines()[0]}); convert it first"
        ) from error


def equal(left: Any, right: Any) -> bool:
    """Whether two tensors have the same values; of arrays on a mesh all processes must ask."""
    return left is right or (left.shape == right.shape and np.array_equal(on_host(left), on_host(right)))


_NUMBER = re.compile(r"\\{(layer|expert)\\}")
"""The number of a layer or an expert in a key, as `re.escape` has it."""


@functools.cache
def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(_NUMBER.sub(r"(?P<\1>\\d+)", re.escape(key)))


def _matches(key: str, name: str) -> re.Match[str] | None:
    """The match of a name with a rule's key, for any layer and expert; None where it does not match."""
    return _pattern(key).fullmatch(name)


def _theirs(part: Placement, leaf: Any, dtype: Any) -> LazyTensor:
    dtype = np.dtype(leaf.dtype if dtype is None else dtype)

    def read() -> np.ndarray:
        ours = _part_on_host(leaf, part.slot)
        return np.ascontiguousarray(part.transform.to_theirs(ours).astype(dtype, copy=False))

    return LazyTensor(part.transform.their_shape(part.our_shape(leaf.shape)), dtype, read)


def _part_on_host(leaf: Any, slot: tuple[Any, ...]) -> np.ndarray:
    """`leaf[slot]`. An array of another device, or of several, is not asked for as a whole: JAX would keep that copy as
    long as the array. On one CPU there is no copy, and a part taken by JAX would be one."""
    if isinstance(leaf, jax.Array):
        if {device.platform for device in leaf.devices()} != {"cpu"} or len(leaf.devices()) > 1:
            return np.asarray(leaf[slot] if slot else jnp.copy(leaf))  # leaf[()] is the array itself
        leaf = np.asarray(leaf)
    return np.asarray(leaf[slot])


def _widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The type of a stacked leaf: the smallest that holds those of all its layers. Types of 8 bits, which are for
    storage alone, count as bfloat16, which holds them exactly."""
    wide = (jnp.dtype(jnp.bfloat16) if dtype.itemsize == 1 else dtype for dtype in dtypes)
    return functools.reduce(jnp.promote_types, wide)


def _aligned_empty(shape: Shape, dtype: np.dtype) -> np.ndarray:
    """An empty array at a multiple of 64 bytes, which JAX on CPU takes over without copying it."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _check_sizes(leaves: Mapping[Path, Any]) -> None:
    """BadInput for sizes that no memory holds: they are from a damaged config, and NumPy may not take such shapes."""
    for path, leaf in leaves.items():
        if math.prod(leaf.shape) >= 2**48:
            raise BadInput(f"{'/'.join(path)} would be {list(leaf.shape)} by the config, which no memory holds")


def _listed(label: str, names: list[str]) -> list[str]:
    """["3 missing (a, b, c)"], only very long lists shortened; nothing for an empty list."""
    if not names:
        return []
    limit = 200
    shown = ", ".join(names[:limit])
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return [f"{len(names)} {label} ({shown}{more})"]
