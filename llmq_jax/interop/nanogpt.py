"""Checkpoints of nanoGPT's `train.py`: `ckpt.pt`, a GPT-2 with its sizes beside it.

    {"model": state dict, "model_args": {"n_layer": 6, "n_head": 6, ...}, "optimizer": ..., "iter_num": ..., ...}

Source: karpathy/nanoGPT (`train.py`, `model.py`, `sample.py`). It computes GPT-2 with the exact GELU. A model with
`bias=False` has no biases, not even in its norms; here they are zeros, which gives the same outputs.

Such a file names no tokenizer. As in `sample.py`, the ids of a vocabulary as large as GPT-2's, or as that one padded to
a multiple of 64, are taken for GPT-2's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmq_jax.data.tokenizer_loading import tokenizer_in
from llmq_jax.data.tokenizers import GPT2Tokenizer
from llmq_jax.errors import BadInput, at_place
from llmq_jax.interop.generation_config import GenerationConfig
from llmq_jax.interop.huggingface import Contents, is_hf, read_state
from llmq_jax.interop.torch_files import is_torch, open_torch, saved_beside
from llmq_jax.models.config import require_sizes
from llmq_jax.models.gpt2 import GPT2Config

LAYOUT = "nanogpt"
CHECKPOINT = "ckpt.pt"
MODEL_ARGS = "model_args"
SIZES = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_embd": "hidden_size",
    "block_size": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
"""{entry of model_args: field of our config}."""
KNOWN = (*SIZES, "dropout", "bias")
GPT2_VOCABULARIES = (50257, 50304)


def is_nanogpt(path: Path) -> bool:
    """Whether a path is a PyTorch file that holds `model_args`, or nanoGPT's `out_dir` with such a `ckpt.pt` and
    without weights in Hugging Face's formats. BadInput: the file is damaged, or PyTorch is not installed."""
    if path.is_dir() and not is_hf(path):
        path = path / CHECKPOINT
    return path.is_file() and is_torch(path) and isinstance(saved_beside(path, MODEL_ARGS), Mapping)


def read_nanogpt(path: Path, config: Any = None, dtype: Any = None) -> Contents:
    """Read such a file or folder; a given `config` takes the place of its `model_args`, a dict changes fields of it.

    A tokenizer in the same folder takes precedence over GPT-2's.
    """
    path = path / CHECKPOINT if path.is_dir() else path
    state = open_torch(path)
    with at_place(path):
        config, variables = read_state(
            state, LAYOUT, config, dtype, lambda: config_from_model_args(saved_beside(path, MODEL_ARGS))
        )
    tokenizer = tokenizer_in(path.parent)
    if tokenizer is None and config.vocab_size in GPT2_VOCABULARIES:
        tokenizer = GPT2Tokenizer()
    end = None if tokenizer is None else tokenizer.end_of_text
    return Contents(config, variables, tokenizer, GenerationConfig.of_one_token(end, config.vocab_size))


def config_from_model_args(values: Mapping[str, Any]) -> GPT2Config:
    """The config of `model_args`. BadInput: an entry that nanoGPT does not have, a size missing or not an integer."""
    unknown = next((name for name in values if name not in KNOWN), None)
    if unknown is not None:
        raise BadInput(f"{MODEL_ARGS} has {unknown!r:.100}, which nanoGPT has not; it has {', '.join(KNOWN)}")
    for name in SIZES:
        if type(values.get(name)) is not int:
            raise BadInput(f"{MODEL_ARGS}: {name} must be an integer, but is {values.get(name)!r:.100}")
    dropout = values.get("dropout", 0.0)
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise BadInput(f"{MODEL_ARGS}: dropout must be a number, at least 0 and below 1, but is {dropout!r:.100}")
    fields: dict[str, Any] = {ours: values[theirs] for theirs, ours in SIZES.items()}
    require_sizes(fields)
    fields |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), float(dropout))
    return GPT2Config(**fields, activation_function="gelu")
