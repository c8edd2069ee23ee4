"""nanoGPT's checkpoints: the logits of its model, with and without biases; sizes from the file; which tokenizer."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from convert import from_hf
from llmq_jax.data.tokenizers import ByteTokenizer, GPT2Tokenizer
from llmq_jax.interop import to_state_dict
from llmq_jax.interop.generation_config import GenerationConfig
from llmq_jax.interop.huggingface import save_hf
from llmq_jax.model_files import has_config, load
from llmq_jax.models import override
from llmq_jax.models.gpt2 import GPT2Config
from tests.interop.refusals import refused

SIZES = {"n_layer": 2, "n_head": 3, "n_embd": 12, "block_size": 16, "vocab_size": 37, "dropout": 0.2}
CONFIG = GPT2Config(
    vocab_size=37,
    max_position_embeddings=16,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    activation_function="gelu",
    embd_pdrop=0.2,
    attn_pdrop=0.2,
    resid_pdrop=0.2,
)
TOKENS = np.random.default_rng(0).integers(0, 37, (2, 16))


def linear(width: int, outputs: int, bias: bool) -> nn.Linear:
    layer = nn.Linear(width, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=0.3)
    if bias:
        nn.init.normal_(layer.bias, std=0.3)
    return layer


def norm(width: int, bias: bool) -> nn.LayerNorm:
    layer = nn.LayerNorm(width, bias=bias)
    nn.init.normal_(layer.weight, 1.0, 0.3)
    if bias:
        nn.init.normal_(layer.bias, std=0.3)
    return layer


class Layer(nn.Module):
    """One of its layers, by the names of its tensors."""

    def __init__(self, width: int, heads: int, bias: bool):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = norm(width, bias), norm(width, bias)
        self.attn = nn.ModuleDict({"c_attn": linear(width, 3 * width, bias), "c_proj": linear(width, width, bias)})
        self.mlp = nn.ModuleDict({"c_fc": linear(width, 4 * width, bias), "c_proj": linear(4 * width, width, bias)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        parts = self.attn["c_attn"](self.ln_1(x)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each [B, N, T, H]
        scores = query @ key.transpose(-1, -2) / (width // self.heads) ** 0.5
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -torch.inf).softmax(-1) @ value
        x = x + self.attn["c_proj"](mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Model(nn.Module):
    def __init__(self, sizes: dict, bias: bool):
        super().__init__()
        width = sizes["n_embd"]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(sizes["vocab_size"], width),
                "wpe": nn.Embedding(sizes["block_size"], width),
                "h": nn.ModuleList([Layer(width, sizes["n_head"], bias) for _ in range(sizes["n_layer"])]),
                "ln_f": norm(width, bias),
            }
        )
        self.lm_head = nn.Linear(width, sizes["vocab_size"], bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        parts = self.transformer
        x = parts["wte"](tokens) + parts["wpe"](torch.arange(tokens.shape[1]))
        for layer in parts["h"]:
            x = layer(x)
        return self.lm_head(parts["ln_f"](x))


def checkpoint(folder, bias=True, compiled=False, sizes=None, **more):
    """(the model, `ckpt.pt` with all that `train.py` puts into it, after a step)."""
    sizes = {**SIZES, **(sizes or {})}
    torch.manual_seed(0)
    model = Model(sizes, bias)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    model(torch.tensor(TOKENS[:1] % sizes["vocab_size"]))[..., 0].mean().backward()
    optimizer.step()
    prefix = "_orig_mod." if compiled else ""
    # Buffers, where PyTorch is too old for its own attention.
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 8, 8).tril() for i in range(sizes["n_layer"])}
    content = {
        "model": {prefix + name: tensor for name, tensor in (model.state_dict() | masks).items()},
        "optimizer": optimizer.state_dict(),
        "model_args": {**sizes, "bias": bias, **more},
        "iter_num": 1,
        "best_val_loss": torch.tensor(3.5),
        "config": {"dataset": "shakespeare_char", "learning_rate": 1e-3, "compile": compiled},
    }
    torch.save(content, folder / "ckpt.pt")
    return model.eval(), folder / "ckpt.pt"


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).numpy()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_logits(tmp_path, bias, compiled):
    model, path = checkpoint(tmp_path, bias, compiled)
    lm = load(path)
    assert lm.config == CONFIG
    assert lm.tokenizer is None and lm.generation == GenerationConfig()
    np.testing.assert_allclose(lm.logits(TOKENS), logits(model), atol=1e-4)
    assert has_config(path)


def test_the_documented_tokenizer_of_a_character_level_model(tmp_path, monkeypatch):
    """The ids of nanoGPT's prepare.py, and its texts again."""
    characters = sorted(set("\n !abcdefgABCXYZ"))
    encoding = {character: number for number, character in enumerate(characters)}
    checkpoint(tmp_path, sizes={"vocab_size": len(characters)})
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": encoding}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    page = (Path(__file__).parents[2] / "docs" / "gpt2.md").read_text()
    block = page.partition("<!-- executed by tests/interop/test_nanogpt.py -->\n```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    lm = load(tmp_path)
    text = "A bad cab!\n\n  Xg e"
    ids = lm.tokenizer.encode(text)
    assert list(ids) == [encoding[character] for character in text]
    assert lm.tokenizer.decode(ids) == text
    assert "cannot encode" in refused(lm.tokenizer.encode, "z?")


def test_the_folder_stands_for_the_file(tmp_path):
    """`out_dir` of nanoGPT's train.py; weights for transformers beside it come first, as a folder's do."""
    checkpoint(tmp_path)
    lm = load(tmp_path)
    np.testing.assert_array_equal(lm.logits(TOKENS), load(tmp_path / "ckpt.pt").logits(TOKENS))
    assert has_config(tmp_path)
    save_hf(lm, tmp_path / "hf")
    (tmp_path / "hf" / "ckpt.pt").write_bytes(b"no checkpoint")
    np.testing.assert_array_equal(load(tmp_path / "hf").logits(TOKENS), lm.logits(TOKENS))


def test_without_biases_they_are_zeros(tmp_path):
    params = load(checkpoint(tmp_path, bias=False)[1]).params
    block = params["group_0"]["block_0"]
    for module in (block["attention_norm"], block["attention"]["qkv"], block["mlp"]["down"], params["final_norm"]):
        assert not np.asarray(module["bias"]).any()


def test_some_biases_are_not_enough(tmp_path):
    _, path = checkpoint(tmp_path)
    content = torch.load(path)
    del content["model"]["transformer.ln_f.bias"]
    torch.save(content, path)
    assert "1 missing (transformer.ln_f.bias)" in refused(load, path)


@pytest.mark.parametrize("bias", [True, False])
def test_on_to_transformers_and_back(tmp_path, bias):
    model, path = checkpoint(tmp_path, bias)
    lm = load(path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(save_hf(lm, tmp_path / "hf")).eval()
    with torch.no_grad():
        found = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(found, logits(model), atol=1e-4)
    again = Model(SIZES, bias=True)
    state = to_state_dict(lm.variables, lm.config, "nanogpt")
    again.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    np.testing.assert_allclose(logits(again), logits(model), atol=1e-5)


@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_the_tokenizer_of_gpt2s_vocabulary(tmp_path, vocab_size):
    _, path = checkpoint(tmp_path, sizes={"vocab_size": vocab_size, "n_layer": 1})
    lm = load(path)
    assert isinstance(lm.tokenizer, GPT2Tokenizer)
    assert lm.config.vocab_size == vocab_size and lm.tokenizer.vocab_size == 50257
    assert lm.generation == GenerationConfig(eos_token_id=(50256,), bos_token_id=50256)


def test_a_tokenizer_in_the_same_folder(tmp_path):
    _, path = checkpoint(tmp_path, sizes={"vocab_size": 257, "n_layer": 1})
    ByteTokenizer().save(tmp_path)
    lm = load(path)
    assert isinstance(lm.tokenizer, ByteTokenizer)
    assert lm.generation.eos_token_id == (256,)


def test_an_end_of_text_outside_the_vocabulary_ends_nothing(tmp_path):
    _, path = checkpoint(tmp_path, sizes={"n_layer": 1})
    ByteTokenizer().save(tmp_path)
    assert load(path).generation == GenerationConfig()


def test_a_given_config(tmp_path):
    _, path = checkpoint(tmp_path)
    tanh = override(CONFIG, activation_function="gelu_new")
    assert load(path, config={"activation_function": "gelu_new"}).config == tanh
    assert load(path, config=tanh, layout="nanogpt").config == tanh
    _, path = checkpoint(tmp_path, n_kv_head=3)
    assert load(path, config=CONFIG).config == CONFIG


def test_the_weights_alone(tmp_path):
    model, path = checkpoint(tmp_path)
    torch.save(model.state_dict(), path)
    lm = load(path, layout="nanogpt", config={"num_attention_heads": 3})
    assert lm.config == override(CONFIG, embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
    np.testing.assert_allclose(lm.logits(TOKENS), logits(model), atol=1e-4)
    message = refused(load, path, config={"num_attention_heads": 3})
    assert "transformer.h.0.attn.c_attn.weight is [36, 12] instead of [12, 36]" in message


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"n_kv_head": 3}, "model_args has 'n_kv_head', which nanoGPT has not; it has n_layer, n_head, "),
        ({"n_head": None}, "model_args: n_head must be an integer, but is None"),
        ({"n_layer": True}, "model_args: n_layer must be an integer, but is True"),
        ({"dropout": "0.1"}, "model_args: dropout must be a number, at least 0 and below 1, but is '0.1'"),
        ({"dropout": 10**400}, "model_args: dropout must be a number, at least 0 and below 1, but is 1000"),
        ({"n_head": 5}, "GPT2Config.num_attention_heads=5 must divide hidden_size=12"),
        ({"block_size": 2**40}, "max_position_embeddings=1099511627776 is beyond all models"),
        ({"n_layer": 3}, "the weights do not fit GPT2Config: "),
    ],
)
def test_model_args_that_cannot_be(tmp_path, entries, message):
    _, path = checkpoint(tmp_path, **entries)
    assert refused(load, path).startswith(f"{path}: {message}")


def test_what_would_have_no_effect(tmp_path):
    _, path = checkpoint(tmp_path)
    expected = f"{path}: is a checkpoint of nanoGPT's; layout='book' would have no effect"
    assert refused(load, path, layout="book") == expected
    options = from_hf.Options(str(path), str(tmp_path / "ours"), num_attention_heads=3)
    assert refused(from_hf.main, options) == f"{path}: has a config of its own; drop --num-attention-heads"
