"""The tensors of a PEFT folder, and what its `adapter_config.json` says of them; the names are in `interop.peft`."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmq_jax.errors import BadInput, warn
from llmq_jax.interop.architectures import weight_table
from llmq_jax.interop.peft import (
    CONFIG,
    LORA_A,
    LORA_B,
    MAGNITUDES,
    PREFIX,
    memory_table,
    open_tensors,
    sites_of,
    weights_file,
)
from llmq_jax.interop.peft_config import ends_with
from llmq_jax.interop.tables import Placement
from llmq_jax.layers.axes import is_stacked


class AdapterTensors:
    """One folder's tensors, by the names that they have in transformers 5; those that were taken are removed. `config`
    is that of the model which they are to go onto."""

    def __init__(self, folder: Path, values: Mapping[str, Any], config: Any):
        self.folder, self.file, self.values = folder, weights_file(folder), values
        self.table = memory_table(config)
        self.renamed, self.apart = _names_of_files(config)
        self.in_file: dict[str, str] = {}
        """{a tensor's name in memory: what this folder calls it}"""
        self.old_modules: dict[str, str] = {}
        """{a module's name in memory: what this folder calls it}, where the two differ."""
        state = {name: np.asarray(tensor) for name, tensor in open_tensors(folder).items()}
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

    def take(self, name: str, shape: tuple[int | str, ...]) -> np.ndarray | None:
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
            raise self.misfit(name, tensor.shape, shape)
        return tensor.astype(np.float32, copy=False)

    def take_pair(
        self, name: str, width: int, features: int, a: str = LORA_A, b: str = LORA_B
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """A [D, R] and B [R, F] of a module, or None where it has no adapter; `a` and `b` are what PEFT calls them."""
        first = self.take(f"{name}.{a}", ("r", width))
        if first is None:
            return None
        if not len(first):
            module = name.removeprefix(PREFIX)
            raise BadInput(
                f"{self.file}: the adapter of {module} has the rank 0; it needs at least 1; save the adapter again"
            )
        last = self.take(f"{name}.{b}", (features, len(first)))
        if last is None:
            raise BadInput(
                f"{self.file}: has {self.in_file[f'{name}.{a}']} and no {b.removesuffix('.weight')}; save the adapter "
                "again"
            )
        return first.T, last.T

    def scale(self, module: str, rank: int) -> np.float32:
        """What the product of A and B is multiplied by, for this name in the config's patterns; BadInput where they say
        another rank."""
        said = self.pattern("rank_pattern", module, self.rank)
        if rank != said:
            raise BadInput(
                f"{self.file}: the adapter of {module} has the rank {rank}, and {CONFIG} says {said} (r, "
                "rank_pattern); save the adapter again"
            )
        alpha = self.pattern("alpha_pattern", module, self.values.get("lora_alpha", 8))
        return np.float32(alpha / (math.sqrt(rank) if self.values.get("use_rslora") else rank))

    def pattern(self, name: str, module: str, default: Any) -> Any:
        """The value of the first pattern that matches the end of a module's name, else `default`."""
        patterns = self.values.get(name) or {}
        # Matrices of multimodal models have longer names there.
        names = [module, *(outer + module.removeprefix(own) for outer, own in self.table.within.items())]
        if (own := module.removesuffix(".weight")) in self.old_modules:
            names.append(self.old_modules[own])
        ends = (value for pattern, value in patterns.items() if any(ends_with(name, pattern) for name in names))
        return next(ends, default)

    @property
    def rank(self) -> Any:
        """Of the modules for which `rank_pattern` says no other; 8 is PEFT's default."""
        return self.values.get("r", 8)

    def is_target_parameter(self, parameter: str) -> bool:
        """Whether `target_parameters` names a module's parameter, whose adapter has the parameter's orientation."""
        names = self.values.get("target_parameters") or ()
        return any(parameter == name or parameter.endswith(f".{name}") for name in names)

    def check_dora(self, module: str) -> None:
        """BadInput where a module's tensors are not those that `use_dora` says: PEFT goes by the config, and takes
        magnitudes that it lacks from the base."""
        dora, has = self.values.get("use_dora", False), f"{PREFIX}{module}.{MAGNITUDES}" in self.state
        if dora != has:
            held = "has a" if has else "has no"
            raise BadInput(
                f"{self.file}: {held} {MAGNITUDES} of {module}, and {CONFIG} says use_dora={dora}; save the adapter "
                "again"
            )

    def misfit(self, name: str, found: tuple[Any, ...], wanted: tuple[Any, ...]) -> BadInput:
        """The error about a tensor of another shape than the model's."""
        shown = ", ".join(map(str, wanted))
        return BadInput(f"{self.file}: {self.in_file[name]} is {list(found)} instead of [{shown}]: {self.another_base}")

    @property
    def another_base(self) -> str:
        base = self.values.get("base_model_name_or_path")
        return "it is an adapter of another base" + (f" ({base})" if base else "")


def _names_of_files(config: Any) -> tuple[dict[str, str], dict[tuple[Any, ...], list[Placement]]]:
    """Where modules have other names in memory than in files (those of transformers 4, in which each expert was a
    module): ({name in files: name in memory}, {(path, slot) of the matrices of a layer's experts: the parts of
    each})."""
    in_memory = {(site.placement.path, site.placement.slot): site for site in sites_of(config)}
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
