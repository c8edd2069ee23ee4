"""PEFT's names for adapters, in its folders of `adapter_config.json` and `adapter_model.safetensors`.

A matrix `model.layers.0.self_attn.q_proj.weight` of transformers has its adapter at
`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` (r, in) and `.lora_B.weight` (out, r), DoRA's magnitude
at `.lora_magnitude_vector` (out): the names follow from the weight tables. Experts, which transformers keeps in two
parameters of one module, have A (E·r, in), expert by expert, and B (out, r·E), rank by rank. Where both parameters have
an adapter, that of `gate_up_proj` is at the module's `base_layer`. In transformers 4 each matrix of each expert was a
module, with the name that it has in files of weights: adapters of that time are read. TinyLoRA keeps `tinylora_A`, `_B`
and `_P` at each matrix, and `base_model.tinylora_v.G` for each group of matrices that share their trained vector.

LoRA-XS has no form of its own there, nor has TinyLoRA at experts and routers: they are written as the LoRA that they
equal, B' = M B.
"""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llmq_jax.errors import BadInput
from llmq_jax.interop.architectures import TABLES, weight_table
from llmq_jax.interop.safetensors_files import open_safetensors
from llmq_jax.interop.tables import SCORE, LazyTensor, Placement, WeightTable, experts_out_in, in_out, out_in
from llmq_jax.interop.torch_files import open_torch
from llmq_jax.layers.axes import is_stacked

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TORCH_WEIGHTS = "adapter_model.bin"
"""The file that PEFT wrote until 0.6 (2023)."""
PREFIX = "base_model.model."
"""Before the names of all modules."""
BASE_LAYER = ".base_layer"
"""After the name of a module with an adapter: the module itself, or what is adapted in it further."""
LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
MAGNITUDES = "lora_magnitude_vector"
"""What DoRA has beside A and B."""
TINY_A, TINY_B, TINY_P = "tinylora_A", "tinylora_B", "tinylora_P"
TINY_V = "base_model.tinylora_v"
"""Before the number of a group of matrices: the vector that they share in TinyLoRA."""
SCORE_WEIGHT = f"{PREFIX}{SCORE.key}"
"""A classifier's head."""


class Site(NamedTuple):
    """A matrix that may have an adapter, on both sides."""

    module: str
    """PEFT's name, without "base_model.model."."""
    placement: Placement

    @property
    def of_experts(self) -> bool:
        return self.placement.transform is experts_out_in

    @property
    def is_parameter(self) -> bool:
        """Whether in transformers it is not a module but a parameter of one: experts, routers."""
        return self.of_experts or "router" in self.placement.path

    @property
    def pattern_name(self) -> str:
        """The name that PEFT matches with its patterns of ranks and alphas: for a router's parameter it ends in
        `.weight`."""
        return f"{self.module}.weight" if self.is_parameter and not self.of_experts else self.module


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def weights_file(folder: Path) -> Path:
    """The file of a folder's tensors, whether or not it exists."""
    has_old_alone = (folder / TORCH_WEIGHTS).is_file() and not (folder / WEIGHTS).is_file()
    return folder / (TORCH_WEIGHTS if has_old_alone else WEIGHTS)


def open_tensors(folder: Path) -> Mapping[str, LazyTensor]:
    """The tensors of such a folder; BadInput where it has none."""
    file = weights_file(folder)
    if not file.is_file():
        raise BadInput(f"{folder}: has no {WEIGHTS} beside its {CONFIG}; get it again, or save the adapter again")
    return open_torch(file) if file.name == TORCH_WEIGHTS else open_safetensors(file)


def module_names(config: Any) -> dict[str, set[str]]:
    """{the last part of a module's name: paths of our matrices inside a block, or outside of the blocks}."""
    if config.model_type not in TABLES:  # the matrices of a user's own architecture have our names only
        return {}
    names: dict[str, set[str]] = {}
    for rule in memory_table(config).rules:
        if rule.path == "params/token_embedding/embedding":
            names[rule.key.removesuffix(".weight").split(".")[-1]] = {"token_embedding"}
    for site in sites_of(config):
        path = site.placement.path
        inside = path[3:-1] if is_stacked(path[1]) else path[1:-1]
        inside = (*inside, path[-1]) if site.of_experts else inside
        parts = site.module.split(".")
        for name in (parts[-1], ".".join(parts[-2:])):
            names.setdefault(name, set()).add("/".join(inside))
    return names


def sites_of(config: Any) -> list[Site]:
    """All matrices that may have an adapter, in the order of their modules."""
    sites = []
    for part in memory_table(config).placements(config):
        is_linear = part.path[-1] == "kernel" and part.transform in (in_out, out_in)
        if is_linear or part.transform is experts_out_in:
            sites.append(Site(part.key.removesuffix(".weight"), part))
    return sites


def experts_module(site: Site, found: Container[tuple[str, ...]]) -> str:
    """The module of an expert's parameter; where both parameters have adapters, that of `up_kernel` is inside."""
    module = site.module.rpartition(".")[0]
    path = site.placement.path[1:]
    inner = path[-1] == "up_kernel" and (*path[:-1], "down_kernel") in found
    return f"{module}{BASE_LAYER}" if inner else module


def memory_table(config: Any) -> WeightTable:
    """The table with the names that modules have in memory, where the experts of a layer are one tensor."""
    table = weight_table(config.model_type)
    return next((t for t in (table, *table.spellings) if not any("{expert}" in entry.key for entry in t.rules)), table)
