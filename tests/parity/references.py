"""PyTorch models to compare with: tiny, and randomised so that no fault can hide behind an initial value."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import transformers

from convert.parity_reference import Reference, randomise
from llmq_jax.interop import config_to_hf
from tests.parity.gradients import assert_same_gradients

__all__ = [
    "PAIRS",
    "assert_same_gradients",
    "config_of_transformers",
    "fields_of_transformers",
    "numpy_gradients",
    "numpy_state",
    "randomise",
]

PAIRS = [
    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5, or 6, who knows"},
    {"prompt": "Name a city in Japan (日本):", "chosen": " Kyoto, the old capital 😀", "rejected": " Rome"},
    {"prompt": "Count:\n", "chosen": "1, 2, 3, 4, 5, 6, 7", "rejected": "1"},
    {"prompt": "Say no.", "chosen": " No.", "rejected": " Yes."},
]
"""Of answers, as TRL reads them: of several lengths, with characters of several bytes."""


FOR_OTHERS = {
    "architectures",
    # RoPE as transformers 4 spells it, which 5 reads and does not write.
    *("rope_theta", "rope_scaling", "rope_local_base_freq", "original_max_position_embeddings"),
    "n_ctx",  # read by llama.cpp
    *("scoring_func", "topk_method", "moe_layer_freq"),  # read by vLLM, and in DeepSeek's own files
}
"""Fields of an exported config.json that transformers 5 does not write itself."""


def fields_of_transformers(values: Mapping[str, Any]) -> dict[str, Any]:
    """An exported config.json without those."""
    return {name: value for name, value in values.items() if name not in FOR_OTHERS}


def config_of_transformers(ours: Any, *undeclared: str) -> Any:
    """What transformers makes of an exported config: it has the export's fields, with their values, and its class
    declares all but the `undeclared`."""
    values = config_to_hf(ours)
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(values), bos_token_id=0, eos_token_id=0)
    declared = {*type(theirs)().to_dict(), *theirs.attribute_map, *undeclared}
    for name, value in fields_of_transformers(values).items():
        assert name in declared, f"{name} is a field that transformers does not have"
        assert getattr(theirs, name) == value, name
    return theirs


def numpy_state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The model's state dict as numpy arrays."""
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def numpy_gradients(model: torch.nn.Module, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The gradients that a backward pass left, by the names in a file, which are `names`; a tied parameter's once."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Reference.of(model, names).as_saved(gradients)
