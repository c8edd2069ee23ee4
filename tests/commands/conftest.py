"""Tiny models in folders, for the commands to work on: one with a byte tokenizer, one that chats."""

import io
import itertools
from functools import partial

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
def piped(monkeypatch):
    """`piped(text)` makes it standard input."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="ascii"))


CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == "tool" -%}{{ raise_exception("no tools") }}{%- endif -%}
<|{{ message.role }}|>{{ message.content }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""
SPECIAL = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
END = 260


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    """A model of random weights with bytes, the four special tokens and a chat template."""
    tokenizer = ByteTokenizer().with_tokens(SPECIAL).with_chat_template(CHAT_TEMPLATE)
    config = lq.GPT2Config(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=96,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.3,  # large, so that what is said depends on what was said
    )
    generation = lq.GenerationConfig(eos_token_id=(END,))
    folder = tmp_path_factory.mktemp("models") / "chatting"
    lq.save_hf(lq.LanguageModel(config, lq.build(config), lq.init(config, seed=5), tokenizer, generation), folder)
    return folder


@pytest.fixture(scope="session")
def chat_model(chat_folder):
    return lq.load(chat_folder)


@pytest.fixture
def stopped_at():
    """`stopped_at(call, function)`: the function, but for Ctrl-C in that call of it, counted from 1."""

    def stopped(call, function):
        def counted(*arguments, **keywords):
            if next(calls) == call:
                raise KeyboardInterrupt
            return function(*arguments, **keywords)

        calls = itertools.count(1)
        return counted

    return stopped


@pytest.fixture
def llmq(program):
    """`llmq(*arguments)` -> (exit code, stdout, stderr) of the command, run in this process."""
    return partial(program, "llmq")
