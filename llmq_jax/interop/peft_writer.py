"""Adapters written as PEFT's folders; the names are in `interop.peft`."""

import contextlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from llmq_jax.data.tokenizer_files import COMPANION_FILES
from llmq_jax.errors import BadInput, warn
from llmq_jax.interop.architectures import PARTS
from llmq_jax.interop.generation_config import GENERATION_CONFIG
from llmq_jax.interop.huggingface import CONFIG as BASE_CONFIG
from llmq_jax.interop.huggingface import is_hub_id
from llmq_jax.interop.peft import (
    BASE_LAYER,
    CONFIG,
    LORA_A,
    LORA_B,
    MAGNITUDES,
    PREFIX,
    SCORE_WEIGHT,
    TINY_A,
    TINY_B,
    TINY_P,
    TINY_V,
    WEIGHTS,
    Site,
    experts_module,
    sites_of,
)
from llmq_jax.interop.peft_whole import EMBEDDING, module_name
from llmq_jax.interop.safetensors_files import save_tensors
from llmq_jax.interop.tables import in_out
from llmq_jax.interop.tensor_files import read_json, write_json
from llmq_jax.layers.lora import (
    DROPOUT,
    LORA,
    LORA_FIXED,
    MAGNITUDE,
    NUMBERS,
    PROJECTIONS,
    SCALE,
    TIED,
    WHOLE,
    A,
    B,
    adapters,
    factors,
    spread,
)
from llmq_jax.models.heads import LM_HEAD, SCORE
from llmq_jax.whole_folders import check_target, whole_folder

ALONE = "model."
"""What names of modules begin with in a model that is no part of another; a head's does not."""
PEFT_VERSION = "0.21.2"  # whose folders these are
CARD = "README.md"  # a model card, which is its author's: kept as it is
EXPORTED = (CONFIG, WEIGHTS, CARD, GENERATION_CONFIG, "tokenizer.json", *COMPANION_FILES)
"""The files that an adapter folder of ours may consist of."""
TAKEN_FOR_EXPERTS = ("gate_proj", "up_proj", "down_proj")
"""In a model that has experts, PEFT takes modules of these names for the modules that experts were in transformers
4."""


def write_adapter(
    variables: dict[str, Any],
    config: Any,
    folder: str | os.PathLike[str],
    base: str,
    overwrite: bool,
    text_files: Any,
) -> Path:
    """Write the adapters of a model as a folder that PEFT loads onto `base`, the name of the model without them, for
    one of the hub also "org/name@revision". If that is a multimodal model, of which ours is a part, names are as in it.

    A classifier's head, and an embedding or a head that came with the adapters, are written whole, as PEFT's
    `modules_to_save` has them. `text_files` has a method `save(folder)`, which writes the tokenizer's files beside
    them. BadInput where there are no adapters, or one in a place where PEFT has none.
    """
    tied = TIED in variables.get(LORA, {})
    found = adapters(spread(variables))
    if not found:
        raise BadInput("this model has no adapters to write; add some with lq.lora, or save the whole model")
    prefix = _prefix_in(base, config)

    def named(module: str) -> str:
        return prefix + module.removeprefix(ALONE) if module.startswith(ALONE) else module

    everywhere = [site._replace(module=named(site.module)) for site in sites_of(config)]
    sites = [site for site in everywhere if site.placement.path[1:] in found]
    _refuse_what_peft_lacks(sites, found)
    tiny = _is_tiny(sites, found)
    in_short = everywhere if prefix == ALONE else None
    tensors, values = _tiny(sites, found, tied) if tiny else _low_rank(sites, found, in_short)
    whole = {name: named(module_name(config, name)) for name in variables[LORA_FIXED].get(WHOLE, {})}
    whole_tensors, saved = _whole(variables, config, whole, {site.module for site in sites})
    tensors |= whole_tensors
    values |= _named_base(base) | {
        "task_type": "CAUSAL_LM" if config.labels is None else "SEQ_CLS",
        "bias": "none",
        "fan_in_fan_out": any(site.placement.transform is in_out for site in sites),
        "inference_mode": True,
        "modules_to_save": saved or None,
        "layers_to_transform": None,
        "peft_version": PEFT_VERSION,
    }
    folder = Path(folder).expanduser().resolve()
    check_target(folder, overwrite, CONFIG, EXPORTED)
    if taken := taken_for_experts(variables, config):
        warn(
            f"PEFT {PEFT_VERSION} takes {named(taken)} and its like for experts, and refuses this folder or loads it "
            "without their adapters; it loads whole here (lq.load_adapter), and merged (lq.merge) anywhere"
        )
    with whole_folder(folder) as partial:
        write_json(partial / CONFIG, values)
        save_tensors(tensors, partial / WEIGHTS)
        text_files.save(partial)
        if (folder / CARD).is_file():
            shutil.copy(folder / CARD, partial / CARD)
    return folder


def taken_for_experts(variables: dict[str, Any], config: Any) -> str | None:
    """The first module with adapters that PEFT takes for experts, so that it does not load them; None where it loads
    all."""
    everywhere, found = sites_of(config), adapters(spread(variables))
    sites = [site for site in everywhere if site.placement.path[1:] in found]
    if _is_tiny(sites, found) or not any(site.of_experts for site in everywhere):
        return None
    return next(
        (site.module for site in sites if site.module.endswith(TAKEN_FOR_EXPERTS) and not site.of_experts), None
    )


def _is_tiny(sites: list[Site], found: Mapping[tuple[str, ...], Any]) -> bool:
    """Whether these are written as PEFT's TinyLoRA. That has no parameters, which experts are: with those, they are
    written as the LoRA that they equal."""
    return any(NUMBERS in trained for trained, _ in found.values()) and not any(site.is_parameter for site in sites)


def _refuse_what_peft_lacks(sites: list[Site], found: Mapping[tuple[str, ...], Any]) -> None:
    """BadInput where an adapter stands, or is of a kind, that PEFT has none of."""
    homeless = found.keys() - {site.placement.path[1:] for site in sites}
    if homeless:
        raise BadInput(f"PEFT has no adapter at {'/'.join(min(homeless))}; merge it (lq.merge) and save the model")
    for site in sites:
        trained, fixed = found[site.placement.path[1:]]
        if site.is_parameter and (MAGNITUDE in trained or DROPOUT in fixed):
            raise BadInput(
                f"PEFT has plain LoRA without dropout alone at {site.module}; merge it (lq.merge) and save the model"
            )
        if site.module == SCORE:
            raise BadInput("PEFT has no adapter at score, a classifier's head; merge it (lq.merge) and save the model")


def _whole(
    variables: dict[str, Any], config: Any, modules: Mapping[str, str], adapted: set[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """(tensors, the config's `modules_to_save`) of what is written whole: a classifier's head, and of embedding and
    language-model head those in `modules`, by PEFT's names for them. `adapted` are the modules with adapters."""
    params = variables["params"]
    if config.labels is None and EMBEDDING in modules and LM_HEAD not in params:
        # PEFT takes a copy of the embedding for a copy of it alone, so a tied head is written too.
        modules = {**modules, LM_HEAD: module_name(config, LM_HEAD)}
    tensors: dict[str, np.ndarray] = {}
    for name, module in modules.items():
        has_own = name == LM_HEAD and LM_HEAD in params
        matrix = params[LM_HEAD]["kernel"].T if has_own else params[EMBEDDING]["embedding"]
        # PEFT puts no adapter on a copy: a head with an adapter is saved as the adapter's base layer.
        inner = BASE_LAYER if module in adapted else ""
        tensors[f"{PREFIX}{module}{inner}.weight"] = np.ascontiguousarray(matrix, np.float32)
    saved = [module.split(".")[-1] for module in modules.values() if module not in adapted]
    if config.labels is not None:
        score = np.asarray(params[SCORE]["kernel"])
        tensors[SCORE_WEIGHT] = np.ascontiguousarray(score.reshape(score.shape[0], -1).T)
        saved.append(SCORE)
    return tensors, saved


def _prefix_in(base: str, config: Any) -> str:
    """What the names of the base's modules begin with where ours begin with `model.`. The hub is not asked what its
    model is: one that was loaded here is in its cache."""
    prefixes = {name: part.prefix for name, part in PARTS.items() if part.model_type == config.model_type}
    if not base or not prefixes:
        return ALONE
    path, (name, _, revision) = Path(base).expanduser(), base.partition("@")
    if path.exists():
        file = (path.parent if path.is_file() else path) / BASE_CONFIG
    else:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        cached = None
        if is_hub_id(name):
            with contextlib.suppress(HFValidationError):
                cached = try_to_load_from_cache(name, BASE_CONFIG, revision=revision or None)
        if not isinstance(cached, str):
            warn(
                f"{base} is not on this computer, so that it cannot be seen whether it is multimodal: the adapters are "
                "named for the text model alone, and PEFT finds none of them in a multimodal one; load it once "
                "(lq.load), and write them again"
            )
            return ALONE
        file = Path(cached)
    kind = read_json(file).get("model_type") if file.is_file() else None
    return prefixes.get(kind, ALONE) if isinstance(kind, str) else ALONE


def _named_base(base: str) -> dict[str, Any]:
    """The config's fields that name the base; PEFT has a separate one for a revision on the hub."""
    name, _, revision = base.partition("@")
    if not revision or Path(base).exists() or not is_hub_id(name):
        return {"base_model_name_or_path": base or None}
    return {"base_model_name_or_path": name, "revision": revision}


def _low_rank(
    sites: list[Site], found: Mapping[tuple[str, ...], Any], everywhere: list[Site] | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, fields of the config) of LoRA and DoRA, and of what equals a LoRA. `everywhere` are the model's
    matrices, or None where it has others that are not known, which short names might mean too."""
    tensors: dict[str, np.ndarray] = {}
    alphas, ranks = {}, {}
    linears: list[str] = []
    parameters: list[str] = []
    dropouts: set[float] = set()
    for site in sites:
        trained, fixed = found[site.placement.path[1:]]
        pair = _pair_of_layer(site, trained, fixed)
        if pair is None:
            continue
        first, last, scale = pair
        rank, slot = first.shape[-1], site.placement.slot
        name = f"{PREFIX}{experts_module(site, found) if site.of_experts else site.module}"
        tensors[f"{name}.{LORA_A}"], tensors[f"{name}.{LORA_B}"] = _in_their_shapes(first, last)
        if MAGNITUDE in trained:
            tensors[f"{name}.{MAGNITUDES}"] = np.asarray(trained[MAGNITUDE])[slot].reshape(-1)
        if DROPOUT in fixed:
            dropouts.add(_seven_digits(np.asarray(fixed[DROPOUT])[slot]))
        (parameters if site.is_parameter else linears).append(site.pattern_name)
        alphas[site.pattern_name], ranks[site.pattern_name] = _seven_digits(scale * rank), rank
    if len(dropouts) > 1:
        raise BadInput(
            f"PEFT has one dropout for all adapters, and these have {', '.join(map(str, sorted(dropouts)))}; merge "
            "them (lq.merge) and save the model"
        )
    rank, alpha = _most(ranks), _most(alphas)
    others = None if everywhere is None else [site.module for site in everywhere if not site.is_parameter]
    return tensors, {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(dropouts, default=0.0),
        "target_modules": linears if others is None else _short_names(linears, others),
        "target_parameters": sorted({".".join(name.split(".")[3:]) for name in parameters}) or None,
        "rank_pattern": {re.escape(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(name): a for name, a in alphas.items() if a != alpha},
        "use_rslora": False,
        "use_dora": any(MAGNITUDE in trained for trained, _ in found.values()),
        "init_lora_weights": True,
    }


def _pair_of_layer(
    site: Site, trained: dict[str, Any], fixed: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, float] | None:
    """A and B of a site's layer, and their scale, which is not in B; None where the layer has no adapter. Adapters of
    parameters are in all layers: zeros there."""
    slot = site.placement.slot
    scale = float(np.asarray(fixed[SCALE])[slot])
    if not (scale or site.is_parameter):
        return None
    unscaled = {**fixed, SCALE: jnp.ones_like(fixed[SCALE])}
    first, last = (np.asarray(leaf)[slot] for leaf in factors(trained, unscaled))
    return (first, last, scale) if scale else (first, np.zeros_like(last), float(np.abs(fixed[SCALE]).max()))


def _in_their_shapes(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A [D, R] and B [R, ...] of a matrix as PEFT's (r, in) and (out, r); A [E, D, R] and B [E, R, ...] of experts as
    (E·r, in), expert by expert, and (out, r·E), rank by rank."""
    last = last.reshape(*last.shape[: first.ndim - 1], -1)
    if first.ndim == 3:
        first, last = first.swapaxes(1, 2).reshape(-1, first.shape[1]), last.transpose(2, 1, 0)
        last = last.reshape(last.shape[0], -1)
    else:
        first, last = first.T, last.T
    return np.ascontiguousarray(first), np.ascontiguousarray(last)


def _tiny(
    sites: list[Site], found: Mapping[tuple[str, ...], Any], tied: bool
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, fields of the config) of TinyLoRA, each matrix with numbers of its own or, if `tied`, all with the
    same; the scale is multiplied into the projections."""
    tensors: dict[str, np.ndarray] = {}
    targets: list[str] = []
    for site in sites:
        trained, fixed = found[site.placement.path[1:]]
        leaves = {name: np.asarray(leaf)[site.placement.slot] for name, leaf in (trained | fixed).items()}
        if leaves[SCALE] == 0:
            continue
        last = leaves[B].reshape(leaves[B].shape[0], -1)
        projections = leaves[SCALE] * leaves[PROJECTIONS].swapaxes(1, 2)
        for name, leaf in ((TINY_A, leaves[A].T), (TINY_B, last.T), (TINY_P, projections)):
            tensors[f"{PREFIX}{site.module}.{name}"] = np.ascontiguousarray(leaf)
        tensors[f"{TINY_V}.{0 if tied else len(targets)}"] = np.array(leaves[NUMBERS])
        targets.append(site.module)
    return tensors, {
        "peft_type": "TINYLORA",
        "r": leaves[A].shape[-1],
        "u": leaves[NUMBERS].shape[-1],
        "weight_tying": float(tied),
        "projection_seed": 42,
        "save_projection": True,
        "tinylora_dropout": _seven_digits(leaves.get(DROPOUT, 0.0)),
        "target_modules": targets,
        "init_weights": True,
    }


def _short_names(modules: list[str], everywhere: list[str]) -> list[str]:
    """The modules by the ends of their names, where an end means only modules of the list; else by their whole
    names."""
    names: set[str] = set()
    for module in modules:
        parts = module.split(".")
        ends = (".".join(parts[-count:]) for count in (1, 2, len(parts)))
        alike = {end: [name for name in everywhere if f".{name}".endswith(f".{end}")] for end in ends}
        names.add(next(end for end, others in alike.items() if set(others) <= set(modules)))
    return sorted(names)


def _seven_digits(number: Any) -> float:
    """A number of float32 as it was before it was rounded to that: 0.1, not 0.10000000149."""
    return float(f"{float(number):.7g}")


def _most(values: Mapping[str, Any]) -> Any:
    """The most frequent value."""
    counted = list(values.values())
    value = max(counted, key=counted.count)
    return int(value) if float(value).is_integer() else value
