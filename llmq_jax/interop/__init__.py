"""Weights, configs and tokenizers, to and from the formats of other libraries.

`tables` and `configs` are the strict two-way machinery; each architecture's tables have a file of their own (`gpt2`);
the rest are readers and writers of files. Nothing here imports transformers, and only the reader of PyTorch's own files
imports PyTorch, when it is called.
"""

from llmq_jax.interop.architectures import (
    config_from_hf,
    config_from_state_dict,
    config_to_hf,
    from_state_dict,
    to_state_dict,
)

__all__ = ["config_from_hf", "config_from_state_dict", "config_to_hf", "from_state_dict", "to_state_dict"]


def __dir__() -> list[str]:
    return __all__
