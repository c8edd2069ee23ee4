"""`adapter_config.json` of PEFT's folders: what is read of it, and which adapters are refused by it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.compute

from llmq_jax.errors import BadInput
from llmq_jax.field_types import has_type, type_name
from llmq_jax.interop.peft import CONFIG
from llmq_jax.interop.tensor_files import read_json

# Fields of adapter_config.json that are read, with their types.
FIELDS = {
    "peft_type": str,
    "base_model_name_or_path": str,
    "revision": str,
    "r": int,
    "lora_alpha": float,
    "lora_dropout": float,
    "tinylora_dropout": float,
    "weight_tying": float,
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "target_parameters": list[str],
    "modules_to_save": list[str],
    "use_rslora": bool,
    "use_dora": bool,
}
# Fields of adapter_config.json with the only value that is supported: others make an adapter compute something else.
PLAIN = {
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
# Of these, what PEFT 0.21 cannot merge into its base, or (`layer_replication`) merges into another model.
UNMERGEABLE = ("layer_replication", "alora_invocation_tokens", "arrow_config")
# Initialisations that change the base: such an adapter belongs to another base than the one it is loaded onto.
CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` without null fields; BadInput for fields that we read and whose values are of another
    type."""
    values = {name: value for name, value in read_json(folder / CONFIG).items() if value is not None}
    for name, hint in FIELDS.items():
        if name in values and not has_type(values[name], hint):
            raise BadInput(f"{folder / CONFIG}: {name}={values[name]!r:.60} is not of the type {type_name(hint)}")
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern, value in values.get(name, {}).items():
            hint = int if name == "rank_pattern" else float
            if not has_type(value, hint):
                raise BadInput(
                    f"{folder / CONFIG}: {name} says {value!r:.60} of {pattern!r:.60}, which is not of the type "
                    f"{type_name(hint)}"
                )
            _check_pattern(folder, pattern)
    for name in ("lora_dropout", "tinylora_dropout", "weight_tying"):
        if not 0 <= values.get(name, 0) <= 1:
            raise BadInput(f"{folder / CONFIG}: {name}={values[name]} is not between 0 and 1")
    return values


def require_supported(folder: Path, values: Mapping[str, Any]) -> None:
    """BadInput for adapters that compute anything else than ours do, or whose trainer changed the base."""
    kind = values.get("peft_type")
    if kind not in ("LORA", "TINYLORA"):
        raise BadInput(f"{folder / CONFIG}: peft_type={kind!r} is not supported; LORA and TINYLORA are")
    for name, plain in PLAIN.items():
        if values.get(name, plain) != plain:
            advice = "" if name in UNMERGEABLE else ": merge it in PEFT"
            advice += ", which can where its matrices have biases of their own" if name == "lora_bias" else ""
            raise BadInput(f"{folder / CONFIG}: {name}={values[name]!r} is not supported, only {plain!r}{advice}")
    start = values.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGING_STARTS):
        raise BadInput(
            f"{folder / CONFIG}: init_lora_weights={start!r} changed the base; have PEFT save the adapter as a plain "
            "LoRA (path_initial_model_for_weight_conversion)"
        )


def _check_pattern(folder: Path, pattern: str) -> None:
    """BadInput for a pattern that may take for ever. Patterns are regular expressions by whoever made the file, and
    Python's time to search for some of them is exponential.

    Arrow uses RE2, whose time is linear in the lengths of name and pattern, except for counts ({1,1000}), which it
    expands. It has no backreferences and no lookahead.
    """
    if len(pattern) > 1000 or "{" in pattern:
        raise BadInput(f"{folder / CONFIG}: the pattern {pattern!r:.60} is too complicated; name the modules")
    try:
        re.compile(pattern)
        ends_with("", pattern)
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        raise BadInput(
            f"{folder / CONFIG}: {pattern!r:.60} is no pattern of modules' names that could be searched for in linear "
            f"time ({error!s:.200}); name the modules"
        ) from None


def ends_with(name: str, pattern: str) -> bool:
    """Whether the pattern matches a module's whole name, or all of it after some dot."""
    found = pyarrow.compute.match_substring_regex(pyarrow.scalar(name), rf"^(?:.*\.)?(?:{pattern})$")
    return bool(found.as_py())
