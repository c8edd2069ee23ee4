"""Which architecture has which tables, and the four functions that apply them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from llmq_jax.errors import BadInput
from llmq_jax.interop import gpt2
from llmq_jax.interop.configs import ConfigTable
from llmq_jax.interop.tables import WeightTable


class Tables(NamedTuple):
    layouts: Mapping[str, WeightTable]
    config: ConfigTable


TABLES = {
    "gpt2": Tables(gpt2.LAYOUTS, gpt2.CONFIG),
}


def from_state_dict(state: Mapping[str, Any], config: Any, layout: str = "hf", dtype: Any = None) -> dict:
    """The variables of a model whose PyTorch counterpart has this state dict.

    `state` maps names to numpy arrays, or to anything with a shape that numpy can read (torch tensors, the lazy tensors
    of our readers); it is read tensor by tensor. Types are kept unless `dtype` is given. Whatever is missing, unread,
    of another shape or not tied where it should be is named in one BadInput.
    """
    return weight_table(config.model_type, layout).from_state_dict(state, config, dtype)


def to_state_dict(variables: dict, config: Any, layout: str = "hf") -> dict[str, np.ndarray]:
    """{PyTorch name: numpy array}, the way back; also for gradients or any other tree with the variables' structure.

    A tied head has no name of its own, as in the files that transformers writes.
    """
    lazy = weight_table(config.model_type, layout).lazy_state_dict(variables, config)
    return {name: np.array(tensor) for name, tensor in lazy.items()}


def config_from_hf(values: Mapping[str, Any]) -> Any:
    """The config of a `config.json`. A field that changes the computation and is not supported is BadInput."""
    if "model_type" not in values:
        raise BadInput(f"config.json has no model_type; supported: {', '.join(TABLES)}")
    return config_table(values["model_type"]).from_hf(values)


def config_to_hf(config: Any) -> dict[str, Any]:
    """The `config.json` of a config, as a dict."""
    return config_table(config.model_type).to_hf(config)


def weight_table(model_type: str, layout: str = "hf") -> WeightTable:
    layouts = _tables(model_type).layouts
    if layout not in layouts:
        raise BadInput(f"{model_type} has no layout {layout!r}; it has {', '.join(layouts)}")
    return layouts[layout]


def config_table(model_type: str) -> ConfigTable:
    return _tables(model_type).config


def _tables(model_type: str) -> Tables:
    if model_type not in TABLES:
        raise BadInput(f"model_type {model_type!r} is not supported; supported: {', '.join(TABLES)}")
    return TABLES[model_type]
