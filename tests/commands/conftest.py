"""A tiny model with byte tokenizer, in a folder, for the commands to work on."""

import pytest

import llmq_jax as lq
from llmq_jax.data import ByteTokenizer


@pytest.fixture(scope="session")
def tiny_config():
    return lq.GPT2Config(
        vocab_size=257,
        max_position_embeddings=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    variables = lq.init(tiny_config, seed=3)
    return lq.LanguageModel(tiny_config, lq.build(tiny_config), variables, ByteTokenizer())


@pytest.fixture(scope="session")
def model_folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    lq.save_hf(tiny_model, folder)
    return folder


@pytest.fixture
def llmq(capsys):
    """`llmq(*arguments)` -> (exit code, stdout, stderr) of the command, run in this process."""
    from llmq_jax import commands
    from llmq_jax.command_line import run

    def call(*arguments):
        with pytest.raises(SystemExit) as exit:
            run(commands.VERBS, [str(argument) for argument in arguments], program="llmq")
        return exit.value.code, *capsys.readouterr()

    return call
