"""Adapters read from PEFT's folders; the names are in `interop.peft`."""

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from llmq_jax.errors import BadInput, warn
from llmq_jax.interop.huggingface import is_hub_id
from llmq_jax.interop.peft import (
    CONFIG,
    LORA_A,
    MAGNITUDES,
    PREFIX,
    SCORE_WEIGHT,
    TINY_A,
    TINY_B,
    TINY_P,
    TINY_V,
    Site,
    experts_module,
    open_tensors,
    sites_of,
    weights_file,
)
from llmq_jax.interop.peft_config import read_config, require_supported
from llmq_jax.interop.peft_tensors import AdapterTensors
from llmq_jax.interop.peft_whole import EMBEDDING, module_name, with_embedding_and_head
from llmq_jax.interop.tables import in_out
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
from llmq_jax.models.heads import LM_HEAD


def read_adapter(folder: Path, config: Any, variables: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(config, variables) with the adapters of a PEFT folder, and with the embedding and the head that it holds whole
    in place of theirs: the config may then have another vocabulary size, or a head that is no longer tied.

    Strict: BadInput names what has no place in this model, and the shapes of what belongs to another base.
    """
    values = read_config(folder)
    require_supported(folder, values)
    tensors = AdapterTensors(folder, values, config)
    trains = values.get("bias", "none")  # of a model without biases PEFT saves the same, whatever it says
    if trains != "none" and (biases := [name for name in tensors.in_file.values() if name.endswith(".bias")]):
        raise BadInput(f"{tensors.file}: holds {biases[0]}, and bias={trains!r} is not supported: merge it in PEFT")
    config, variables, replaced = with_embedding_and_head(tensors, config, variables)
    reader = _Reader(tensors, config)
    found = reader.tiny() if values["peft_type"] == "TINYLORA" else reader.low_rank()
    _check_all_read(tensors, config)
    if not found:
        beside = " beside an embedding or a head: merge it in PEFT" if replaced else ""
        raise BadInput(f"{tensors.file}: holds no adapter of a layer{beside}")
    trees = from_adapters(found)
    if reader.shared is not None:
        trees[LORA] = {TIED: {NUMBERS: jnp.asarray(reader.shared)}}
    if replaced:
        marks = {name: TRAINS if trains else STAYS for name, trains in replaced.items()}
        trees[LORA_FIXED][WHOLE] = {name: jnp.asarray(mark) for name, mark in marks.items()}
    return config, {**variables, **trees}


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


class _Reader:
    """The adapters of a folder's tensors, for the model of a config."""

    def __init__(self, tensors: AdapterTensors, config: Any):
        self.tensors, self.sites = tensors, sites_of(config)
        self.shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract_variables(config)).items()}
        self.shared: np.ndarray | None = None
        """The numbers of a TinyLoRA that all matrices share."""

    def low_rank(self) -> Found:
        parts: dict[tuple[str, ...], list[Leaves]] = {}
        for site in self.sites:
            pair = (self._expert_pair(site) or self._pairs_apart(site)) if site.of_experts else self._pair(site)
            if pair is None:
                continue
            first, last, scale = pair
            leaves = {A: first, B: last, SCALE: scale}
            self.tensors.check_dora(site.module)
            magnitude = self.tensors.take(f"{PREFIX}{site.module}.{MAGNITUDES}", last.shape[-1:])
            if magnitude is not None:
                leaves[MAGNITUDE] = magnitude
            parts.setdefault(site.placement.path[1:], []).append((site, leaves))
        dropout = float(self.tensors.values.get("lora_dropout", 0))
        left_out = f"{self.tensors.folder / CONFIG}: lora_dropout={dropout} is left out"
        if dropout and any(site.is_parameter for entries in parts.values() for site, _ in entries):
            # In transformers 4 experts were modules, and their adapters had dropout.
            warn(f"{left_out}: adapters of experts have none here, nor in PEFT")
            dropout = 0.0
        head = (LM_HEAD, "kernel")
        if dropout and head in parts:
            warn(f"{left_out} at lm_head, which works within the loss")
        return {path: self._stacked(path, entries, dropout * (path != head)) for path, entries in parts.items()}

    def tiny(self) -> Found:
        """TinyLoRA's adapters. The matrices, in their order, form as many groups as `weight_tying` says, each of which
        shares its numbers. In further training they stay shared only where there is a single group."""
        sites = [site for site in self.sites if f"{PREFIX}{site.module}.{TINY_A}" in self.tensors.state]
        groups = max(1, round(len(sites) * (1.0 - self.tensors.values.get("weight_tying", 0.0))))
        size = max(1, len(sites) // groups)
        keys = [f"{TINY_V}.{min(index // size, groups - 1)}" for index in range(len(sites))]
        numbers = {key: self.tensors.take(key, ("u",)) for key in set(keys)}
        parts: dict[tuple[str, ...], list[Leaves]] = {}
        for site, key in zip(sites, keys, strict=True):
            name = f"{PREFIX}{site.module}"
            width, features = self._widths(site)
            pair = self.tensors.take_pair(name, width, features, TINY_A, TINY_B)
            assert pair is not None  # these are the sites that have A
            first, last = pair
            projections = self.tensors.take(f"{name}.{TINY_P}", ("u", len(last), len(last)))
            if projections is None:
                raise BadInput(
                    f"{self.tensors.file}: has no {name}.{TINY_P}; save the adapter with save_projection=True"
                )
            own = numbers[key]
            if own is None or len(own) != len(projections):
                raise BadInput(
                    f"{self.tensors.file}: has no {key} of {len(projections)} numbers, as many as {name}.{TINY_P} has "
                    "matrices; save the adapter again"
                )
            fixed = {A: first, B: last, PROJECTIONS: projections.swapaxes(1, 2), SCALE: np.float32(1)}
            parts.setdefault(site.placement.path[1:], []).append((site, {NUMBERS: own, **fixed}))
        if groups == 1 and len(sites) > 1:
            self.shared = numbers[keys[0]]
        dropout = float(self.tensors.values.get("tinylora_dropout", 0))
        return {path: self._stacked(path, entries, dropout) for path, entries in parts.items()}

    def _pair(self, site: Site) -> Pair | None:
        name, parameter = f"{PREFIX}{site.module}", f"{site.module}.weight"
        if not self.tensors.is_target_parameter(parameter):
            width, features = self._widths(site)
            pair = self.tensors.take_pair(name, width, features)
            return None if pair is None else (*pair, self.tensors.scale(site.module, len(pair[1])))
        # A module's weight that was adapted as a parameter: patterns name the parameter, and B A has the weight's own
        # orientation.
        rows, columns = site.placement.transform.their_shape(self._our_shape(site))
        pair = self.tensors.take_pair(name, columns, rows)
        if pair is None:
            return None
        first, last = (pair[1].T, pair[0].T) if site.placement.transform is in_out else pair
        return first, last, self.tensors.scale(parameter, len(last))

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
        for part in self.tensors.apart.get((site.placement.path, site.placement.slot), ()):
            module = part.key.removesuffix(".weight")
            at = part.slot[len(site.placement.slot) + 2 :]  # behind the expert and D
            if f"{PREFIX}{module}.{MAGNITUDES}" in self.tensors.state:
                raise BadInput(
                    f"{self.tensors.file}: has a DoRA of {module}, and experts have plain LoRA alone; merge it in PEFT"
                )
            pair = self.tensors.take_pair(f"{PREFIX}{module}", width, np.zeros(features, bool)[at].size)
            if pair is None:
                missing.append((str(at), module))
            else:
                found.setdefault(str(at), []).append((at, *pair, self.tensors.scale(module, len(pair[1]))))
        for part_of, module in missing:
            if part_of in found:
                raise BadInput(
                    f"{self.tensors.file}: has adapters of other experts and none of {module}; merge it in PEFT"
                )
        return list(found.values())

    def _expert_pair(self, site: Site) -> Pair | None:
        """A [E, D, R] and B [E, R, F]."""
        targets = [other for other in self.sites if other.of_experts and self.tensors.is_target_parameter(other.module)]
        if site not in targets:
            return None
        name = f"{PREFIX}{experts_module(site, {target.placement.path[1:] for target in targets})}"
        count, width, features = self._widths(site)
        pair = self.tensors.take_pair(name, width, features)
        if pair is None:
            return None
        first, last = pair
        rank = self.tensors.pattern("rank_pattern", site.pattern_name, self.tensors.rank)
        if len(last) != rank * count:
            raise self.tensors.misfit(f"{name}.{LORA_A}", first.T.shape, (rank * count, width))
        return (
            first.reshape(width, count, rank).transpose(1, 0, 2),
            last.reshape(rank, count, features).swapaxes(0, 1),
            self.tensors.scale(site.pattern_name, rank),
        )

    def _our_shape(self, site: Site) -> tuple[int, ...]:
        return site.placement.our_shape(self.shapes[site.placement.path])

    def _widths(self, site: Site) -> tuple[int, ...]:
        """D and F of a matrix, after the number E of experts where it holds those."""
        return site.placement.transform.merge(self._our_shape(site))

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


def _check_all_read(tensors: AdapterTensors, config: Any) -> None:
    """BadInput where tensors are left: what they are, as far as their names tell."""
    if not tensors.state:
        return
    some = sorted(tensors.in_file[name] for name in tensors.state)
    more = f" and {len(some) - 1} more" if len(some) > 1 else ""
    hint = ""
    whole = tensors.values.get("modules_to_save") or ()
    if SCORE_WEIGHT in some:
        hint = "; it is a classifier's: load it onto one (lq.with_classifier)"
    elif config.labels is not None and some[0].startswith(f"{PREFIX}{LM_HEAD}."):
        hint = "; it is a language model's head, and this is a classifier: load it onto the language model"
    elif any(f".{name}." in some[0] for name in whole):
        hint = f"; of modules_to_save={whole} only embeddings and heads are supported: merge it in PEFT"
    elif "lora_embedding_" in some[0] or some[0].startswith(f"{PREFIX}{module_name(config, EMBEDDING)}."):
        hint = "; of embeddings only that of tokens may have an adapter, and only LoRA: merge it in PEFT"
    elif "lora_" in some[0]:
        hint = f": {tensors.another_base}"
    raise BadInput(f"{tensors.file}: {some[0]}{more} has no place in this {config.model_type}{hint}")
