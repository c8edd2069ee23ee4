"""OpenAI's release of GPT-2, and models fine-tuned from it: a folder with a TensorFlow checkpoint and small files.

    checkpoint                            names the newest of several checkpoints
    model.ckpt.index, model.ckpt.data-*   the weights (training scripts write `model-1000.index` and so on)
    hparams.json                          the config: n_vocab, n_ctx, n_embd, n_head, n_layer
    encoder.json, vocab.bpe               the tokenizer

Source: openai/gpt-2 (`download_model.py`, `src/model.py`). It computes the same as transformers' GPT-2.
"""

import re
from pathlib import Path
from typing import Any

from llmq_jax.data.tokenizer_loading import tokenizer_in
from llmq_jax.errors import BadInput, at_place
from llmq_jax.interop.generation_config import GenerationConfig
from llmq_jax.interop.huggingface import Contents, read_state
from llmq_jax.interop.tensor_files import read_json
from llmq_jax.interop.tensorflow_bundle import open_tensorflow
from llmq_jax.models.gpt2 import GPT2Config

HPARAMS = "hparams.json"
END_OF_TEXT = 50256
"""The id of `<|endoftext|>` in GPT-2's vocabulary."""
LAYOUT = "openai"
FIELDS = {
    "n_vocab": "vocab_size",
    "n_ctx": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
"""{field of hparams.json: field of our config}."""


def is_openai(path: Path) -> bool:
    """Whether a path is a folder with OpenAI's `hparams.json`, or with a TensorFlow checkpoint."""
    return path.is_dir() and ((path / HPARAMS).is_file() or any(path.glob("*.index")))


def read_openai(folder: Path, config: Any = None, dtype: Any = None) -> Contents:
    """Read a folder of OpenAI's; a given `config` takes the place of `hparams.json`, a dict changes fields of it."""
    state, file = open_tensorflow(checkpoint_index(folder)), folder / HPARAMS
    with at_place(folder):
        config, variables = read_state(
            state, LAYOUT, config, dtype, lambda: config_from_hparams(file) if file.is_file() else None
        )
    tokenizer = tokenizer_in(folder)
    end = END_OF_TEXT if tokenizer is None else tokenizer.end_of_text
    return Contents(config, variables, tokenizer, GenerationConfig.of_one_token(end, config.vocab_size))


def config_from_hparams(path: Path) -> GPT2Config:
    """The config of an `hparams.json`. Anything but its five numbers is BadInput."""
    values = read_json(path)
    for name in [*FIELDS, *values]:
        if name not in FIELDS:
            raise BadInput(f"{path}: {name} is no field of OpenAI's GPT-2, which has {', '.join(FIELDS)}")
        if type(values.get(name)) is not int:
            raise BadInput(f"{path}: {name} must be an integer, but is {values.get(name)!r}")
    with at_place(path):
        return GPT2Config(**{ours: values[theirs] for theirs, ours in FIELDS.items()})


def checkpoint_index(folder: Path) -> Path:
    """The index of the folder's only checkpoint, or of the one that its file `checkpoint` names as the newest."""
    found = {path.name: path for path in sorted(folder.glob("*.index"))}
    if not found:
        raise BadInput(f"{folder}: has {HPARAMS} but no TensorFlow checkpoint (model.ckpt.index)")
    if len(found) == 1:
        return next(iter(found.values()))
    newest = ""
    if (folder / "checkpoint").is_file():
        text = (folder / "checkpoint").read_text(encoding="utf-8", errors="replace")
        # A path on the machine that trained: only the name of the file counts.
        match = re.search(r'^model_checkpoint_path: "(?:.*[/\\])?([^/\\"]+)"', text, re.MULTILINE)
        newest = f"{match[1]}.index" if match else ""
    if newest not in found:
        raise BadInput(f"{folder}: has {len(found)} checkpoints ({', '.join(found)}), and no file says which; keep one")
    return found[newest]
