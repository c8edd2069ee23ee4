"""Adapters read from PEFT's folders; the names are in `interop.peft`."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from llmq_jax.errors import BadInput, warn
from llmq_jax.interop.architectures import weight_table
from llmq_jax.interop.huggingface import is_hub_id
from llmq_jax.interop.peft import (
    BASE_LAYER,
    CONFIG,
    EMBEDDING_A,
    EMBEDDING_B,
    LORA_A,
    LORA_B,
    MAGNITUDES,
    PREFIX,
    SCORE_WEIGHT,
    TINY_A,
    TINY_B,
    TINY_P,
    TINY_V,
    Site,
    experts_module,
    memory_table,
    open_tensors,
    sites_of,
    weights_file,
)
from llmq_jax.interop.peft_config import ends_with, read_config, require_supported
from llmq_jax.interop.peft_whole import (
    EMBEDDING,
    TWICE,
    fitting,
    module_name,
    parted,
    replaced,
    whole_shapes,
)
from llmq_jax.interop.tables import Placement, equal, in_out
from llmq_jax.layers.axes import is_stacked
from llmq_jax.layers.lora import (
    DROPOUT,
    LORA,
    LORA_FIXED,
    MAGNITUDE,
    NUMBERS,
    PROJECTIONS,
    SCALE,
    STAYS,
    TIED,
    TRAINS,
    WHOLE,
    A,
    B,
    from_adapters,
)
from llmq_jax.models import abstract_variables
from llmq_jax.models.heads import LM_HEAD, SCORE


def read_adapter(folder: Path, config: Any, variables: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(config, variables) with the adapters of a PEFT folder, and with the embedding and the head that it holds whole
    in place of theirs: the config may then have another vocabulary size, or a head that is no longer tied.

    Strict: BadInput names what has no place in this model, and the shapes of what belongs to another base.
    """
    values = read_config(folder)
    require_supported(folder, values)
    state = {name: np.asarray(tensor) for name, tensor in open_tensors(folder).items()}
    reader = _Reader(folder, values, state, config)
    variables = reader.take_embedding_and_head(variables)
    found = reader.tiny() if values["peft_type"] == "TINYLORA" else reader.low_rank()
    reader.check_all_read()
    if not found:
        beside = " beside an embedding or a head: merge it in PEFT" if reader.replaced else ""
        raise BadInput(f"{reader.file}: holds no adapter of a layer{beside}")
    trees = from_adapters(found)
    if reader.shared is not None:
        trees[LORA] = {TIED: {NUMBERS: jnp.asarray(reader.shared)}}
    if reader.replaced:
        marks = {name: TRAINS if trains else STAYS for name, trains in reader.replaced.items()}
        trees[LORA_FIXED][WHOLE] = {name: jnp.asarray(mark) for name, mark in marks.items()}
    return reader.config, {**variables, **trees}


def base_of(folder: Path) -> tuple[str, int]:
    """(the name of the base in a PEFT folder, or "", the number of classes if it is a classifier's, else 0)."""
    values = read_config(folder)
    base = values.get("base_model_name_or_path") or ""
    if values.get("revision") and is_hub_id(base):
        base = f"{base}@{values['revision']}"
    file = weights_file(folder)
    score = open_tensors(folder).get(SCORE_WEIGHT) if file.is_file() else None
    if score is not None and len(score.shape) != 2:
        raise BadInput(f"{file}: {SCORE_WEIGHT} is {list(score.shape)}, and a head has two axes; save it again")
    return base, 0 if score is None else score.shape[0]


Pair = tuple[np.ndarray, np.ndarray, np.float32]
"""A and B, and what their product is multiplied by."""
Leaves = tuple[Site, dict[str, Any]]
"""A matrix, and the arrays of its adapter by the names of `layers.lora`."""
Found = dict[tuple[str, ...], tuple[dict[str, Any], dict[str, Any]]]
"""{path of a matrix in `params`: (what trains beside it, what is fixed)}"""


def _names_of_files(config: Any, sites: list[Site]) -> tuple[dict[str, str], dict[tuple[Any, ...], list[Placement]]]:
    """Where modules have other names in memory than in files (those of transformers 4, in which each expert was a
    module): ({name in files: name in memory}, {(path, slot) of the matrices of a layer's experts: the parts of
    each})."""
    in_memory = {(site.placement.path, site.placement.slot): site for site in sites}
    renamed: dict[str, str] = {}
    apart: dict[tuple[Any, ...], list[Placement]] = {}
    for part in weight_table(config.model_type).placements(config):
        module = part.key.removesuffix(".weight")
        layer = part.path, part.slot[: is_stacked(part.path[1])]
        site = in_memory.get(layer)
        if site is not None and part.slot != layer[1]:
            apart.setdefault(layer, []).append(part)
        elif site is not None and site.module != module:
            renamed[module] = site.module
    return renamed, apart


class _Reader:
    """One folder's tensors, of which those that have been read are removed."""

    def __init__(self, folder: Path, values: Mapping[str, Any], state: dict[str, np.ndarray], config: Any):
        self.folder, self.file, self.values = folder, weights_file(folder), values
        self._set_config(config)
        self.table = memory_table(config)
        self.renamed, self.apart = _names_of_files(config, self.sites)
        self.in_file: dict[str, str] = {}
        """{a tensor's name in memory: what this folder calls it}"""
        self.old_modules: dict[str, str] = {}
        """{a module's name in memory: what this folder calls it}, where the two differ."""
        others = []
        for name in state:
            if (module := name.removeprefix(PREFIX)).startswith(self.table.beside):
                others.append(module)
            else:
                self._give_own_name(name, module)
        if others:
            where = self.table.parts_of(others)
            warn(f"{self.file}: {len(others)} tensors of other parts of its base are ignored: {where}")
        self.state = {own: state[name] for own, name in self.in_file.items()}
        self.replaced: dict[str, bool] = {}
        """{our name of an embedding or a head that is a copy, or differs from the base's: whether it is a copy that
        trains}"""
        self.shared: np.ndarray | None = None
        """The numbers of a TinyLoRA that all matrices share."""

    def _set_config(self, config: Any) -> None:
        self.config, self.sites = config, sites_of(config)
        self.shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract_variables(config)).items()}

    def _give_own_name(self, name: str, module: str) -> None:
        """Note the name that a tensor has in memory in transformers 5 and, for an adapter of a multimodal model, within
        the part that we have. `module` is its name without "base_model.model."."""
        own = self.table.own_name(module)
        for theirs, ours in self.renamed.items():
            if module.startswith(f"{theirs}."):
                own = ours + module.removeprefix(theirs)
                self.old_modules[ours] = theirs
                break
        own = name if own == module else PREFIX + own
        if own in self.in_file:
            raise BadInput(f"{self.file}: {self.in_file[own]} and {name} are two names of one tensor; leave one out")
        self.in_file[own] = name

    def low_rank(self) -> Found:
        parts: dict[tuple[str, ...], list[Leaves]] = {}
        for site in self.sites:
            pair = (self._expert_pair(site) or self._pairs_apart(site)) if site.of_experts else self._pair(site)
            if pair is None:
                continue
            first, last, scale = pair
            leaves = {A: first, B: last, SCALE: scale}
            self._check_dora(site.module)
            magnitude = self._take(f"{PREFIX}{site.module}.{MAGNITUDES}", last.shape[-1:])
            if magnitude is not None:
                leaves[MAGNITUDE] = magnitude
            parts.setdefault(site.placement.path[1:], []).append((site, leaves))
        dropout = float(self.values.get("lora_dropout", 0))
        if dropout and any(site.is_parameter for entries in parts.values() for site, _ in entries):
            # In transformers 4 experts were modules, and their adapters had dropout.
            warn(
                f"{self.folder / CONFIG}: lora_dropout={dropout} is left out: adapters of experts have none here, nor "
                "in PEFT"
            )
            dropout = 0.0
        head = (LM_HEAD, "kernel")
        if dropout and head in parts:
            warn(f"{self.folder / CONFIG}: lora_dropout={dropout} is left out at lm_head, which works within the loss")
        return {path: self._stacked(path, entries, dropout * (path != head)) for path, entries in parts.items()}

    def tiny(self) -> Found:
        """TinyLoRA's adapters. The matrices, in their order, form as many groups as `weight_tying` says, each of which
        shares its numbers. In further training they stay shared only where there is a single group."""
        sites = [site for site in self.sites if f"{PREFIX}{site.module}.{TINY_A}" in self.state]
        groups = max(1, round(len(sites) * (1.0 - self.values.get("weight_tying", 0.0))))
        size = max(1, len(sites) // groups)
        keys = [f"{TINY_V}.{min(index // size, groups - 1)}" for index in range(len(sites))]
        numbers = {key: self._take(key, ("u",)) for key in set(keys)}
        parts: dict[tuple[str, ...], list[Leaves]] = {}
        for site, key in zip(sites, keys, strict=True):
            name = f"{PREFIX}{site.module}"
            width, features = self._widths(site)
            pair = self._take_pair(name, width, features, TINY_A, TINY_B)
            assert pair is not None  # these are the sites that have A
            first, last = pair
            projections = self._take(f"{name}.{TINY_P}", ("u", len(last), len(last)))
            if projections is None:
                raise BadInput(f"{self.file}: has no {name}.{TINY_P}; save the adapter with save_projection=True")
            own = numbers[key]
            if own is None or len(own) != len(projections):
                raise BadInput(
                    f"{self.file}: has no {key} of {len(projections)} numbers, as many as {name}.{TINY_P} has "
                    "matrices; save the adapter again"
                )
            fixed = {A: first, B: last, PROJECTIONS: projections.swapaxes(1, 2), SCALE: np.float32(1)}
            parts.setdefault(site.placement.path[1:], []).append((site, {NUMBERS: own, **fixed}))
        if groups == 1 and len(sites) > 1:
            self.shared = numbers[keys[0]]
        dropout = float(self.values.get("tinylora_dropout", 0))
        return {path: self._stacked(path, entries, dropout) for path, entries in parts.items()}

    def take_embedding_and_head(self, variables: dict[str, Any]) -> dict[str, Any]:
        """The variables with the matrices that the folder holds whole in place of theirs, and with an adapter at the
        embedding merged into it. The reader's config becomes that of the result."""
        params = variables["params"]
        embedding, is_tied = params[EMBEDDING]["embedding"], self.config.labels is None and LM_HEAD not in params
        given = self._take_whole(whole_shapes(self.config, params))
        copies = self._copies(given)
        if is_tied:
            given = parted(given, copies, embedding)
        module = module_name(self.config, EMBEDDING)
        rows, width = given.get(EMBEDDING, embedding).shape
        pair = self._take_pair(f"{PREFIX}{module}", rows, width, EMBEDDING_A, EMBEDDING_B)
        if pair is not None:
            first, last = pair
            self._check_dora(module)
            change = self._scale(module, len(last)) * (first @ last)
            given[EMBEDDING] = jnp.asarray(given.get(EMBEDDING, embedding), jnp.float32) + change
        adapts_head = any(key.startswith(f"{PREFIX}{LM_HEAD}.lora_") for key in self.state)
        if is_tied and not adapts_head and equal(given[EMBEDDING], given[LM_HEAD]):
            del given[LM_HEAD]
        params, changed = replaced(params, given)
        own = {*changed, *copies} - {SCORE}  # the score head is any classifier's own
        self.replaced = {name: name in copies for name in given if name in own}
        config = fitting(self.config, params, self.file)
        if config != self.config:
            self._set_config(config)
        return {**variables, "params": params}

    def _take_whole(self, shapes: Mapping[str, tuple[int | str, int]]) -> dict[str, Any]:
        """Those of these matrices that the folder holds, by our names."""
        given: dict[str, Any] = {}
        for name, shape in shapes.items():
            module = f"{PREFIX}{module_name(self.config, name)}"
            for key in (f"{module}.weight", f"{module}{BASE_LAYER}.weight"):
                if (matrix := self._take(key, shape)) is not None:
                    given[name] = matrix
            if name in given:
                for twice in TWICE:
                    self.state.pop(f"{module}.{twice}.weight", None)
        return given

    def _copies(self, names: Collection[str]) -> set[str]:
        """Those of our names of whose modules PEFT trained a copy (`modules_to_save`)."""
        ends = tuple(self.values.get("modules_to_save", []))
        return {name for name in names if module_name(self.config, name).endswith(ends)}

    def check_all_read(self) -> None:
        if not self.state:
            return
        some = sorted(self.in_file[name] for name in self.state)
        more = f" and {len(some) - 1} more" if len(some) > 1 else ""
        hint = ""
        whole = self.values.get("modules_to_save") or ()
        if SCORE_WEIGHT in some:
            hint = "; it is a classifier's: load it onto one (lq.with_classifier)"
        elif self.config.labels is not None and some[0].startswith(f"{PREFIX}{LM_HEAD}."):
            hint = "; it is a language model's head, and this is a classifier: load it onto the language model"
        elif any(f".{name}." in some[0] for name in whole):
            hint = f"; of modules_to_save={whole} only embeddings and heads are supported: merge it in PEFT"
        elif "lora_embedding_" in some[0] or some[0].startswith(f"{PREFIX}{module_name(self.config, EMBEDDING)}."):
            hint = "; of embeddings only that of tokens may have an adapter, and only LoRA: merge it in PEFT"
        elif "lora_" in some[0]:
            hint = f": {self._another_base}"
        raise BadInput(f"{self.file}: {some[0]}{more} has no place in this {self.config.model_type}{hint}")

    def _pair(self, site: Site) -> Pair | None:
        name, parameter = f"{PREFIX}{site.module}", f"{site.module}.weight"
        if not self._is_target_parameter(parameter):
            width, features = self._widths(site)
            pair = self._take_pair(name, width, features)
            return None if pair is None else (*pair, self._scale(site.module, len(pair[1])))
        # A module's weight that was adapted as a parameter: patterns name the parameter, and B A has the weight's own
        # orientation.
        rows, columns = site.placement.transform.their_shape(self._our_shape(site))
        pair = self._take_pair(name, columns, rows)
        if pair is None:
            return None
        first, last = (pair[1].T, pair[0].T) if site.placement.transform is in_out else pair
        return first, last, self._scale(parameter, len(last))

    def _take_pair(
        self, name: str, width: int, features: int, a: str = LORA_A, b: str = LORA_B
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """A [D, R] and B [R, F] of a module."""
        first = self._take(f"{name}.{a}", ("r", width))
        if first is None:
            return None
        if not len(first):
            module = name.removeprefix(PREFIX)
            raise BadInput(
                f"{self.file}: the adapter of {module} has the rank 0; it needs at least 1; save the adapter again"
            )
        last = self._take(f"{name}.{b}", (features, len(first)))
        if last is None:
            raise BadInput(
                f"{self.file}: has {self.in_file[f'{name}.{a}']} and no {b.removesuffix('.weight')}; save the adapter "
                "again"
            )
        return first.T, last.T

    def _pairs_apart(self, site: Site) -> Pair | None:
        """A [E, D, R] and B [E, R, F] from adapters of each expert's own matrices, which were modules in transformers
        4. Where two of these are one matrix of ours, such as gate and up projection, each keeps its own ranks and its
        own outputs."""
        count, width, *features = self._our_shape(site)
        parts = self._parts_of_experts(site, width, tuple(features))
        if not parts:
            return None
        scale = max((pair[-1] for pairs in parts for pair in pairs), key=abs)
        ranks = [max(len(last) for _, _, last, _ in pairs) for pairs in parts]
        first = np.zeros((count, width, sum(ranks)), np.float32)
        last = np.zeros((count, sum(ranks), *features), np.float32)
        for start, pairs in zip(np.cumsum([0, *ranks]), parts, strict=False):
            for expert, (at, own_first, own_last, own_scale) in enumerate(pairs):
                rank = slice(start, start + len(own_last))
                first[expert, :, rank] = own_first
                output = last[(expert, rank, *at)]  # a view
                output[...] = own_last.reshape(output.shape) * (own_scale / scale if scale else 0)
        return first, last.reshape(count, sum(ranks), -1), scale

    def _parts_of_experts(self, site: Site, width: int, features: tuple[int, ...]) -> list[list[Any]]:
        """For each part of our matrix that has adapters, of all experts in order: (which part, A, B, scale)."""
        found: dict[str, list[Any]] = {}
        missing: list[tuple[str, str]] = []
        for part in self.apart.get((site.placement.path, site.placement.slot), ()):
            module = part.key.removesuffix(".weight")
            at = part.slot[len(site.placement.slot) + 2 :]  # behind the expert and D
            if f"{PREFIX}{module}.{MAGNITUDES}" in self.state:
                raise BadInput(
                    f"{self.file}: has a DoRA of {module}, and experts have plain LoRA alone; merge it in PEFT"
                )
            pair = self._take_pair(f"{PREFIX}{module}", width, np.zeros(features, bool)[at].size)
            if pair is None:
                missing.append((str(at), module))
            else:
                found.setdefault(str(at), []).append((at, *pair, self._scale(module, len(pair[1]))))
        for part_of, module in missing:
            if part_of in found:
                raise BadInput(f"{self.file}: has adapters of other experts and none of {module}; merge it in PEFT")
        return list(found.values())

    def _expert_pair(self, site: Site) -> Pair | None:
        """A [E, D, R] and B [E, R, F]."""
        targets = [other for other in self.sites if other.of_experts and self._is_target_parameter(other.module)]
        if site not in targets:
            return None
        name = f"{PREFIX}{experts_module(site, {target.placement.path[1:] for target in targets})}"
        count, width, features = self._widths(site)
        pair = self._take_pair(name, width, features)
        if pair is None:
            return None
        first, last = pair
        rank = self._pattern("rank_pattern", site.pattern_name, self._rank)
        if len(last) != rank * count:
            raise self._other_base(f"{name}.{LORA_A}", first.T.shape, (rank * count, width))
        return (
            first.reshape(width, count, rank).transpose(1, 0, 2),
            last.reshape(rank, count, features).swapaxes(0, 1),
            self._scale(site.pattern_name, rank),
        )

    @property
    def _rank(self) -> Any:
        return self.values.get("r", 8)  # PEFT's default

    def _check_dora(self, module: str) -> None:
        """BadInput where a module's tensors are not those that `use_dora` says: PEFT goes by the config, and takes
        magnitudes that it lacks from the base."""
        dora, has = self.values.get("use_dora", False), f"{PREFIX}{module}.{MAGNITUDES}" in self.state
        if dora != has:
            held = "has a" if has else "has no"
            raise BadInput(
                f"{self.file}: {held} {MAGNITUDES} of {module}, and {CONFIG} says use_dora={dora}; save the adapter "
                "again"
            )

    def _is_target_parameter(self, parameter: str) -> bool:
        names = self.values.get("target_parameters") or ()
        return any(parameter == name or parameter.endswith(f".{name}") for name in names)

    def _our_shape(self, site: Site) -> tuple[int, ...]:
        return site.placement.our_shape(self.shapes[site.placement.path])

    def _widths(self, site: Site) -> tuple[int, ...]:
        """D and F of a matrix, after the number E of experts where it holds those."""
        return site.placement.transform.merge(self._our_shape(site))

    def _take(self, name: str, shape: tuple[int | str, ...]) -> np.ndarray | None:
        """The tensor of this name, or None; `shape` is what fits the model, with a letter for what it leaves open."""
        tensor = self.state.pop(name, None)
        if tensor is None:
            return None
        if len(tensor.shape) != len(shape) or any(
            not isinstance(w, str) and w != got for w, got in zip(shape, tensor.shape, strict=True)
        ):
            if not tensor.size:
                raise BadInput(
                    f"{self.file}: {self.in_file[name]} is empty: its trainer (ZeRO-3, FSDP) saved it without "
                    "gathering its parts; save the adapter again, from all of them"
                )
            raise self._other_base(name, tensor.shape, shape)
        return tensor.astype(np.float32, copy=False)

    def _other_base(self, name: str, found: tuple[Any, ...], wanted: tuple[Any, ...]) -> BadInput:
        shown = ", ".join(map(str, wanted))
        return BadInput(
            f"{self.file}: {self.in_file[name]} is {list(found)} instead of [{shown}]: {self._another_base}"
        )

    @property
    def _another_base(self) -> str:
        base = self.values.get("base_model_name_or_path")
        return "it is an adapter of another base" + (f" ({base})" if base else "")

    def _scale(self, module: str, rank: int) -> np.float32:
        said = self._pattern("rank_pattern", module, self._rank)
        if rank != said:
            raise BadInput(
                f"{self.file}: the adapter of {module} has the rank {rank}, and {CONFIG} says {said} (r, "
                "rank_pattern); save the adapter again"
            )
        alpha = self._pattern("alpha_pattern", module, self.values.get("lora_alpha", 8))
        return np.float32(alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank))

    def _pattern(self, name: str, module: str, default: Any) -> Any:
        """The value of the first pattern that matches the end of a module's name, else `default`."""
        patterns = self.values.get(name) or {}
        # Matrices of multimodal models have longer names there.
        names = [module, *(outer + module.removeprefix(own) for outer, own in self.table.within.items())]
        if (own := module.removesuffix(".weight")) in self.old_modules:
            names.append(self.old_modules[own])
        ends = (value for pattern, value in patterns.items() if any(ends_with(name, pattern) for name in names))
        return next(ends, default)

    def _stacked(
        self, path: tuple[str, ...], entries: list[Leaves], dropout: float
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """(trained, fixed) leaves, stacked over all repetitions of a block: zero where a layer has no adapter, and
        padded to the largest rank."""
        kernel = self.shapes[("params", *path)]
        layers = is_stacked(path[0])
        axes = layers + entries[0][0].of_experts
        lead, width, features = kernel[:axes], kernel[axes], kernel[axes + 1 :]
        rank, flat = max(own[A].shape[-1] for _, own in entries), math.prod(features)
        shapes = {A: (*lead, width, rank), B: (*lead, rank, flat), MAGNITUDE: (*lead, flat), SCALE: lead[:layers]}
        leaves: dict[str, np.ndarray] = {}
        for site, own in entries:
            for name, value in own.items():
                leaf = leaves.setdefault(name, np.zeros(shapes.get(name, (*lead, *np.shape(value))), np.float32))
                leaf[site.placement.slot + tuple(slice(size) for size in np.shape(value))] = value
        for name in leaves.keys() & {B, MAGNITUDE}:
            leaves[name] = leaves[name].reshape(*leaves[name].shape[:-1], *features)
        if dropout:
            leaves[DROPOUT] = np.full(lead[:layers], dropout, np.float32)
        learns = {NUMBERS} if NUMBERS in leaves else {A, B, MAGNITUDE}
        arrays = {name: jnp.asarray(leaf) for name, leaf in leaves.items()}
        trained = {name: leaf for name, leaf in arrays.items() if name in learns}
        return trained, {name: leaf for name, leaf in arrays.items() if name not in learns}
