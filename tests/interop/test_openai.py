"""OpenAI's GPT-2 folder: read as it stands, against transformers, and folders that are broken."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from llmq_jax.errors import BadInput
from llmq_jax.interop import from_state_dict, to_state_dict
from llmq_jax.interop.huggingface import save_hf
from llmq_jax.interop.openai import checkpoint_index
from llmq_jax.model_files import load
from llmq_jax.models.gpt2 import GPT2Config
from tests.interop.data.make_openai_checkpoint import HPARAMS, draw, openai_variables
from tests.interop.refusals import refused

DATA = Path(__file__).parent / "data"
CONFIG = GPT2Config(
    vocab_size=262, max_position_embeddings=16, hidden_size=12, num_hidden_layers=3, num_attention_heads=3
)


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(DATA / "openai_gpt2", tmp_path / "124M"))


def hparams(folder, **changes):
    values = {name: value for name, value in {**HPARAMS, **changes}.items() if value is not ...}
    (folder / "hparams.json").write_text(json.dumps(values))


def test_the_folder_as_it_stands(folder):
    lm = load(folder)
    assert lm.config == CONFIG
    block = lm.params["group_0"]["block_0"]
    for layer in range(3):
        # Queries, keys and values, in this order; nothing is transposed.
        kernel = block["attention"]["qkv"]["kernel"][layer]
        np.testing.assert_array_equal(
            np.concatenate([kernel[:, part].reshape(12, 12) for part in range(3)], axis=1),
            draw(f"model/h{layer}/attn/c_attn/w", (1, 12, 36))[0],
        )
        np.testing.assert_array_equal(block["mlp_norm"]["scale"][layer], draw(f"model/h{layer}/ln_2/g", (12,)))
    np.testing.assert_array_equal(lm.params["position_embedding"]["embedding"], draw("model/wpe", (16, 12)))


def test_logits_are_those_of_transformers(folder, tmp_path):
    """transformers is given the same numbers by hand, and our export of them."""
    lm = load(folder)
    config = transformers.GPT2Config(vocab_size=262, n_positions=16, n_embd=12, n_layer=3, n_head=3)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    renamed = {"w": "weight", "b": "bias", "g": "weight", "wte": "wte.weight", "wpe": "wpe.weight"}
    state = {}
    for name, values in openai_variables().items():
        *path, last = name.replace("model/h", "transformer/h/").replace("model/", "transformer/").split("/")
        state[".".join([*path, renamed[last]])] = torch.tensor(values).squeeze(0)
    theirs.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
    tokens = np.random.default_rng(0).integers(0, 262, (2, 16))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
        exported = transformers.AutoModelForCausalLM.from_pretrained(save_hf(lm, tmp_path / "hf"))
        np.testing.assert_array_equal(exported.eval()(torch.tensor(tokens)).logits.numpy(), expected)
    assert expected.std() > 0.5
    np.testing.assert_allclose(lm.logits(tokens), expected, rtol=0, atol=1e-5)


def test_the_tokenizer_comes_along(folder):
    lm = load(folder)
    # Printable bytes come first, in OpenAI's order: "!" is 0; then merges, and the end of text last.
    assert lm.tokenizer.encode("! the\n") == [0, 258, 198]
    assert lm.tokenizer.decode([258]) == " the"
    assert lm.generation.token_ids() == {"bos_token_id": 261, "eos_token_id": 261, "pad_token_id": None}
    (folder / "vocab.bpe").unlink()
    assert load(folder).tokenizer is None
    assert load(folder).generation.eos_token_id == ()  # 50256 is outside this vocabulary


def test_weights_there_and_back():
    state = openai_variables()
    back = to_state_dict(from_state_dict(state, CONFIG, "openai"), CONFIG, "openai")
    assert back.keys() == state.keys()
    for name, values in state.items():
        np.testing.assert_array_equal(back[name], values)


def test_several_data_files(folder):
    for path in folder.glob("model.ckpt*"):
        path.unlink()
    for path in (DATA / "sharded").iterdir():
        shutil.copy(path, folder)
    expected = load(DATA / "openai_gpt2").logits([[1, 2, 3]])
    np.testing.assert_array_equal(load(folder).logits([[1, 2, 3]]), expected)


def test_types(folder):
    assert load(folder, dtype="bfloat16").params["final_norm"]["bias"].dtype == "bfloat16"


def test_a_config_of_ones_own(folder):
    assert load(folder, config={"activation_function": "gelu"}).config.activation_function == "gelu"
    (folder / "hparams.json").unlink()
    assert load(folder, config=CONFIG).config == CONFIG
    assert load(folder, config={"num_attention_heads": 3}).config == CONFIG
    message = refused(load, folder)
    assert message.startswith(
        f"{folder}: has weights but no config, and their shapes do not tell num_attention_heads; put the model's "
        "hparams.json beside them, or pass config="
    )


def test_checkpoints_of_training_scripts(folder):
    """They write `model-STEP`, and say in `checkpoint` which one is the newest, perhaps with a path of elsewhere."""
    for name in ("model-900", "model-1000"):
        for path in folder.glob("model.ckpt*"):
            shutil.copy(path, folder / path.name.replace("model.ckpt", name))
    assert checkpoint_index(folder).name == "model.ckpt.index"
    for named in ("model-1000", "/home/me/run1/model-1000", "C:\\\\run1\\\\model-1000"):
        (folder / "checkpoint").write_text(f'model_checkpoint_path: "{named}"\nall_model_checkpoint_paths: "model-900"')
        assert checkpoint_index(folder).name == "model-1000.index"
    (folder / "checkpoint").unlink()
    assert refused(load, folder) == (
        f"{folder}: has 3 checkpoints (model-1000.index, model-900.index, model.ckpt.index), and no file says which; "
        "keep one"
    )
    for path in [*folder.glob("model-9*"), *folder.glob("model.ckpt*")]:
        path.unlink()
    assert load(folder).config == CONFIG


# Folders that are broken.


def test_damaged_and_truncated_weights(folder):
    file = folder / "model.ckpt.data-00000-of-00001"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert refused(load, folder) == f"{file}: the checksum of model/wte is wrong, so the file is damaged; get it again"
    os.truncate(file, len(content) // 2)
    message = refused(load, folder)
    assert message.startswith(f"{file}: is truncated: model/") and message.endswith("at 18024; get it again")
    file.unlink()
    assert f"1 of its 1 data files are not there: {file.name}" in refused(load, folder)


@pytest.mark.parametrize("name", ["model.ckpt.index", "hparams.json"])
def test_a_file_that_is_something_else(folder, name):
    (folder / name).write_text("<html>404 Not Found</html>")
    assert refused(load, folder).startswith(f"{folder / name}: ")


def test_without_weights(folder):
    (folder / "model.ckpt.index").unlink()
    assert refused(load, folder) == f"{folder}: has hparams.json but no TensorFlow checkpoint (model.ckpt.index)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": ...}, "n_layer must be an integer, but is None"),
        ({"n_head": 2.5}, "n_head must be an integer, but is 2.5"),
        ({"n_embd": True}, "n_embd must be an integer, but is True"),
        ({"n_expert": 4}, "n_expert is no field of OpenAI's GPT-2, which has n_vocab, n_ctx, n_embd, n_layer, n_head"),
        ({"n_head": 5}, "num_attention_heads"),
    ],
)
def test_hparams_that_are_none(folder, changes, message):
    hparams(folder, **changes)
    assert refused(load, folder).startswith(f"{folder / 'hparams.json'}: ")
    assert message in refused(load, folder)
    assert load(folder, config=CONFIG).config == CONFIG


def test_weights_of_another_config(folder):
    hparams(folder, n_layer=2, n_ctx=32)
    message = refused(load, folder)
    assert message.startswith(f"{folder}: the weights do not fit GPT2Config: 12 unread (model/h2/")
    assert "model/wpe is [16, 12] instead of [32, 12]" in message


def test_an_unknown_variable():
    state = {**openai_variables(), "model/h0/attn/c_attn/w/Adam": np.zeros((1, 12, 36), np.float32)}
    with pytest.raises(BadInput, match=r"do not fit GPT2Config: 1 unread \(model/h0/attn/c_attn/w/Adam\)"):
        from_state_dict(state, CONFIG, "openai")


def test_a_checkpoint_of_something_else(folder):
    """Variables that GPT-2 does not have, written by TensorFlow, under a fitting hparams.json."""
    for path in folder.glob("model.ckpt*"):
        path.unlink()
    for path in (DATA / "types").iterdir():
        shutil.copy(path, folder)
    message = refused(load, folder)
    assert "40 missing (model/wte, model/wpe," in message
    assert "12 unread (bfloat16, bool, " in message  # and one without a number, which is passed over


def test_a_layout_without_effect(folder):
    message = refused(load, folder, layout="book")
    assert message == f"{folder}: is a folder of OpenAI's; layout='book' would have no effect"
    assert load(folder, layout="openai").config == CONFIG
