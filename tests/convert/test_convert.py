"""python -m convert.from_hf and convert.to_hf, as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmq_jax.data.tokenizers import ByteTokenizer
from llmq_jax.interop.generation_config import GenerationConfig
from llmq_jax.interop.huggingface import save_hf
from llmq_jax.language_model import LanguageModel, load
from llmq_jax.models import build, init
from llmq_jax.models.gpt2 import GPT2Config

ROOT = Path(__file__).parents[2]


def convert(name, *arguments):
    command = [sys.executable, "-m", f"convert.{name}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)


@pytest.fixture
def source(tmp_path):
    config = GPT2Config(
        vocab_size=257, max_position_embeddings=8, hidden_size=12, num_hidden_layers=2, num_attention_heads=3
    )
    generation = GenerationConfig(eos_token_id=(256, 10))
    return save_hf(LanguageModel(config, build(config), init(config), ByteTokenizer(), generation), tmp_path / "source")


def test_there_and_back(source, tmp_path):
    done = convert("from_hf", source, tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    assert f"llmq generate {tmp_path / 'ours'}" in done.stdout
    assert load(tmp_path / "ours").tokenizer is not None

    done = convert("to_hf", tmp_path / "ours", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    for path in source.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name


def test_bad_input_is_one_line(source, tmp_path):
    done = convert("from_hf", tmp_path / "nowhere", tmp_path / "ours")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path / 'nowhere'}: there is no such file or folder\n"
    assert not (tmp_path / "ours").exists()

    done = convert("to_hf", source, source)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {source}: is not empty;") and done.stderr.count("\n") == 1
