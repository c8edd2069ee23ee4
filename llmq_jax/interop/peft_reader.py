"""Adapters read from PEFT's folders; the names are in `interop.peft`."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llmq_jax.errors import BadInput
from llmq_jax.interop.peft import CONFIG, PREFIX, WEIGHTS, Site, experts_module, memory_table, sites_of
from llmq_jax.interop.safetensors_files import open_safetensors
from llmq_jax.interop.tensor_files import read_json
from llmq_jax.layers.lora import DROPOUT, MAGNITUDE, NUMBERS, PROJECTIONS, SCALE, A, B, from_adapters
from llmq_jax.models import abstract_variables

# Fields of adapter_config.json with which an adapter would compute something else.
PLAIN = {
    "bias": "none",
    "lora_bias": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "use_qalora": False,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "velora_config": None,
    "kasa_config": None,
    "monteclora_config": None,
}
# Ways to begin that change the base: such an adapter means another base than the one it is loaded onto.
CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_adapter(folder: Path, config: Any, variables: dict) -> dict:
    """The variables with the adapters of such a folder, and with the matrices that it holds whole in place of theirs.

    Strict: BadInput names what the folder has no place for, and the shapes of what is of another base.
    """
    values = read_json(folder / CONFIG)
    kind = values.get("peft_type")
    if kind not in ("LORA", "TINYLORA"):
        raise BadInput(f"{folder / CONFIG}: peft_type={kind!r} is not supported; LORA and TINYLORA are")
    _require_plain(folder, values)
    if not (folder / WEIGHTS).is_file():
        raise BadInput(f"{folder}: has no {WEIGHTS}; save the adapter as safetensors")
    state = {name: np.asarray(tensor) for name, tensor in open_safetensors(folder / WEIGHTS).items()}
    reader = _Reader(folder, values, state, config)
    found = reader.tiny() if kind == "TINYLORA" else reader.low_rank()
    variables = reader.whole_matrices(variables)
    reader.check_all_read()
    if not found:
        raise BadInput(f"{folder / WEIGHTS}: holds no adapter")
    return {**variables, **from_adapters(found)}


def _require_plain(folder: Path, values: Mapping[str, Any]) -> None:
    for name, plain in PLAIN.items():
        if values.get(name, plain) not in (plain, None):
            raise BadInput(f"{folder / CONFIG}: {name}={values[name]!r} is not supported, only {plain!r}")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGING_STARTS):
        raise BadInput(
            f"{folder / CONFIG}: init_lora_weights={start!r} changed the base; have PEFT save the adapter as a plain "
            "LoRA (path_initial_model_for_weight_conversion)"
        )


class _Reader:
    """One folder's tensors, from which those that have been read are taken."""

    def __init__(self, folder: Path, values: Mapping[str, Any], state: dict[str, np.ndarray], config: Any):
        self.folder, self.values, self.state, self.config = folder, values, dict(state), config
        self.sites = sites_of(config)
        self.shapes = {path: leaf.shape for path, leaf in flatten_dict(abstract_variables(config)).items()}

    def low_rank(self) -> dict:
        parts: dict[tuple, list] = {}
        for site in self.sites:
            pair = self._expert_pair(site) if site.of_experts else self._pair(site)
            if pair is None:
                continue
            first, last, rank = pair
            trained = {A: first, B: last}
            magnitude = self._take(site, f"{PREFIX}{site.module}.lora_magnitude_vector", last.shape[-1:])
            if magnitude is not None:
                trained[MAGNITUDE] = magnitude
            parts.setdefault(site.placement.path[1:], []).append((site, trained, {SCALE: self._scale(site, rank)}))
        dropout = self.values.get("lora_dropout") or 0.0
        return {path: self._stacked(path, entries, dropout) for path, entries in parts.items()}

    def tiny(self) -> dict:
        """Matrices in their order share the numbers of a group, as many as `weight_tying` says."""
        names = [site for site in self.sites if f"{PREFIX}{site.module}.tinylora_A" in self.state]
        tying = self.values.get("weight_tying", 0.0)
        groups = max(1, round(len(names) * (1.0 - tying)))
        size = max(1, len(names) // groups)
        parts: dict[tuple, list] = {}
        used = set()
        for index, site in enumerate(names):
            name = f"{PREFIX}{site.module}.tinylora"
            if f"{name}_P" not in self.state:
                raise BadInput(f"{self.folder / WEIGHTS}: holds no projections; save the adapter with save_projection")
            width, features = self._widths(site)
            first = self._take(site, f"{name}_A", (None, width)).T
            last = self._take(site, f"{name}_B", (features, first.shape[1])).T
            projections = self._take(site, f"{name}_P", (None, first.shape[1], first.shape[1])).swapaxes(1, 2)
            key = f"base_model.tinylora_v.{min(index // size, groups - 1)}"
            if key not in self.state:
                raise BadInput(f"{self.folder / WEIGHTS}: has no {key}, the numbers of {site.module}")
            used.add(key)
            fixed = {A: first, B: last, PROJECTIONS: projections, SCALE: np.float32(1)}
            parts.setdefault(site.placement.path[1:], []).append((site, {NUMBERS: self.state[key]}, fixed))
        for key in used:
            del self.state[key]
        dropout = self.values.get("tinylora_dropout") or 0.0
        return {path: self._stacked(path, entries, dropout) for path, entries in parts.items()}

    def whole_matrices(self, variables: dict) -> dict:
        """Variables with the matrices that the folder holds whole (`modules_to_save`) in place of theirs."""
        placements = {part.key: part for part in memory_table(self.config).placements(self.config)}
        params = dict(flatten_dict(variables["params"]))
        for name in [name for name in self.state if name.removeprefix(PREFIX) in placements]:
            part = placements[name.removeprefix(PREFIX)]
            leaf = np.array(params[part.path[1:]])
            shape = part.our_shape(leaf.shape)
            theirs = part.transform.their_shape(shape)
            tensor = self.state.pop(name)
            if tensor.shape != theirs:
                raise self._other_base(name, tensor.shape, theirs)
            leaf[part.slot] = part.transform.to_ours(tensor, shape)
            params[part.path[1:]] = jnp.asarray(leaf)
        return {**variables, "params": unflatten_dict(params)}

    def check_all_read(self) -> None:
        if self.state:
            some = sorted(self.state)
            more = f" and {len(some) - 1} more" if len(some) > 1 else ""
            hint = ""
            if any(name == f"{PREFIX}score.weight" for name in some) and self.config.labels is None:
                hint = "; it is a classifier's: load it onto one (lq.with_classifier)"
            raise BadInput(
                f"{self.folder / WEIGHTS}: {some[0]}{more} has no place in this {self.config.model_type}{hint}"
            )

    def _pair(self, site: Site) -> tuple[np.ndarray, np.ndarray, int] | None:
        name = f"{PREFIX}{site.module}"
        width, features = self._widths(site)
        first = self._take(site, f"{name}.lora_A.weight", (None, width))
        if first is None:
            return None
        last = self._take(site, f"{name}.lora_B.weight", (features, len(first)))
        if last is None:
            raise BadInput(f"{self.folder / WEIGHTS}: has {name}.lora_A.weight and no lora_B; save the adapter again")
        return first.T, last.T, len(first)

    def _expert_pair(self, site: Site) -> tuple[np.ndarray, np.ndarray, int] | None:
        """A [E, D, R] and B [E, R, F]."""
        module = experts_module(site, {s.placement.path[1:]: 0 for s in self.sites if self._targets(s)})
        if not self._targets(site):
            return None
        count, width, features = self._widths(site, experts=True)
        first = self._take(site, f"{PREFIX}{module}.lora_A.weight", (None, width))
        if first is None:
            return None
        rank = len(first) // count
        last = self._take(site, f"{PREFIX}{module}.lora_B.weight", (features, rank * count))
        return (
            first.reshape(count, rank, width).swapaxes(1, 2),
            last.reshape(features, rank, count).transpose(2, 1, 0),
            rank,
        )

    def _targets(self, site: Site) -> bool:
        names = self.values.get("target_parameters") or ()
        return site.of_experts and any(site.module == name or site.module.endswith(f".{name}") for name in names)

    def _widths(self, site: Site, experts: bool = False) -> tuple[int, ...]:
        shape = site.placement.our_shape(self.shapes[site.placement.path])
        if experts:
            return shape[0], shape[1], math.prod(shape[2:])
        return shape[0], math.prod(shape[1:])

    def _take(self, site: Site, name: str, shape: tuple[int | None, ...]) -> np.ndarray | None:
        """The tensor of this name, or None; `shape` is what fits the model, None what it leaves open."""
        tensor = self.state.pop(name, None)
        if tensor is None:
            return None
        if len(tensor.shape) != len(shape) or any(
            w not in (None, got) for w, got in zip(shape, tensor.shape, strict=True)
        ):
            raise self._other_base(name, tensor.shape, shape)
        return tensor.astype(np.float32)

    def _other_base(self, name: str, found: tuple, wanted: tuple) -> BadInput:
        shown = ", ".join("r" if size is None else str(size) for size in wanted)
        base = self.values.get("base_model_name_or_path")
        return BadInput(
            f"{self.folder / WEIGHTS}: {name} is {list(found)} instead of [{shown}]: it is an adapter of another base"
            + (f" ({base})" if base else "")
        )

    def _scale(self, site: Site, rank: int) -> np.float32:
        alpha = self.values.get("lora_alpha", 8)
        for pattern, other in (self.values.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", site.module):
                alpha = other
                break
        return np.float32(alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank))

    def _stacked(self, path: tuple, entries: list, dropout: float) -> tuple[dict, dict]:
        """Leaves over all layers of a stack, zero where a layer has no adapter, and up to the largest rank."""
        kernel = self.shapes[("params", *path)]
        stacked = path[0].startswith("group_")
        of_experts = entries[0][0].of_experts
        lead = kernel[: stacked + of_experts]
        features = kernel[stacked + of_experts + 1 :]
        rank = max(part[A].shape[-1] for _, trained, fixed in entries for part in (trained | fixed,))
        flat = math.prod(features)
        shapes = {
            A: (*lead, kernel[len(lead)], rank),
            B: (*lead, rank, flat),
            MAGNITUDE: (*lead, flat),
            SCALE: lead[:stacked],
        }
        trees = []
        for place in (1, 2):
            leaves: dict[str, np.ndarray] = {}
            for entry in entries:
                slot = entry[0].placement.slot
                for name, value in entry[place].items():
                    shape = shapes.get(name, (*lead, *np.shape(value)))
                    leaf = leaves.setdefault(name, np.zeros(shape, np.float32))
                    leaf[slot + tuple(slice(size) for size in np.shape(value))] = value
            trees.append(leaves)
        trained, fixed = trees
        for tree in trees:
            if B in tree:
                tree[B] = tree[B].reshape(*lead, rank, *features)
        if MAGNITUDE in trained:
            trained[MAGNITUDE] = trained[MAGNITUDE].reshape(*lead, *features)
        if dropout:
            fixed[DROPOUT] = np.full(lead[:stacked], dropout, np.float32)
        return tuple({name: jnp.asarray(leaf) for name, leaf in tree.items()} for tree in trees)
