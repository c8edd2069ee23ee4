"""llmq_jax: modern LLM research in JAX/Flax, readable as the papers, exact against PyTorch, fast under jit.

    import llmq_jax as lq

    lm = lq.load("gpt2")
    print(lq.generate(lm, "The meaning of life is", max_new_tokens=20).text[0])

Names are imported when they are first used, so that `import llmq_jax` alone does not wait for JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmq_jax import data, generation, interop, layers, models, objectives, training
    from llmq_jax.adapters import load_adapter, lora, merge, save_adapter, unmerge
    from llmq_jax.data import ByteTokenizer, FileTokenizer, GPT2Tokenizer, load_tokenizer
    from llmq_jax.errors import BadInput
    from llmq_jax.generation import Generation, PromptCache, Sampler, generate, stream
    from llmq_jax.interop.generation_config import GenerationConfig
    from llmq_jax.interop.huggingface import save_hf
    from llmq_jax.language_model import LanguageModel, with_classifier
    from llmq_jax.layers.expert_balance import Balance
    from llmq_jax.layers.lora import LoRA
    from llmq_jax.layers.moe import Experts
    from llmq_jax.model_files import load, save
    from llmq_jax.models import (
        GPT2,
        DeepSeek3,
        DeepSeekV3Config,
        Gemma,
        Gemma2Config,
        Gemma3Config,
        GPT2Config,
        Llama3,
        Llama3Config,
        MinistralConfig,
        MistralConfig,
        Mixtral,
        MixtralConfig,
        Qwen2Config,
        Qwen3Config,
        Qwen3MoeConfig,
        build,
        init,
        preset,
    )
    from llmq_jax.new_tokens import add_tokens
    from llmq_jax.weight_transfer import with_config

_HOME = {
    "BadInput": "errors",
    "Balance": "layers.expert_balance",
    "ByteTokenizer": "data",
    "DeepSeek3": "models",
    "DeepSeekV3Config": "models",
    "FileTokenizer": "data",
    "Experts": "layers.moe",
    "GPT2": "models",
    "GPT2Config": "models",
    "Gemma": "models",
    "Gemma2Config": "models",
    "Gemma3Config": "models",
    "Llama3": "models",
    "Llama3Config": "models",
    "MinistralConfig": "models",
    "MistralConfig": "models",
    "Mixtral": "models",
    "MixtralConfig": "models",
    "Qwen2Config": "models",
    "Qwen3Config": "models",
    "Qwen3MoeConfig": "models",
    "GPT2Tokenizer": "data",
    "Generation": "generation",
    "GenerationConfig": "interop.generation_config",
    "LanguageModel": "language_model",
    "LoRA": "layers.lora",
    "PromptCache": "generation",
    "Sampler": "generation",
    "add_tokens": "new_tokens",
    "build": "models",
    "generate": "generation",
    "init": "models",
    "load": "model_files",
    "load_adapter": "adapters",
    "load_tokenizer": "data",
    "lora": "adapters",
    "merge": "adapters",
    "preset": "models",
    "save": "model_files",
    "save_adapter": "adapters",
    "save_hf": "interop.huggingface",
    "stream": "generation",
    "unmerge": "adapters",
    "with_classifier": "language_model",
    "with_config": "weight_transfer",
}
_PACKAGES = ("data", "generation", "interop", "layers", "models", "objectives", "training")

__version__ = "0.1.0"
__all__ = [
    "GPT2",
    "BadInput",
    "Balance",
    "ByteTokenizer",
    "DeepSeek3",
    "DeepSeekV3Config",
    "Experts",
    "FileTokenizer",
    "GPT2Config",
    "GPT2Tokenizer",
    "Gemma",
    "Gemma2Config",
    "Gemma3Config",
    "Generation",
    "GenerationConfig",
    "LanguageModel",
    "Llama3",
    "Llama3Config",
    "LoRA",
    "MinistralConfig",
    "MistralConfig",
    "Mixtral",
    "MixtralConfig",
    "PromptCache",
    "Qwen2Config",
    "Qwen3Config",
    "Qwen3MoeConfig",
    "Sampler",
    "add_tokens",
    "build",
    "data",
    "generate",
    "generation",
    "init",
    "interop",
    "layers",
    "load",
    "load_adapter",
    "load_tokenizer",
    "lora",
    "merge",
    "models",
    "objectives",
    "preset",
    "save",
    "save_adapter",
    "save_hf",
    "stream",
    "training",
    "unmerge",
    "with_classifier",
    "with_config",
]


if not TYPE_CHECKING:  # A type checker would take any name for one of ours.

    def __getattr__(name: str) -> Any:
        if name in _PACKAGES:
            return importlib.import_module(f"llmq_jax.{name}")
        if name in _HOME:
            value = getattr(importlib.import_module(f"llmq_jax.{_HOME[name]}"), name)
            globals()[name] = value
            return value
        raise AttributeError(f"module 'llmq_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
